"""What lies between two 8-bit products on a CPU: each in one pass over memory.

The passes are a C++ file that needs no headers but the language's own. The user's compiler makes a
library of it in a second, once per machine: later processes load what lies in the cache folder. It
shares PyTorch's threads. Where there is no compiler, or it makes nothing that loads, the same is
done in PyTorch operations: their `_ref` here is also what each pass must compute.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from titok_fast.backends.compile_cache import folder_of_compiled
from titok_fast.kernels.group_norm_silu import group_norm_silu

SYMMETRIC = 128  # the zero of uint8 for values of both signs
GELU_MIN, SILU_MIN = -0.17, -0.2785  # lower bounds of exact GELU (-0.16997) and SiLU (-0.27846)

_SOURCE = Path(__file__).with_name("cpu_int8_ops.cpp")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wno-psabi")
# what torch means by these names, no more: a home may be shared by several kinds of processor
_PROCESSOR_FLAGS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_PASSES = (
    "quantize_rows", "gelu_quantize_rows", "dequantize_rows", "quantize_image",
    "norm_silu_quantize",
)  # fmt: skip

Pass = Callable[..., None]


@lru_cache(maxsize=1)
def passes() -> dict[tuple[str, torch.dtype], Pass] | None:
    """The compiled passes by name and dtype, or None where they cannot be had."""
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.CalledProcessError):
        return None
    table: dict[tuple[str, torch.dtype], Pass] = {}
    for name in _PASSES:
        for dtype, suffix in _NAMES.items():
            function = getattr(library, f"{name}_{suffix}")
            function.restype = None
            table[name, dtype] = function
    return table


def warn_without_compiler() -> None:
    """Say that the passes run as PyTorch operations, if they do, to the caller of `compile`."""
    if passes() is None:
        warnings.warn(
            "no C++ compiler makes the passes of int8, so they run in PyTorch operations, slower: "
            "install g++, or name a compiler in CXX",
            stacklevel=5,
        )


def _built() -> Path:
    """The library, compiled unless it lies in the cache folder."""
    flags = (*_FLAGS, *_PROCESSOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()))
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(source + " ".join(flags).encode()).hexdigest()[:16]
    folder = folder_of_compiled() or Path(tempfile.mkdtemp(prefix="titok_fast_"))
    library = folder / f"titok_fast_passes_{key}.so"
    if not library.exists():
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        if compiler is None:
            raise FileNotFoundError("no C++ compiler")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            parts = [Path(work) / "passes.o", Path(work) / "passes.so"]
            # linked without OpenMP's library: PyTorch has loaded one, and two would fight
            for command in (
                (*flags, "-c", str(_SOURCE), "-o", str(parts[0])),
                ("-shared", str(parts[0]), "-o", str(parts[1])),
            ):
                subprocess.run((compiler, *command), check=True, capture_output=True)
            parts[1].replace(library)
    return library


def _call(name: str, dtype: torch.dtype, *args: Tensor | int | float) -> None:
    table = passes()
    assert table is not None
    table[name, dtype](*map(_for_c, args))


def _for_c(value: Tensor | int | float) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_long(value)


def _has(x: Tensor) -> bool:
    return x.is_cpu and x.dtype in _NAMES and passes() is not None


def quantize_rows_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `quantize_rows` must compute."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / 127
    return ((x.float() / scale).round() + SYMMETRIC).to(torch.uint8), scale


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(R, D) float -> (R, D) uint8 with zero at 128, (R, 1) float32 scales."""
    if not _has(x):
        return quantize_rows_ref(x)
    x = x.contiguous()
    rows, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 1)
    _call("quantize_rows", x.dtype, x, rows, scale, *x.shape)
    return rows, scale


def gelu_quantize_rows_ref(y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What `gelu_quantize_rows` must compute."""
    x = y.float() * scale + bias
    # GELU(x) < x, and nearly x where it is largest: its own maximum would want it computed twice
    scale = (x.amax(dim=1, keepdim=True).clamp(min=0.0) - GELU_MIN) / 255
    return ((F.gelu(x) - GELU_MIN) * (1.0 / scale)).round().to(torch.uint8), scale


def gelu_quantize_rows(y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize GELU(y * scale + bias), with GELU_MIN at 0.

    Args:
        y: (R, D).
        scale: (R, 1) float32.
        bias: (D,) float32.

    Returns:
        (R, D) uint8 and (R, 1) float32 scales.
    """
    if not _has(y):
        return gelu_quantize_rows_ref(y, scale, bias)
    y = y.contiguous()
    rows, new = torch.empty(y.shape, dtype=torch.uint8), torch.empty(len(y), 1)
    _call("gelu_quantize_rows", y.dtype, y, scale, bias, GELU_MIN, rows, new, *y.shape)
    return rows, new


def dequantize_rows_(y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """(R, E) * (R, 1) + (E,), in float32, in place of y."""
    if not _has(y) or not y.is_contiguous():
        return y.copy_(y.float() * scale + bias)
    _call("dequantize_rows", y.dtype, y, scale, bias, *y.shape)
    return y


def _step(low: float, high: float) -> tuple[float, int]:
    """Size of a step of uint8 over a range that holds 0, and what stands for 0."""
    step = max((high - low) / 255, 1e-12)
    return step, round(-low / step)


def _quantized(x: Tensor, step: float, zero: int) -> Tensor:
    return ((x.float() / step).round() + zero).clamp(0, 255).to(torch.uint8)


def quantize_image_ref(x: Tensor) -> tuple[Tensor, float, int]:
    """What `quantize_image` must compute."""
    step, zero = _step(min(float(x.amin()), 0.0), max(float(x.amax()), 0.0))
    return _quantized(x, step, zero), step, zero


def quantize_image(x: Tensor) -> tuple[Tensor, float, int]:
    """(1, C, H, W) float -> uint8, channels-last; size of a step, and what stands for 0."""
    if not _has(x):
        return quantize_image_ref(x)
    x = x.contiguous(memory_format=torch.channels_last)
    q, steps = torch.empty_like(x, dtype=torch.uint8), torch.empty(2)
    _call("quantize_image", x.dtype, x, x.numel(), q, steps)
    return q, *_read(steps)


def norm_silu_quantize_ref(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, float, int]:
    """What `norm_silu_quantize` must compute."""
    y = group_norm_silu(x.float(), weight, bias, groups, eps)
    step, zero = _step(SILU_MIN, max(float(y.amax()), 0.0))
    return _quantized(y, step, zero), step, zero


def norm_silu_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, float, int]:
    """`quantize_image` of group_norm_silu of one image, over a range that starts at SILU_MIN.

    Without a rounding in between; no gradient.

    Args:
        x: (1, C, H, W).
        weight: (C,) float32.
        bias: (C,) float32.
        groups: number of groups, a divisor of C.
        eps: added to the variance.

    Returns:
        (1, C, H, W) uint8, channels-last; size of a step, and what stands for 0.
    """
    if not _has(x):
        return norm_silu_quantize_ref(x, weight, bias, groups, eps)
    x = x.contiguous(memory_format=torch.channels_last)
    q, steps = torch.empty_like(x, dtype=torch.uint8), torch.empty(2)
    _call(
        "norm_silu_quantize", x.dtype, x, weight, bias, groups, eps, x.shape[2] * x.shape[3],
        x.shape[1], SILU_MIN, q, steps,
    )  # fmt: skip
    return q, *_read(steps)


def _read(steps: Tensor) -> tuple[float, int]:
    step, zero = steps.tolist()
    return step, int(zero)
