"""soft_codes against softmax and matmul in float64."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from calls import DTYPES, cases, leaf, relative_error
from hypothesis import strategies as st
from support.tolerances import ROUNDOFF, assert_near
from torch import Tensor

from titok_fast.kernels.soft_codes import soft_codes, soft_codes_ref

INF = float("inf")


def exact(logits: Tensor, codebook: Tensor) -> Tensor:
    # by definition the table is read in the logits' dtype
    return torch.softmax(logits.double(), dim=-1) @ codebook.to(logits.dtype).double()


@cases(
    M=st.integers(0, 70),
    K=st.integers(1, 200),
    C=st.one_of(st.sampled_from((1, 16, 256)), st.integers(1, 100)),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from((0.0, 1.0, 30.0)),
    forbidden=st.booleans(),
)
def test_kernel_against_float64(device: torch.device, case: SimpleNamespace) -> None:
    logits = (case.spread * torch.randn(case.M, case.K)).to(device, case.dtype)
    if case.forbidden:
        # whole tiles of -inf come before the one finite logit
        logits[:, :-1] = -INF
    codebook = torch.randn(case.K, case.C).to(device)
    got = soft_codes(logits, codebook)
    assert got.dtype == case.dtype
    # the error of exp is the difference of logits times its roundoff
    assert_near(got, exact(logits, codebook), terms=case.K, scale=1 + case.spread)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [7, 4100])
def test_published_width(device: torch.device, M: int, dtype: torch.dtype) -> None:
    """1024 codes of 256 channels in small tiles; large tiles, which start at 4097 rows."""
    K, C = (1024, 256) if M == 7 else (70, 20)
    logits = torch.randn(M, K, device=device).to(dtype)
    codebook = torch.randn(K, C, device=device)
    assert_near(soft_codes(logits, codebook), exact(logits, codebook), terms=K)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_against_float64(dtype: torch.dtype) -> None:
    logits, codebook = torch.randn(50, 1024).to(dtype), torch.randn(1024, 256)
    assert_near(soft_codes_ref(logits, codebook), exact(logits, codebook), terms=1024)


@pytest.mark.parametrize("path", [soft_codes, soft_codes_ref])
@pytest.mark.parametrize("value", [1e30, -1e30, 1e-40, INF, -INF, float("nan")])
def test_extreme_rows(device: torch.device, value: float, path: Callable[..., Tensor]) -> None:
    logits, codebook = torch.randn(5, 70, device=device), torch.randn(70, 8, device=device)
    want = path(logits, codebook)
    logits[2, :3] = value
    logits[3] = value
    got = path(logits, codebook)
    assert_near(got, exact(logits, codebook), terms=70)
    assert (got[[0, 1, 4]] == want[[0, 1, 4]]).all()
    assert got[3].isnan().all() == (abs(value) == INF or value != value)


def test_one_certain_code_is_copied(device: torch.device) -> None:
    codebook = torch.randn(100, 8, device=device)
    logits = torch.full((3, 100), -INF, device=device)
    logits[range(3), [0, 50, 99]] = 2.0
    assert (soft_codes(logits, codebook) == codebook[[0, 50, 99]]).all()


def test_strides(device: torch.device) -> None:
    logits = torch.randn(40, 6, device=device).T
    codebook = torch.randn(40, 18, device=device)[:, ::2]
    assert_near(soft_codes(logits, codebook), exact(logits, codebook), terms=40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(device: torch.device, dtype: torch.dtype) -> None:
    logits = torch.randn(9, 90, device=device).to(dtype).requires_grad_()
    codebook = torch.randn(90, 20, device=device).requires_grad_()
    weight = torch.randn(9, 20, device=device).to(dtype)
    got = torch.autograd.grad(soft_codes(logits, codebook), (logits, codebook), weight)
    wide = (logits.detach().double().requires_grad_(), codebook.detach().double().requires_grad_())
    want = torch.autograd.grad(torch.softmax(wide[0], -1) @ wide[1], wide, weight.double())
    for mine, theirs, name in zip(got, want, ("logits", "codebook"), strict=True):
        assert mine.dtype == (dtype if name == "logits" else torch.float32)
        # in half precision inputs, probabilities and results are rounded
        assert relative_error(mine, theirs) < 4 * ROUNDOFF[dtype], name


def test_second_derivatives(device: torch.device) -> None:
    logits, codebook = leaf(4, 9, device=device), leaf(9, 3, device=device)

    def second(path: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(path(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    wide = [x.detach().double().requires_grad_() for x in (logits, codebook)]
    pairs = zip(second(soft_codes, logits, codebook), second(soft_codes_ref, *wide), strict=True)
    for mine, theirs in pairs:
        assert_near(mine, theirs, terms=9, scale=float(theirs.abs().max()))


def test_reference_gradcheck() -> None:
    logits, codebook = leaf(3, 7, dtype=torch.float64), leaf(7, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(soft_codes_ref, (logits, codebook))


def test_autocast_is_ignored(interpreted: None) -> None:
    logits, codebook = torch.randn(5, 70), torch.randn(70, 8)
    for path in (soft_codes, soft_codes_ref):
        want = path(logits, codebook)
        with torch.autocast("cpu", torch.bfloat16):
            assert (path(logits, codebook) == want).all()


@pytest.mark.gpu
def test_a_table_of_more_than_2_31_numbers(device: torch.device) -> None:
    K, C = 2**20 + 1, 2048
    codebook = torch.zeros(K, C, dtype=torch.bfloat16, device=device)
    codebook[-1] = torch.arange(C, device=device)
    logits = torch.full((1, K), -INF, dtype=torch.bfloat16, device=device)
    logits[0, -1] = 0
    assert torch.equal(soft_codes(logits, codebook)[0], codebook[-1])
