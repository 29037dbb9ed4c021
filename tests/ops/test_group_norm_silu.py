"""group_norm_silu against PyTorch in float64: values, gradients, memory format."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import DTYPES, cases, leaf, relative_error
from hypothesis import strategies as st
from support.tolerances import ROUNDOFF, assert_near
from torch import Tensor

from titok_fast.kernels.group_norm_silu import (
    add_group_norm_silu,
    group_norm_silu,
    group_norm_silu_ref,
)

# the package re-exports the function under the name of its file
module = importlib.import_module("titok_fast.kernels.group_norm_silu")
EPS = 1e-6


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def exact(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return F.silu(F.group_norm(x.double(), groups, weight.double(), bias.double(), EPS))


@cases(
    B=st.integers(0, 3),
    groups=st.sampled_from((1, 2, 3, 7, 32)),
    width=st.sampled_from((1, 2, 3, 4, 17)),
    H=st.integers(1, 13),
    W=st.integers(1, 29),
    dtype=st.sampled_from(DTYPES),
    offset=st.sampled_from((0.0, -5.0)),
)
def test_kernel_against_float64(device: torch.device, case: SimpleNamespace) -> None:
    groups, C, terms = case.groups, case.groups * case.width, case.width * case.H * case.W
    x = (case.offset + torch.randn(case.B, C, case.H, case.W)).to(device, case.dtype)
    x = channels_last(x)
    weight, bias = torch.randn(2, C).to(device)
    got = group_norm_silu(x, weight, bias, groups, EPS)
    assert got.dtype == case.dtype
    assert got.shape == x.shape
    if case.B == 0 or terms == 1:
        return  # a single number has no deviation: the result is noise divided by eps
    assert got.is_contiguous(memory_format=torch.channels_last)
    # errors of the mean are divided by the deviation, which may be small
    spread = x.double().reshape(case.B, groups, -1).std(-1, correction=0).min()
    scale = float(weight.abs().max() * (1 + abs(case.offset)) / spread.clamp_min(1e-3)) + 3
    assert_near(got, exact(x, weight, bias, groups), terms=terms, scale=scale)


@pytest.mark.parametrize(
    ("shape", "groups", "terms", "scale"),
    [
        *(((1, C, 16, 16), 32, 256, 1.0) for C in (128, 256, 512)),  # the published widths
        # more pixels than 64 runs of one tile, and a last run and tile that are not full
        ((2, 513, 40, 17), 27, 1000, 1.0),
        pytest.param((70000, 4, 1, 2), 1, 8, 8.0, marks=pytest.mark.gpu),
    ],
)
def test_widths_and_sizes(
    device: torch.device, shape: tuple[int, ...], groups: int, terms: int, scale: float
) -> None:
    x = channels_last(torch.randn(shape, device=device))
    weight, bias = torch.randn(2, shape[1], device=device)
    got = group_norm_silu(x, weight, bias, groups)
    assert_near(got, exact(x, weight, bias, groups), terms=terms, scale=scale)


def test_many_images_need_a_flat_grid(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA limits the second and third grid dimension to 65535."""
    grids: list[tuple[int, ...]] = []

    class Launch:
        def __init__(self, kernel: Any) -> None: ...

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(module, "wrap_triton", Launch)
    x = channels_last(torch.zeros(70000, 4, 1, 2, device=device)).requires_grad_()
    weight = torch.ones(4, device=device)
    group_norm_silu(x, weight, weight, 2).sum().backward()
    assert len(grids) == 5
    assert all(max(grid[1:], default=1) < 2**16 for grid in grids)


def test_large_mean_costs_no_digits(device: torch.device) -> None:
    """E[x^2] - E[x]^2 in float32 would be off by a third here; inputs themselves round by 1e-4."""
    x = channels_last(1000 + torch.randn(1, 64, 30, 40, device=device))
    weight, bias = torch.ones(64, device=device), torch.zeros(64, device=device)
    want = exact(x, weight, bias, 32)
    assert relative_error(group_norm_silu(x, weight, bias), want) < 1e-4


def test_equal_numbers(device: torch.device) -> None:
    """No deviation: eps keeps the result at silu(bias)."""
    x = channels_last(torch.full((1, 8, 5, 5), 3.0, device=device))
    weight, bias = torch.randn(2, 8, device=device)
    want = F.silu(bias)[None, :, None, None].expand(1, 8, 5, 5)
    assert_near(group_norm_silu(x, weight, bias, 4), want)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e-40, 1e18])
def test_extremes_stay_in_their_group(device: torch.device, value: float) -> None:
    x = channels_last(torch.randn(2, 8, 5, 5, device=device))
    weight, bias = torch.randn(2, 8, device=device)
    clean = group_norm_silu(x, weight, bias, 4)
    x[0, 1, 2, 2] = value
    got = group_norm_silu(x, weight, bias, 4)
    assert (got[1] == clean[1]).all()
    assert (got[0, 2:] == clean[0, 2:]).all()
    if value == value and value != float("inf"):
        assert_near(got, exact(x, weight, bias, 4), terms=50)
    else:
        assert got[0, :2].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 64, 5, 7), 32), ((1, 9, 1, 11), 3), ((2, 40, 40, 13), 5)]
)
def test_gradients(
    device: torch.device, shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    x = channels_last(torch.randn(shape, device=device)).to(dtype).requires_grad_()
    weight, bias = leaf(shape[1], device=device), leaf(shape[1], device=device)
    grad = torch.randn(shape, device=device).to(dtype)  # channels-first: any layout may come back
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    got = torch.autograd.grad(group_norm_silu(x, weight, bias, groups), (x, weight, bias), grad)
    want = torch.autograd.grad(exact(*wide, groups), wide, grad.double())
    for mine, theirs, like in zip(got, want, (x, weight, bias), strict=True):
        assert mine.dtype == like.dtype
        # float32: sums of some thousand terms, whose errors mostly cancel
        bound = 4 * ROUNDOFF[dtype] if mine.dtype == dtype else ROUNDOFF[dtype]
        assert relative_error(mine, theirs) < max(bound, 32 * ROUNDOFF[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual(device: torch.device, dtype: torch.dtype) -> None:
    shape = (2, 12, 5, 7)
    x, residual, grad, grad_total = (
        channels_last(torch.randn(shape, device=device)).to(dtype) for _ in range(4)
    )
    x.requires_grad_()
    residual.requires_grad_()
    weight, bias = leaf(12, device=device), leaf(12, device=device)
    got, total = add_group_norm_silu(x, residual, weight, bias, 3)
    # one rounding of the sum
    assert_near(total, x.double() + residual.double(), scale=0.0)
    inputs = (x, residual, weight, bias)
    mine = torch.autograd.grad((got, total), inputs, (grad, grad_total))
    sum_wide = total.detach().double().requires_grad_()
    wide = [sum_wide, *(t.detach().double().requires_grad_() for t in (weight, bias))]
    want = exact(*wide, 3)
    assert_near(got, want, terms=140, scale=3)
    theirs = torch.autograd.grad((want, sum_wide), wide, (grad.double(), grad_total.double()))
    for a, b in zip(mine, (theirs[0], *theirs), strict=True):
        assert relative_error(a, b) < max(4 * ROUNDOFF[dtype], 32 * ROUNDOFF[torch.float32])


def test_second_derivative_is_refused(device: torch.device) -> None:
    x = channels_last(torch.randn(2, 6, 3, 2, device=device)).requires_grad_()
    weight, bias = torch.ones(6, device=device), torch.zeros(6, device=device)
    y = group_norm_silu(x, weight, bias, 3)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="group_norm_silu_bwd"):
        grad.square().sum().backward()


def test_residual_reference() -> None:
    x, residual = torch.randn(2, 2, 6, 4, 4)
    weight, bias = torch.randn(2, 6)
    got, total = add_group_norm_silu(x, residual, weight, bias, 3)
    assert (total == x + residual).all()
    assert (got == group_norm_silu(total, weight, bias, 3)).all()


def test_reference_gradcheck() -> None:
    x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = leaf(6, dtype=torch.float64), leaf(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *inputs: group_norm_silu_ref(*inputs, groups=3, eps=EPS), (x, weight, bias)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_reference_keeps_memory_format(layout: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.randn(2, 64, 6, 5).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(64), torch.randn(64)
    got = group_norm_silu(x, weight, bias)
    assert got.is_contiguous(memory_format=layout)
    assert got.dtype == dtype
    # the reference rounds weight, bias and the normalised value to the dtype of x
    assert_near(got, exact(x, weight, bias, 32), terms=60, scale=6.0)


def test_channels_first_falls_back(device: torch.device) -> None:
    x, weight, bias = (torch.randn(s, device=device) for s in ((2, 64, 6, 5), (64,), (64,)))
    got = group_norm_silu(x, weight, bias)
    assert (got == group_norm_silu_ref(x, weight, bias, 32, EPS)).all()
