"""Fused operators for image tokenizers and masked generators, each beside its plain reference.

A kernel exists where plain PyTorch reads memory several times or launches several kernels for
little work (`titok_fast/costs.py` counts both); matmuls and convolutions stay with cuBLAS and
cuDNN, and attention with PyTorch, which is within a few percent of the floor. Read `nearest_code`
first; then `nearest_code_stats`, `soft_codes` and `group_norm_silu` (tokenizer), `philox`,
`guided_sample`, `lm_head_sample` and `remask` (sampling) and `masked_cross_entropy` (training);
files with an underscore hold shared checks, operator registration, device code and CPU code.

Letters are those of `docs/design.md`; in these files also H x W = P pixels, G groups of channels,
and M where only M of R rows are read.
"""

if __name__ != "titok_fast.kernels":
    raise ImportError(
        "this folder is the package titok_fast.kernels: install the project (`pip install -e .`) "
        "and import that; a bare `kernels` belongs to another project"
    )

from titok_fast.kernels.group_norm_silu import add_group_norm_silu, group_norm_silu
from titok_fast.kernels.guided_sample import guided_sample
from titok_fast.kernels.lm_head_sample import lm_head_sample
from titok_fast.kernels.masked_cross_entropy import masked_cross_entropy
from titok_fast.kernels.nearest_code import nearest_code
from titok_fast.kernels.nearest_code_stats import CodeStats, nearest_code_stats
from titok_fast.kernels.remask import remask
from titok_fast.kernels.soft_codes import soft_codes

__all__ = [
    "CodeStats",
    "add_group_norm_silu",
    "group_norm_silu",
    "guided_sample",
    "lm_head_sample",
    "masked_cross_entropy",
    "nearest_code",
    "nearest_code_stats",
    "remask",
    "soft_codes",
]
