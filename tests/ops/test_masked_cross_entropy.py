"""masked_cross_entropy against PyTorch's cross-entropy in float64."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from calls import DTYPES, cases, leaf, relative_error
from hypothesis import strategies as st
from support.tolerances import ROUNDOFF, assert_near
from torch import Tensor

from titok_fast.kernels.masked_cross_entropy import masked_cross_entropy, masked_cross_entropy_ref

INF = float("inf")
# the package re-exports the function under the name of its file
module = importlib.import_module("titok_fast.kernels.masked_cross_entropy")
on_cpu = importlib.import_module("titok_fast.kernels._masked_cross_entropy_cpu")


def inputs(R: int, N: int, D: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    hidden, weight, bias = (leaf(*shape, device=device) for shape in ((R, D), (N, D), (N,)))
    targets = torch.randint(N, (R,), device=device)
    weights = torch.where(torch.rand(R, device=device) < 0.5, 1.0, 0.1)
    return hidden, weight, bias, targets, weights


def exact(*args: Tensor, smoothing: float = 0.1) -> Tensor:
    hidden, weight, bias, targets, weights = args
    logits = hidden.double() @ weight.double().T + bias.double()
    ce = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    return (weights.double() * ce).sum() / (weights.double().sum() + 1e-8)


def widened(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@cases(
    R=st.integers(0, 20),
    N=st.integers(1, 300),
    D=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from((1.0, 1e-39)),
    transposed=st.booleans(),
    chunk=st.sampled_from((1, 700, 1 << 24)),
    smoothing=st.sampled_from((0.0, 0.1, 0.9)),
)
def test_kernel_against_float64(device: torch.device, case: SimpleNamespace) -> None:
    R, N, D, dtype, smoothing = case.R, case.N, case.D, case.dtype, case.smoothing
    hidden, weight, bias, targets, weights = inputs(R, N, D, device)
    hidden = (
        (hidden.detach() * (case.size / D**0.5)).to(dtype).requires_grad_()
    )  # logits of about 1
    leaves = (hidden, weight, bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_ELEMENTS", case.chunk)
        laid = [x.T.contiguous().T if case.transposed else x for x in (hidden, weight)]
        got = masked_cross_entropy(*laid, bias, targets, weights, smoothing)
        grads = torch.autograd.grad(3 * got, leaves)
    wide = widened(hidden, weight.to(dtype), bias)
    want = exact(*wide, targets, weights, smoothing=smoothing)
    assert got.dtype == torch.float32
    mine_theirs = zip(grads, torch.autograd.grad(3 * want, wide), leaves, strict=True)
    if dtype == torch.float32:
        assert_near(got, want, terms=D, scale=2.0)
        for mine, theirs, _ in mine_theirs:
            # the gradient inherits the error of a logit, a sum of D terms
            assert_near(mine, theirs, terms=D * (N + R), scale=3.0)
        return
    # logits, their gradients (which may cancel) and the matmuls of these are rounded once each
    assert abs(got.item() - want.item()) < 8 * ROUNDOFF[dtype]
    for (mine, theirs, like), cancels in zip(mine_theirs, (D**0.5, 1.0, 1.0), strict=True):
        assert mine.dtype == like.dtype
        error = float((mine.double() - theirs).norm())
        assert error <= 8 * ROUNDOFF[dtype] * (float(theirs.norm()) + cancels)


def test_more_codes_than_a_block(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ascending logits: every block of codes moves the running maximum."""
    monkeypatch.setattr(module, "_MAX_BLOCK", 32)
    hidden, weight, _, *rest = inputs(6, 300, 8, device)
    leaves = (hidden, weight, torch.linspace(-9, 9, 300, device=device).requires_grad_())
    wide = widened(*leaves)
    got, want = masked_cross_entropy(*leaves, *rest), exact(*wide, *rest)
    assert_near(got, want, terms=8, scale=9.0)
    grads = torch.autograd.grad(2 * got, leaves)
    for mine, theirs in zip(grads, torch.autograd.grad(2 * want, wide), strict=True):
        assert_near(mine, theirs, terms=8 * 300, scale=3.0)


@pytest.mark.parametrize("path", [masked_cross_entropy, masked_cross_entropy_ref])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_precision(
    device: torch.device, dtype: torch.dtype, path: Callable[..., Tensor]
) -> None:
    """A float32 head is cast to the half precision of the hidden states."""
    hidden, weight, bias, targets, weights = inputs(40, 500, 64, device)
    hidden = (hidden.detach() / 8).to(dtype).requires_grad_()
    got = path(hidden, weight, bias, targets, weights)
    wide = widened(hidden, weight.to(dtype), bias)
    want = exact(*wide, targets, weights)
    # one rounding of each logit, here about 1 in size; a mean of many
    assert abs(got.item() - want.item()) < 4 * ROUNDOFF[dtype] + 1e-5
    leaves = (hidden, weight, bias)
    grads = torch.autograd.grad(got, leaves), torch.autograd.grad(want, wide)
    for mine, theirs, like in zip(*grads, leaves, strict=True):
        assert mine.dtype == like.dtype
        assert relative_error(mine, theirs) < 8 * ROUNDOFF[dtype] + 1e-5


@pytest.mark.parametrize("chunk", [1, 700, 1 << 24])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("factor", [1, 3])
def test_on_cpu_against_float64(
    factor: int, chunk: int, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_cpu, "_CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(on_cpu, "_BLOCK_ELEMENTS", chunk // 3)
    args = inputs(37, 101, 16)
    got = masked_cross_entropy(*args, label_smoothing=smoothing)
    assert "CpuLoss" in type(got.grad_fn).__name__
    wide = widened(*args[:3])
    want = exact(*wide, *args[3:], smoothing=smoothing)
    assert_near(got, want, terms=16, scale=4)
    grads = torch.autograd.grad(factor * got, args[:3])
    for mine, theirs in zip(grads, torch.autograd.grad(factor * want, wide), strict=True):
        assert_near(mine, theirs, terms=37, scale=4)


def test_on_cpu_bfloat16_is_as_near_as_autograd() -> None:
    args = inputs(64, 300, 32)
    wide = widened(*args[:3])
    want = torch.autograd.grad(exact(*wide, *args[3:]), wide)
    with torch.autocast("cpu", torch.bfloat16):
        mine = torch.autograd.grad(masked_cross_entropy(*args), args[:3])
        low = [args[0].bfloat16(), *args[1:]]
        theirs = torch.autograd.grad(masked_cross_entropy_ref(*low), args[:3])
    for got, plain, exactly in zip(mine, theirs, want, strict=True):
        assert got.dtype == torch.float32
        assert (got - exactly).norm() <= 1.05 * (plain - exactly).norm()


def test_on_cpu_float16_keeps_small_gradients() -> None:
    hidden, weight, bias, targets, _ = inputs(4000, 300, 8)
    args = hidden.detach().half().requires_grad_(), weight, bias, targets, torch.ones(4000)
    wide = widened(args[0], weight.half(), bias)
    want = torch.autograd.grad(exact(*wide, *args[3:]), wide)
    grads = torch.autograd.grad(masked_cross_entropy(*args), args[:3])
    for mine, theirs in zip(grads, want, strict=True):
        assert relative_error(mine, theirs) < 0.02


def test_on_cpu_gradcheck() -> None:
    hidden, weight, bias, targets, weights = inputs(5, 7, 3)
    torch.autograd.gradcheck(
        lambda *x: masked_cross_entropy(*x, targets, weights.double()),
        widened(hidden, weight, bias),
    )


def test_on_cpu_keeps_no_logits() -> None:
    args, kept = inputs(512, 1000, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda _: None):
        masked_cross_entropy(*args)
    assert max(kept) == 1000 * 8  # the head's gradient


def test_float64_is_not_rounded(device: torch.device) -> None:
    """The kernel's numbers are float32."""
    args = inputs(5, 7, 3, device)
    wide = widened(*args[:3])
    got, want = masked_cross_entropy(*wide, *args[3:]), exact(*wide, *args[3:])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    mine, theirs = torch.autograd.grad(got, wide), torch.autograd.grad(want, wide)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_second_derivative_is_refused(op_device: torch.device) -> None:
    """A gradient treated as a constant would be silently wrong."""
    args = inputs(5, 7, 3, op_device)
    loss = masked_cross_entropy(*args)
    for total in (loss, loss * args[0].sum()):
        with pytest.raises(RuntimeError, match=r"masked_cross_entropy is once differentiable"):
            torch.autograd.grad(total, args[:3], create_graph=True, retain_graph=True)


def test_function_transforms_see_the_reference() -> None:
    hidden, *rest = inputs(5, 7, 3)
    got = torch.func.grad(lambda h: masked_cross_entropy(h, *rest))(hidden.detach())
    want = torch.autograd.grad(masked_cross_entropy_ref(hidden, *rest), hidden)[0]
    assert_near(got, want, terms=7)


def test_reference_gradcheck() -> None:
    hidden, weight, bias, targets, weights = inputs(5, 7, 3)
    assert torch.autograd.gradcheck(
        lambda h, w, b: masked_cross_entropy_ref(h, w, b, targets, weights),
        widened(hidden, weight, bias),
    )


@pytest.mark.parametrize("path", [masked_cross_entropy, masked_cross_entropy_ref])
def test_nothing_counts(device: torch.device, path: Callable[..., Tensor]) -> None:
    hidden, weight, bias, targets, _ = inputs(5, 7, 3, device)
    loss = path(hidden, weight, bias, targets, torch.zeros(5, device=device))
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight, bias)))


@pytest.mark.parametrize("path", [masked_cross_entropy, masked_cross_entropy_ref])
def test_forbidden_code(device: torch.device, path: Callable[..., Tensor]) -> None:
    """A bias of -inf gives probability 0, and an infinite loss only with smoothing."""
    hidden, weight, bias, targets, weights = inputs(5, 7, 3, device)
    bias.data[3] = -INF
    targets[:] = 2
    assert path(hidden, weight, bias, targets, weights, 0.1).item() == INF
    plain = path(hidden, weight, bias, targets, weights, 0.0)
    wide = widened(hidden, weight, bias)
    want = exact(*wide, targets, weights, smoothing=0.0)
    assert_near(plain, want, terms=3, scale=3.0)
    mine = torch.autograd.grad(plain, bias)[0]
    assert mine[3] == 0
    assert_near(mine, torch.autograd.grad(want, wide[2])[0], terms=15)


@pytest.mark.parametrize("bad", [-1, 7, -100, 2**40])
def test_unknown_target(device: torch.device, bad: int) -> None:
    hidden, weight, bias, targets, weights = inputs(5, 7, 3, device)
    targets[1] = bad
    assert masked_cross_entropy(hidden, weight, bias, targets, weights).isnan()


@pytest.mark.parametrize("bad", [-1, 7, -100, 2**40])
def test_unknown_target_on_cpu(bad: int) -> None:
    hidden, weight, bias, targets, weights = inputs(5, 7, 3)
    targets[1] = bad
    for states in (hidden, hidden.detach()):
        with pytest.raises(ValueError, match=rf"targets in \[0, 7\); got {bad} at \[1\]"):
            masked_cross_entropy(states, weight, bias, targets, weights)


def test_large_logits(device: torch.device) -> None:
    hidden, weight, bias, targets, weights = inputs(9, 300, 8, device)
    hidden = hidden.detach() * 1e4
    got = masked_cross_entropy(hidden, weight, bias, targets, weights)
    assert_near(got, exact(hidden, weight, bias, targets, weights), terms=8, scale=1e5)


def test_without_gradients(device: torch.device) -> None:
    args = inputs(9, 30, 8, device)
    want = masked_cross_entropy(*args)
    with torch.no_grad():
        got = masked_cross_entropy(*args)
    assert not got.requires_grad
    assert got == want


def test_strides(device: torch.device) -> None:
    hidden, weight, bias, targets, weights = inputs(9, 30, 8, device)
    want = masked_cross_entropy(hidden, weight, bias, targets, weights)
    spread = [torch.stack([t.detach(), t.detach()], dim=-1)[..., 0] for t in (bias, weights)]
    twice = torch.stack([targets, targets], dim=1)[:, 0]
    got = masked_cross_entropy(
        hidden.T.contiguous().T, weight.T.contiguous().T, spread[0], twice, spread[1]
    )
    assert_near(got, want, terms=8)


def test_autocast_sets_the_precision_of_the_head(interpreted: None) -> None:
    hidden, weight, bias, targets, weights = inputs(9, 30, 8)
    want = masked_cross_entropy(hidden.bfloat16(), weight, bias, targets, weights)
    with torch.autocast("cpu", torch.bfloat16):
        got = masked_cross_entropy(hidden, weight, bias, targets, weights)
    assert got == want
    assert torch.autograd.grad(got, hidden)[0].dtype == torch.float32
