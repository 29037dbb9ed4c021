"""Attention by one of four back ends: torch's SDPA, plain matmuls, flash-attn, xformers.

SDPA is the default: on CUDA it runs flash kernels itself. The name comes from an argument, else
from the environment variable TITOK_FAST_ATTENTION, else it is "sdpa". "products" is for CPUs
(attention_cpu.py). "auto" takes the first back end that works here and agrees with SDPA on a small
input. A named back end that cannot work raises an error.

There is no kernel of our own for the short sequences: beside SDPA's 64 x 64 kernels the most it
could save is 4 % of a block (docs/design.md).
"""

import os
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from titok_fast.models.attention_cpu import attend_by_matmul

BACKENDS = ("sdpa", "products", "flash", "xformers")
ENVIRONMENT = "TITOK_FAST_ATTENTION"


class BackendError(RuntimeError):
    """A named attention back end cannot work here; the message says why."""


def backend_name(requested: str | None) -> str:
    """The back end named by the argument, else by the environment, else "sdpa".

    Raises:
        ValueError: a name that does not exist.
        BackendError: the package behind a named back end cannot be used.
    """
    name = requested or os.environ.get(ENVIRONMENT) or "sdpa"
    if name not in (*BACKENDS, "auto"):
        known = ", ".join((*BACKENDS, "auto"))
        raise ValueError(f"unknown attention back end {name!r}; known: {known}")
    if name in ("flash", "xformers"):
        _load(name)
    return name


def attend(qkv: Tensor, backend: str = "sdpa", dropout: float = 0.0) -> Tensor:
    """Full self-attention, scale d**-0.5: (B, L, 3, H, d) q, k and v -> (B, L, H * d).

    `dropout` is the probability on attention weights.

    Raises:
        BackendError: the back end cannot handle this device or dtype.
    """
    if backend == "auto":
        backend = _first_working(qkv.device.type, qkv.dtype, qkv.shape[-1])
    if backend == "sdpa":
        out = _sdpa(qkv, dropout)
    elif backend == "products":
        out = attend_by_matmul(qkv, dropout)
    else:
        _check(backend, qkv.device.type, qkv.dtype)
        if backend == "flash":
            out = _load("flash")(qkv, dropout_p=dropout)
        else:
            q, k, v = qkv.unbind(2)
            out = _load("xformers")(q, k, v, p=dropout)
    return out.flatten(2)


def _sdpa(qkv: Tensor, dropout: float) -> Tensor:
    """(B, L, 3, H, d) -> (B, L, H, d)."""
    # a CPU's 16-bit backward takes up to five times as long as that of float32, and rounds more
    if qkv.is_cpu and qkv.requires_grad and qkv.element_size() == 2 and not dropout:
        with torch.autocast("cpu", enabled=False):
            return _sdpa(qkv.float(), dropout).to(qkv.dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, L, d)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)


@lru_cache
def _load(backend: str) -> Callable[..., Tensor]:
    """The package's function; importing the package alone proves too little (flash-attn-4)."""
    try:
        if backend == "flash":
            from flash_attn import flash_attn_qkvpacked_func as function
        else:
            from xformers.ops import memory_efficient_attention as function
    except ImportError as error:
        extra = "flash-attn" if backend == "flash" else "xformers"
        raise BackendError(
            f"attention back end {backend!r} needs the package {extra} "
            f"(pip install 'titok_fast[{backend}]'): {error}"
        ) from error
    return function


def _check(backend: str, device_type: str, dtype: torch.dtype) -> None:
    if device_type != "cuda":
        raise BackendError(
            f"attention back end {backend!r} runs on CUDA only; the tensors are on {device_type}. "
            "Use 'sdpa'"
        )
    if backend == "flash" and dtype not in (torch.float16, torch.bfloat16):
        raise BackendError(
            f"attention back end 'flash' wants float16 or bfloat16; got {dtype}. Use 'sdpa'"
        )


@lru_cache
def _first_working(device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    for backend in ("flash", "xformers"):
        try:
            _check(backend, device_type, dtype)
            if agrees_with_sdpa(backend, device_type, dtype, head_dim):
                return backend
        except (BackendError, RuntimeError, NotImplementedError, ValueError):
            continue
    return "sdpa"


def agrees_with_sdpa(backend: str, device_type: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Numeric self-test on 33 positions, the published sequence length that fits tiles worst."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 33, 3, 2, head_dim, generator=generator).to(device_type, dtype)
    got, want = attend(qkv, backend).float(), attend(qkv.float(), "sdpa")
    # outputs are averages of unit normals: 2 % absolute is 4 to 5 roundings in bfloat16
    return bool((got - want).abs().max() < (1e-4 if dtype == torch.float32 else 0.02))
