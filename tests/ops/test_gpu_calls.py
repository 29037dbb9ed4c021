"""Kernels on a GPU: compiled, repeated, captured in a CUDA graph, compared with the CPU."""

import pytest
import torch
from calls import any_seeds, assert_same_draws, calls

from titok_fast.kernels.guided_sample import guided_sample
from titok_fast.kernels.philox import TOKEN_STREAM, gumbel

pytestmark = pytest.mark.gpu
NAMES = tuple(calls("cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager(device: torch.device, name: str) -> None:
    """On CUDA torch.compile inlines the kernels themselves; the second batch is of another size."""
    compiled = torch.compile(calls(device)[name].fn, fullgraph=True)
    for batch in (2, 5):
        call = calls(device, batch)[name]
        got, want = call.results(compiled), call.results()
        for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
            # gradients are sums, which Inductor computes in another order
            tolerance = 1e-5 if i < len(call.outputs()) else 1e-4
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_repeats_bit_for_bit_and_never_waits(device: torch.device, name: str) -> None:
    call = calls(device)[name]
    want = call.outputs()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = call.outputs()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mine, theirs in zip(again, want, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_replayed_from_a_cuda_graph(device: torch.device, name: str) -> None:
    """The sampling loop is captured whole: no op may allocate outside the graph or wait."""
    call = calls(device)[name]
    want = call.outputs()  # compiles the kernels before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call.outputs()
    graph.replay()
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


def test_cpu_and_gpu_draw_the_same(device: torch.device) -> None:
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
