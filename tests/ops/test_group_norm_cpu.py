"""The eager CPU path of group_norm_silu: its own backward, and where PyTorch's is used."""

from collections.abc import Callable

import pytest
import torch
from calls import DTYPES, relative_error
from support.tolerances import ROUNDOFF, assert_near
from torch import Tensor

from titok_fast.kernels import _group_norm_cpu
from titok_fast.kernels.group_norm_silu import (
    add_group_norm_silu,
    group_norm_silu,
    group_norm_silu_ref,
)

EPS = 1e-6
# two channels in a group, 1024 pixels or more, 2^18 numbers or more: the backward of our own
SHAPE, GROUPS = (2, 64, 67, 64), 32


def leaves(
    shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    x = (0.5 + torch.randn(shape)).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def runs_own_backward(y: Tensor) -> bool:
    return "NormSiLU" in type(y.grad_fn).__name__


def assert_gradients(
    got: tuple[Tensor, ...], inputs: tuple[Tensor, ...], grad: Tensor, groups: int
) -> None:
    """Gradients are within the bound of test_group_norm_silu.py, or as close as the reference.

    The statistics are PyTorch's, in one float32 sum per channel: 10^5 pixels cost some digits.
    """

    def gradients(fn: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
        y = fn(*leaves, groups, EPS)
        return torch.autograd.grad(y, leaves, grad.to(y.dtype))

    want = gradients(group_norm_silu_ref, *(t.detach().double().requires_grad_() for t in inputs))
    reference = gradients(group_norm_silu_ref, *inputs)
    for mine, other, truth, like in zip(got, reference, want, inputs, strict=True):
        assert mine.dtype == like.dtype
        roundings = ROUNDOFF[inputs[0].dtype] * (4 if like.ndim == 4 else 1)
        bound = max(roundings, 32 * ROUNDOFF[torch.float32], 1.5 * relative_error(other, truth))
        assert relative_error(mine, truth) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strip", [1 << 19, 20000, 1])
def test_strip_gradients(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, strip: int) -> None:
    """Strips of all 67 rows, of 4 with a shorter last one, and of one row."""
    monkeypatch.setattr(_group_norm_cpu, "_STRIP", strip)
    inputs = leaves(dtype=dtype)
    grad = torch.randn(SHAPE).to(dtype)  # channels-first: any layout may come back
    y = group_norm_silu(*inputs, GROUPS)
    assert runs_own_backward(y)
    assert y.is_contiguous(memory_format=torch.channels_last)
    got = torch.autograd.grad(y, inputs, grad)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert_gradients(got, inputs, grad, GROUPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_equals_the_one_without_gradients(dtype: torch.dtype) -> None:
    inputs = leaves(dtype=dtype)
    before = inputs[0].detach().clone()
    y = group_norm_silu(*inputs, GROUPS)
    assert y.dtype == dtype
    with torch.no_grad():
        assert (group_norm_silu(*inputs, GROUPS) == y).all()
    assert (inputs[0] == before).all()  # what works in op_device works on its own result


def test_large_mean_costs_no_digits_of_the_sums() -> None:
    """A channel far from the mean of its group: products with x itself would lose four digits."""
    x, weight, bias = leaves()
    with torch.no_grad():
        x += 100.0 * torch.tensor([1.0, -1.0]).repeat(32).view(1, -1, 1, 1)
    grad = torch.randn(SHAPE)
    got = torch.autograd.grad(group_norm_silu(x, weight, bias, GROUPS), (x, weight, bias), grad)
    assert_gradients(got, (x, weight, bias), grad, GROUPS)


@pytest.mark.parametrize(
    ("shape", "groups", "dtype", "own"),
    [
        *(((1, 93, 59, 53), 31, torch.float32, True), ((3, 7, 211, 197), 7, torch.float32, True)),
        ((1, 6, 1, 50000), 2, torch.float32, True),
        ((1, 64, 31, 33), 32, torch.bfloat16, False),  # fewer than 1024 pixels
        ((1, 64, 40, 40), 32, torch.bfloat16, False),  # fewer than 2^18 numbers
        ((1, 512, 32, 32), 32, torch.bfloat16, False),  # 16 channels in a group: 32 bytes
        ((1, 256, 40, 40), 32, torch.float32, False),  # 8 channels in a group: 32 bytes
    ],
)
def test_uses_pytorch_where_it_is_faster(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, own: bool
) -> None:
    inputs = leaves(shape, dtype)
    grad = torch.randn(shape).to(dtype)
    y = group_norm_silu(*inputs, groups)
    assert runs_own_backward(y) == own
    assert_gradients(torch.autograd.grad(y, inputs, grad), inputs, grad, groups)


def test_uses_pytorch_for_channels_first() -> None:
    x, weight, bias = leaves()
    y = group_norm_silu(x.contiguous(), weight, bias, GROUPS)
    assert not runs_own_backward(y)
    assert y.is_contiguous()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs(wanted: tuple[int, ...]) -> None:
    inputs = leaves()
    grad = torch.randn(SHAPE)
    every = torch.autograd.grad(group_norm_silu(*inputs, GROUPS), inputs, grad)
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    y = group_norm_silu(*some, GROUPS)
    got = torch.autograd.grad(y, [some[i] for i in wanted], grad)
    for i, mine in zip(wanted, got, strict=True):
        assert (mine == every[i]).all()


def test_gradients_of_16_bit_weights() -> None:
    x, weight, bias = leaves(dtype=torch.bfloat16)
    inputs = (x, *(t.detach().bfloat16().requires_grad_() for t in (weight, bias)))
    grad = torch.randn(SHAPE).bfloat16()
    got = torch.autograd.grad(group_norm_silu(*inputs, GROUPS), inputs, grad)
    assert_gradients(got, inputs, grad, GROUPS)


def test_backward_twice_and_through_an_expanded_gradient() -> None:
    inputs = leaves()
    loss = group_norm_silu(*inputs, GROUPS).sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert_gradients(first, inputs, torch.ones(SHAPE), GROUPS)


@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,)])
def test_second_derivative(wanted: tuple[int, ...]) -> None:
    def penalty(fn: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        (grad,) = torch.autograd.grad(
            fn(*inputs, GROUPS, EPS).square().sum(), inputs[0], create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), [inputs[i] for i in wanted])

    inputs = [t.requires_grad_(i in wanted) for i, t in enumerate(leaves((1, *SHAPE[1:])))]
    got = penalty(group_norm_silu, *inputs)
    reference = penalty(group_norm_silu_ref, *inputs)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    want = penalty(group_norm_silu_ref, *wide)
    for mine, other, truth in zip(got, reference, want, strict=True):
        bound = max(32 * ROUNDOFF[torch.float32], 1.5 * relative_error(other, truth))
        assert relative_error(mine, truth) < bound


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_of_other_groups_and_images_stay_clean(value: float) -> None:
    inputs = leaves()
    grad = torch.randn(SHAPE)
    clean = torch.autograd.grad(group_norm_silu(*inputs, GROUPS), inputs, grad)
    with torch.no_grad():
        inputs[0][0, 1, 2, 2] = value
    dx, dw, db = torch.autograd.grad(group_norm_silu(*inputs, GROUPS), inputs, grad)
    assert dx[0, :2].isnan().any()
    assert dw[:2].isnan().any()
    assert (dx[0, 2:] == clean[0][0, 2:]).all()
    assert (dx[1] == clean[0][1]).all()
    assert (dw[2:] == clean[1][2:]).all()
    assert (db[2:] == clean[2][2:]).all()


def test_residual_reaches_the_own_backward() -> None:
    x, weight, bias = leaves()
    residual = torch.randn_like(x).requires_grad_()
    grad, grad_total = torch.randn(SHAPE), torch.randn(SHAPE)
    y, total = add_group_norm_silu(x, residual, weight, bias, GROUPS)
    assert runs_own_backward(y)
    inputs = (x, residual, weight, bias)
    dx, dr, *rest = torch.autograd.grad((y, total), inputs, (grad, grad_total))
    assert (dx == dr).all()
    summed = (total.detach().requires_grad_(), weight, bias)
    assert_gradients((dx - grad_total, *rest), summed, grad, GROUPS)


def test_function_transforms_see_the_reference() -> None:
    x, weight, bias = (t.detach() for t in leaves())

    def loss(fn: Callable[..., Tensor], x: Tensor) -> Tensor:
        return fn(x, weight, bias, GROUPS, EPS).square().sum()

    got = torch.func.grad(lambda x: loss(group_norm_silu, x))(x)
    want = torch.func.grad(lambda x: loss(group_norm_silu_ref, x))(x)
    assert (got == want).all()
    many = torch.vmap(lambda x: group_norm_silu(x[None], weight, bias, GROUPS)[0])(x)
    assert_near(many, group_norm_silu(x, weight, bias, GROUPS), terms=2 * 67 * 64, scale=6.0)


def test_compiled_sees_the_reference() -> None:
    inputs = leaves()
    grad = torch.randn(SHAPE)
    y = torch.compile(group_norm_silu, fullgraph=True)(*inputs, GROUPS)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_near(y, group_norm_silu(*inputs, GROUPS), terms=2 * 67 * 64)
    assert_gradients(torch.autograd.grad(y, inputs, grad), inputs, grad, GROUPS)
