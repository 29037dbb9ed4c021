"""nearest_code_stats: every output and gradient of the kernel against autograd on the reference."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from calls import DTYPES, cases, leaf
from hypothesis import strategies as st
from support.tolerances import assert_near
from torch import Tensor

from titok_fast.kernels.nearest_code import METRICS
from titok_fast.kernels.nearest_code_stats import (
    CodeStats,
    nearest_code_stats,
    nearest_code_stats_ref,
)


def gradients(stats: CodeStats, weight: Tensor, z: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a sum that gives the three differentiable outputs different factors."""
    total = (stats.quantized * weight).sum() + 3 * stats.commitment_loss + 5 * stats.codebook_loss
    return torch.autograd.grad(total, (z, codebook))


@cases(
    N=st.integers(1, 40),
    K=st.integers(1, 140),
    C=st.one_of(st.sampled_from((1, 12, 64)), st.integers(1, 80)),
    dtype=st.sampled_from(DTYPES),
    table=st.sampled_from(DTYPES),
    metric=st.sampled_from(METRICS),
    ties=st.booleans(),
    step=st.integers(1, 3),
    transposed=st.booleans(),
)
def test_kernel_against_reference(device: torch.device, case: SimpleNamespace) -> None:
    N, C, metric, step = case.N, case.C, case.metric, case.step
    ties = case.ties and metric == "euclidean"  # rounding decides whether unit rows tie

    def rows(count: int, kind: torch.dtype) -> Tensor:
        """(count, C), a view with gaps if step > 1; small integers tie exactly."""
        shape = (C, count * step) if case.transposed else (count * step, C)
        x = torch.randn(shape)
        x = (x.round().clamp(-1, 1) if ties else x).to(device, kind).requires_grad_()
        return (x.T if case.transposed else x)[::step]

    z, codebook = rows(N, case.dtype), rows(case.K, case.table)
    weight = torch.randn(N, C).to(device)
    got = nearest_code_stats(z, codebook, metric=metric, beta=0.3)
    want = nearest_code_stats_ref(z, codebook, metric, beta=0.3)
    # test_nearest_code.py judges close codes; here the other outputs depend on the ids
    assert (got.ids == want.ids).all()
    assert (got.counts == want.counts).all()
    assert_near(got.quantized, want.quantized)
    assert_near(got.commitment_loss, want.commitment_loss, terms=N * C)
    assert_near(got.codebook_loss, want.codebook_loss, terms=N * C)
    pairs = zip(
        gradients(got, weight, z, codebook),
        gradients(want, weight, z, codebook),
        (z, codebook),
        strict=True,
    )
    for mine, theirs, x in pairs:
        # cosine divides by a row's length numbers that may cancel
        length = x.detach().float().norm(dim=1, keepdim=True) if metric == "cosine" else 1.0
        assert_near((mine * length).to(mine.dtype), theirs * length, terms=N * C, scale=8.0)


def test_losses_by_hand(device: torch.device) -> None:
    z = torch.tensor([[0.0, 1.0], [3.0, 0.0]], device=device)
    codebook = torch.tensor([[0.0, 2.0], [9.0, 9.0], [2.0, 0.0]], device=device)
    stats = nearest_code_stats(z, codebook, beta=0.5)
    assert stats.ids.tolist() == [0, 2]
    assert stats.counts.tolist() == [1, 0, 1]
    assert stats.quantized.tolist() == [[0.0, 2.0], [2.0, 0.0]]
    assert float(stats.codebook_loss) == 0.5
    assert float(stats.commitment_loss) == 0.25


@pytest.mark.parametrize("path", [nearest_code_stats, nearest_code_stats_ref])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_show_in_the_losses(
    device: torch.device, value: float, metric: str, path: Callable[..., CodeStats]
) -> None:
    z, codebook = torch.randn(5, 7, device=device), torch.randn(70, 7, device=device)
    clean = path(z, codebook, metric=metric)
    z[2, 3] = value
    stats = path(z, codebook, metric=metric)
    assert ((stats.ids >= 0) & (stats.ids < 70)).all()
    others = [0, 1, 3, 4]
    assert (stats.ids[others] == clean.ids[others]).all()
    assert (stats.quantized[others] == clean.quantized[others]).all()
    assert stats.counts.sum() == 5
    assert not stats.commitment_loss.isfinite()
    assert not stats.codebook_loss.isfinite()


@pytest.mark.parametrize("path", [nearest_code_stats, nearest_code_stats_ref])
def test_maps_are_rows_in_their_order(device: torch.device, path: Callable[..., CodeStats]) -> None:
    z = torch.randn(2, 6, 3, 4, device=device).permute(0, 2, 3, 1).requires_grad_()
    codebook = torch.randn(20, 6, device=device, requires_grad=True)
    weight = torch.randn(2, 3, 4, 6, device=device)
    got = path(z, codebook, metric="cosine")
    want = path(z.flatten(0, 2), codebook, metric="cosine")
    assert torch.equal(got.ids, want.ids.view(2, 3, 4))
    assert torch.equal(got.counts, want.counts)
    assert_near(got.quantized, want.quantized.view(weight.shape))
    flat = gradients(want, weight.flatten(0, 2), z, codebook)
    for mine, theirs in zip(gradients(got, weight, z, codebook), flat, strict=True):
        assert_near(mine, theirs, terms=24)


@pytest.mark.parametrize("path", [nearest_code_stats, nearest_code_stats_ref])
def test_gradients_repeat_on_request(device: torch.device, path: Callable[..., CodeStats]) -> None:
    """Without warn_only an operation without a fixed order raises."""
    torch.use_deterministic_algorithms(True)
    z, codebook = leaf(3000, 5, device=device), leaf(4, 5, device=device)  # about 750 rows each
    weight = torch.randn(3000, 5, device=device)
    first, again = (gradients(path(z, codebook), weight, z, codebook) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("metric", METRICS)
def test_second_derivatives(device: torch.device, metric: str) -> None:
    """Each loss treats the other side as constant in second derivatives too."""
    z, codebook = leaf(6, 5, device=device), leaf(4, 5, device=device)

    def second(path: Callable[..., CodeStats]) -> tuple[Tensor, ...]:
        stats = path(z, codebook, metric=metric)
        total = stats.quantized.square().sum() + 2 * stats.commitment_loss + stats.codebook_loss
        grads = torch.autograd.grad(total, (z, codebook), create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        return torch.autograd.grad(penalty, (z, codebook))

    for mine, theirs in zip(
        second(nearest_code_stats), second(nearest_code_stats_ref), strict=True
    ):
        size = float(theirs.abs().max())
        assert_near(mine, theirs, terms=30, scale=size)


@pytest.mark.parametrize("metric", METRICS)
def test_reference_gradients_are_derivatives(metric: str) -> None:
    """Stop-gradients leave each loss a true derivative in its own argument."""
    z, codebook = leaf(6, 5, dtype=torch.float64), leaf(4, 5, dtype=torch.float64)
    fixed_z, fixed_codebook = z.detach(), codebook.detach()
    assert torch.autograd.gradcheck(
        lambda x: nearest_code_stats_ref(x, fixed_codebook, metric).commitment_loss, z
    )
    assert torch.autograd.gradcheck(
        lambda e: nearest_code_stats_ref(fixed_z, e, metric).codebook_loss, codebook
    )


@pytest.mark.parametrize("path", [nearest_code_stats, nearest_code_stats_ref])
def test_gradients_go_where_they_must(device: torch.device, path: Callable[..., CodeStats]) -> None:
    z, codebook = leaf(6, 5, device=device), leaf(4, 5, device=device)
    stats = path(z, codebook)
    ones = torch.ones_like(stats.quantized)
    straight = torch.autograd.grad(stats.quantized, z, ones, retain_graph=True)[0]
    assert (straight == 1).all()
    to_code = torch.autograd.grad(
        stats.commitment_loss, codebook, retain_graph=True, allow_unused=True
    )[0]
    assert to_code is None or (to_code == 0).all()
    to_latent = torch.autograd.grad(stats.codebook_loss, z, retain_graph=True, allow_unused=True)[0]
    assert to_latent is None or (to_latent == 0).all()
    unused = torch.autograd.grad(stats.codebook_loss, codebook)[0][stats.counts == 0]
    assert (unused == 0).all()


def test_rows_of_almost_no_length(device: torch.device) -> None:
    """The bound 1e-12 replaces their length. One code, as all would be equally near."""
    z = torch.zeros(3, 4, device=device)
    z[1] = 1e-14 * torch.randn(4, device=device)
    z.requires_grad_()
    codebook = torch.randn(1, 4, device=device, requires_grad=True)
    stats = nearest_code_stats(z, codebook, metric="cosine")
    want = nearest_code_stats_ref(z, codebook, "cosine")
    weight = torch.randn(3, 4, device=device)
    for mine, theirs in zip(
        gradients(stats, weight, z, codebook), gradients(want, weight, z, codebook), strict=True
    ):
        assert torch.isfinite(mine).all()
        assert_near(mine, theirs, terms=4, scale=max(1.0, float(theirs.abs().max())))


def test_no_rows(device: torch.device) -> None:
    stats = nearest_code_stats(torch.zeros(0, 4, device=device), torch.zeros(5, 4, device=device))
    assert stats.ids.shape == (0,)
    assert stats.quantized.shape == (0, 4)
    assert stats.counts.tolist() == [0] * 5
    assert stats.codebook_loss.isnan()
