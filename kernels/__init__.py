"""Kernels that other generators can use too: one op, one file, each beside its plain reference.

Why these and no others: FLOPs and bytes of every stage are counted first (`titok_fast/costs.py`;
`python bench/cost_model.py --floors` turns them into the time that no card can go below). Products
and convolutions, nearly all of the FLOPs, stay with cuBLAS and cuDNN. A kernel is written where
plain PyTorch passes over memory many times between them, or needs several launches for little work.
Attention is no such case: libraries come so near to its floor that what is left to gain is a few
percent of a block (`python bench/attention_floor.py`). The heads of `soft_codes.py` and
`nearest_code_stats.py` say why the one leaves the convolution before it alone, and the other adds a
launch to the search.
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
