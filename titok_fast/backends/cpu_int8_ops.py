"""Fused elementwise steps between int8 matmuls on a CPU.

Each reads and writes memory once. The user's compiler builds cpu_int8_ops.cpp, which needs no
PyTorch headers, in a second, once per machine; later processes load the library from the cache
folder. It shares PyTorch's threads. Without a working compiler each op runs as the PyTorch
operations of its `_ref`, which also define the results of the compiled ones.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from titok_fast.backends.compile_cache import cache_dir
from titok_fast.kernels.group_norm_silu import group_norm_silu
from titok_fast.processor.rates import FORMATS

SYMMETRIC = 128  # the zero of uint8 for values of both signs
GELU_MIN, SILU_MIN = -0.17, -0.2785  # lower bounds of exact GELU (-0.16997) and SiLU (-0.27846)

_SOURCE = Path(__file__).with_name("cpu_int8_ops.cpp")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wno-psabi")
# not -march=native: several kinds of processor may share a home
_PROCESSOR_FLAGS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
}


@lru_cache(maxsize=1)
def compiled_ops() -> ctypes.CDLL | None:
    """The library of compiled ops, or None if it cannot be built or loaded."""
    try:
        return ctypes.CDLL(str(_library()))
    except (OSError, subprocess.CalledProcessError):
        return None


def warn_without_compiler() -> None:
    """Warn the caller of `compile` if the ops of int8 run as PyTorch operations."""
    if compiled_ops() is None:
        warnings.warn(
            "no C++ compiler builds the ops of int8, so they run as PyTorch operations, slower: "
            "install g++, or name a compiler in CXX",
            stacklevel=5,
        )


def _library() -> Path:
    """The library, compiled unless the cache folder has it."""
    flags = (*_FLAGS, *_PROCESSOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()))
    key = hashlib.sha256(_SOURCE.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    folder = cache_dir() or Path(tempfile.mkdtemp(prefix="titok_fast_"))
    library = folder / f"titok_fast_int8_{key}.so"
    if not library.exists():
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        if compiler is None:
            raise FileNotFoundError("no C++ compiler")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            compiled, linked = f"{work}/ops.o", f"{work}/ops.so"
            # linked without OpenMP's library: PyTorch has loaded one, and two would fight
            for command in (
                (*flags, "-c", str(_SOURCE), "-o", compiled),
                ("-shared", compiled, "-o", linked),
            ):
                subprocess.run((compiler, *command), check=True, capture_output=True)
            Path(linked).replace(library)
    return library


def _call(name: str, dtype: torch.dtype, *args: Tensor | int | float | None) -> None:
    function = getattr(compiled_ops(), f"{name}_{FORMATS[dtype]}")
    function.restype = None
    function(*map(_for_c, args))


def _for_c(value: Tensor | int | float | None) -> object:
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_long(value)


def _row_op(name: str, x: Tensor, *args: Tensor | float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    rows, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 1)
    _call(name, x.dtype, x, *args, rows, scale, *x.shape)
    return rows, scale


def _image_op(name: str, x: Tensor, *args: Tensor | int | float) -> tuple[Tensor, float, int]:
    x = x.contiguous(memory_format=torch.channels_last)
    q, steps = torch.empty_like(x, dtype=torch.uint8), torch.empty(2)
    _call(name, x.dtype, x, *args, q, steps)
    step, zero = steps.tolist()
    return q, step, int(zero)


def _runs_compiled(x: Tensor) -> bool:
    return x.is_cpu and x.dtype in FORMATS and compiled_ops() is not None


def quantize_rows_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """Definition of `quantize_rows`."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / 127
    return ((x.float() / scale).round() + SYMMETRIC).to(torch.uint8), scale


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(R, D) float -> (R, D) uint8 with zero at 128, (R, 1) float32 scales."""
    if not _runs_compiled(x):
        return quantize_rows_ref(x)
    return _row_op("quantize_rows", x)


def gelu_quantize_rows_ref(y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Definition of `gelu_quantize_rows`."""
    x = y.float() * scale + bias
    # GELU(x) < x, and nearly x where it is largest: its own maximum would take computing it twice
    scale = (x.amax(dim=1, keepdim=True).clamp(min=0.0) - GELU_MIN) / 255
    return ((F.gelu(x) - GELU_MIN) * (1.0 / scale)).round().to(torch.uint8), scale


def gelu_quantize_rows(y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize GELU(y * scale + bias), with GELU_MIN at 0: (R, D) uint8, (R, 1) float32 scales.

    y is (R, D), scale (R, 1) float32, bias (D,) float32.
    """
    if not _runs_compiled(y):
        return gelu_quantize_rows_ref(y, scale, bias)
    return _row_op("gelu_quantize_rows", y, scale, bias, GELU_MIN)


def dequantize_rows(y: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, E) * (R, 1) + (E,), computed in float32, of this dtype; in y where it is y's own."""
    own = y if y.dtype == dtype else torch.empty_like(y, dtype=dtype)
    if not _runs_compiled(y) or not y.is_contiguous() or dtype not in FORMATS:
        return own.copy_(y.float() * scale + bias)
    wide, narrow = (own, None) if dtype == torch.float32 else (None, own)
    _call("dequantize_rows", y.dtype, y, wide, narrow, scale, bias, *y.shape)
    return own


def _step(low: float, high: float) -> tuple[float, int]:
    """The step of uint8 over a range that holds 0, and the byte that stands for 0."""
    step = max((high - low) / 255, 1e-12)
    return step, round(-low / step)


def _quantized(x: Tensor, step: float, zero: int) -> Tensor:
    return ((x.float() / step).round() + zero).clamp(0, 255).to(torch.uint8)


def quantize_image_ref(x: Tensor) -> tuple[Tensor, float, int]:
    """Definition of `quantize_image`."""
    step, zero = _step(min(float(x.amin()), 0.0), max(float(x.amax()), 0.0))
    return _quantized(x, step, zero), step, zero


def quantize_image(x: Tensor) -> tuple[Tensor, float, int]:
    """(1, C, H, W) float -> uint8, channels-last; the step, and the byte that stands for 0."""
    if not _runs_compiled(x):
        return quantize_image_ref(x)
    return _image_op("quantize_image", x, x.numel())


def norm_silu_quantize_ref(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, float, int]:
    """Definition of `norm_silu_quantize`."""
    y = group_norm_silu(x.float(), weight, bias, groups, eps)
    step, zero = _step(SILU_MIN, max(float(y.amax()), 0.0))
    return _quantized(y, step, zero), step, zero


def norm_silu_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, float, int]:
    """`quantize_image` of `group_norm_silu`, not rounded in between; the range starts at SILU_MIN.

    weight and bias are (C,) float32.
    """
    if not _runs_compiled(x):
        return norm_silu_quantize_ref(x, weight, bias, groups, eps)
    C, pixels = x.shape[1], x.shape[2] * x.shape[3]
    norm = weight, bias, groups, eps
    return _image_op("norm_silu_quantize", x, *norm, pixels, C, SILU_MIN)
