"""The fused ops between int8 matmuls: against their definitions, and how they are compiled."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.processes import output_of
from torch import Tensor

from titok_fast.backends import cpu_int8_ops as ops
from titok_fast.backends.compile_cache import VARIABLE
from titok_fast.backends.cpu_int8 import int8_layers
from titok_fast.backends.cpu_int8_ops import (
    GELU_MIN,
    SILU_MIN,
    dequantize_rows,
    gelu_quantize_rows,
    gelu_quantize_rows_ref,
    norm_silu_quantize,
    norm_silu_quantize_ref,
    quantize_image,
    quantize_image_ref,
    quantize_rows,
    quantize_rows_ref,
)
from titok_fast.kernels.group_norm_silu import group_norm_silu

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 1), (9, 33), (3, 16), (17, 4096), (0, 8))
IMAGES = ((64, 1, 1), (32, 5, 7), (96, 33, 40), (512, 16, 16), (128, 64, 64))


@pytest.fixture(autouse=True, params=["compiled", "eager"])
def _which(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, or as where there is no compiler."""
    if request.param == "eager":
        monkeypatch.setattr(ops, "compiled_ops", lambda: None)
    else:
        assert ops.compiled_ops() is not None


def image(C: int, H: int, W: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(C + H)
    x = torch.randn(1, C, H, W) * 2 + torch.randn(1, C, 1, 1)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def differ_by_a_rounding(a: Tensor, b: Tensor) -> None:
    """Numbers that lie halfway may go either way: few do, and by one."""
    off = (a.int() - b.int()).abs()
    assert int(off.max()) <= 1
    assert float(off.float().mean()) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_follow_the_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.logspace(-6, 6, shape[0])[:, None]).to(dtype)
    rows, scale = quantize_rows(x)
    want, want_scale = quantize_rows_ref(x)
    assert torch.equal(rows, want)
    assert torch.equal(scale, want_scale)
    bias = torch.randn(shape[1])
    for out in DTYPES:
        got = dequantize_rows(x.clone(), scale, bias, out)
        assert got.dtype == out
        near = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[out]
        torch.testing.assert_close(got.double(), x.double() * scale + bias, rtol=near, atol=near)
    if not len(x):
        return
    y, factor = (torch.randn(shape) * 50).to(dtype), torch.rand(shape[0], 1) / 10
    rows, scale = gelu_quantize_rows(y, factor, bias)
    want, want_scale = gelu_quantize_rows_ref(y, factor, bias)
    differ_by_a_rounding(rows, want)
    torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=1e-9)


def test_rows_are_quantized_to_half_a_step() -> None:
    x = torch.randn(9, 33) * torch.logspace(-6, 6, 9)[:, None]
    x[3] = 0.0
    rows, scale = quantize_rows(x)
    assert rows.dtype == torch.uint8
    back = (rows.float() - 128) * scale
    assert bool(((back - x).abs() <= 0.5001 * scale).all())
    assert bool((rows[3] == 128).all())
    assert torch.equal(quantize_rows(x[2:5])[0], rows[2:5])  # a row does not see its neighbours
    assert torch.equal(quantize_rows(x.T.contiguous().T)[0], rows)


def test_gelu_is_quantized_to_half_a_step() -> None:
    y, scale, bias = torch.randn(9, 65), torch.rand(9, 1) * 5, torch.randn(65)
    y[4] = -50.0  # GELU is 0 everywhere
    bias[0] = 0.0
    rows, step = gelu_quantize_rows(y, scale, bias)
    back = rows.float() * step + GELU_MIN
    want = F.gelu(y * scale + bias)
    assert bool(((back - want).abs() <= 0.501 * step).all())
    assert int(rows.max()) <= 255


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", IMAGES)
def test_images_quantize_to_half_a_step(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, w, b = image(*shape, dtype), torch.randn(shape[0]), torch.randn(shape[0])
    y = group_norm_silu(x.float(), w, b)
    for got, ref, values, low in (
        (quantize_image(x), quantize_image_ref(x), x.float(), float(x.amin().clamp(max=0))),
        (
            norm_silu_quantize(x, w, b, 32, 1e-6),
            norm_silu_quantize_ref(x, w, b, 32, 1e-6),
            y,
            SILU_MIN,
        ),
    ):
        q, step, zero = got
        assert zero == ref[2] == round(-low / step)
        assert step == pytest.approx(ref[1], rel=1e-4)
        differ_by_a_rounding(q, ref[0])
        # zero is rounded to a whole step, so that one end may be cut by half of one
        assert float(((q.float() - zero) * step - values).abs().max()) < 1.01 * step
    assert quantize_image(torch.zeros(1, 32, 2, 2))[1] == pytest.approx(1e-12)


def test_a_large_mean_costs_no_digits() -> None:
    x = image(64, 24, 24, torch.float32) + 1000
    w, b = torch.ones(64), torch.zeros(64)
    want = F.silu(torch.group_norm(x.double(), 32, w.double(), b.double(), 1e-6))
    if ops.compiled_ops() is None:
        pytest.skip("PyTorch's own normalisation does lose them")
    q, step, zero = norm_silu_quantize(x, w, b, 32, 1e-6)
    # zero is rounded to a whole step
    assert float(((q.double() - zero) * step - want).abs().max()) < 1.01 * step


def test_threads_change_nothing() -> None:
    x, w, b = image(128, 64, 64, torch.bfloat16), torch.randn(128), torch.randn(128)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(norm_silu_quantize(x, w, b, 32, 1e-6)[0])
    finally:
        torch.set_num_threads(before)
    if ops.compiled_ops() is not None:
        assert torch.equal(*results)


def test_without_a_compiler_int8_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if request.node.callspec.id == "compiled":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            int8_layers(torch.float32)
        return
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler .* CXX"):
        int8_layers(torch.float32)
    monkeypatch.undo()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    build = ops.compiled_ops.__wrapped__
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build() is None
    monkeypatch.setenv("CXX", "false")  # fails
    assert build() is None
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("CXX")
    assert build() is not None
    assert [p.suffix for p in tmp_path.iterdir()] == [".so"]
    monkeypatch.setenv("CXX", "false")
    assert build() is not None  # from the folder


def test_no_network_of_the_compiler_is_loaded() -> None:
    """Neither Dynamo nor Inductor: they take two seconds to import."""
    code = (
        "import sys, torch; from titok_fast.backends import cpu_int8_ops as ops;"
        "ops.quantize_rows(torch.ones(2, 3));"
        "assert ops.compiled_ops();"
        "assert not {'torch._dynamo', 'torch._inductor'} & set(sys.modules)"
    )
    output_of(code)
