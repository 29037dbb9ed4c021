"""How the kernels behave on a GPU: compiled, repeated, captured in a graph, beside the CPU."""

from collections.abc import Callable

import pytest
import torch
from draws import any_seeds, assert_same_draws
from torch import Tensor

from titok_fast.kernels.group_norm_silu import group_norm_silu
from titok_fast.kernels.guided_sample import guided_sample
from titok_fast.kernels.lm_head_sample import lm_head_sample
from titok_fast.kernels.masked_cross_entropy import masked_cross_entropy
from titok_fast.kernels.nearest_code import nearest_code
from titok_fast.kernels.nearest_code_stats import nearest_code_stats
from titok_fast.kernels.philox import TOKEN_STREAM, gumbel
from titok_fast.kernels.remask import remask
from titok_fast.kernels.soft_codes import soft_codes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPS = (
    "nearest_code",
    "nearest_code_stats",
    "guided_sample",
    "remask",
    "lm_head_sample",
    "soft_codes",
    "group_norm_silu",
    "masked_cross_entropy",
)


def calls(device: torch.device) -> dict[str, Callable[[], Tensor | tuple[Tensor, ...]]]:
    """Each op on fixed inputs, ready for a graph: no argument that lives on the host."""
    z, codebook = torch.randn(64, 12, device=device), torch.randn(500, 12, device=device)
    logits, uncond = torch.randn(2, 2, 32, 500, device=device)
    mask = torch.rand(2, 32, device=device) < 0.7
    ids, seeds = torch.randint(500, (2, 32), device=device), any_seeds(2, device)
    count, scores = torch.tensor([3, 20], device=device), torch.randn(2, 32, device=device)
    hidden, weight = torch.randn(64, 48, device=device), torch.randn(500, 48, device=device)
    row_seeds, positions = any_seeds(64, device), torch.arange(64, device=device)
    x = torch.randn(2, 64, 8, 8, device=device).to(memory_format=torch.channels_last)
    scale, shift, bias = (torch.randn(n, device=device) for n in (64, 64, 500))
    weights, targets = torch.rand(64, device=device), torch.randint(500, (64,), device=device)
    return {
        "nearest_code": lambda: nearest_code(z, codebook, metric="cosine"),
        "nearest_code_stats": lambda: nearest_code_stats(z, codebook, metric="cosine"),
        "guided_sample": lambda: guided_sample(
            logits, uncond, mask=mask, ids=ids, seeds=seeds, guidance=2.0, noise_temperature=3.0
        ),
        "remask": lambda: remask(
            ids, scores, count, mask_id=500, seeds=seeds, noise_temperature=3.0
        ),
        "lm_head_sample": lambda: lm_head_sample(
            hidden, None, weight, None, seeds=row_seeds, positions=positions, noise_temperature=3.0
        ),
        "soft_codes": lambda: soft_codes(logits[0], codebook),
        "group_norm_silu": lambda: group_norm_silu(x, scale, shift),
        "masked_cross_entropy": lambda: masked_cross_entropy(
            hidden, weight, bias, targets, weights
        ),
    }


def outputs(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


@pytest.mark.parametrize("op", OPS)
def test_compiled_equals_eager(device: torch.device, op: str) -> None:
    """On CUDA torch.compile inlines the kernels themselves."""
    call = calls(device)[op]
    want = outputs(call())
    for mine, theirs in zip(outputs(torch.compile(call, fullgraph=True)()), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_repeats_bit_for_bit_and_never_waits(device: torch.device, op: str) -> None:
    call = calls(device)[op]
    want = outputs(call())
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = outputs(call())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mine, theirs in zip(again, want, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("op", OPS)
def test_replayed_from_a_cuda_graph(device: torch.device, op: str) -> None:
    """The sampling loop is to be captured whole: no op may allocate outside or ask the host."""
    call = calls(device)[op]
    want = outputs(call())  # compiles the kernels, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = outputs(call())
    graph.replay()
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


def test_cpu_and_gpu_draw_the_same(device: torch.device) -> None:
    """A picture does not depend on the device its noise was made on."""
    logits = torch.randn(4, 32, 4096)
    mask, ids = torch.ones(4, 32, dtype=torch.bool), torch.zeros(4, 32, dtype=torch.int64)
    seeds = any_seeds(4)
    there = [x.to(device) for x in (logits, mask, ids, seeds)]
    got, want = (
        guided_sample(l, mask=m, ids=i, seeds=s, step=2, noise_temperature=4.0)
        for l, m, i, s in (there, (logits, mask, ids, seeds))
    )
    noisy = logits + 4.0 * gumbel(seeds, 2, torch.arange(32), 4096, TOKEN_STREAM)
    assert_same_draws(noisy, (got[0].cpu(), got[1].cpu()), want, 1e-5)
