"""One attention call, four back ends: torch SDPA, plain products, flash-attn, xformers.

SDPA is the default: on CUDA it runs flash kernels itself. The name comes from an argument, else
from the environment variable TITOK_FAST_ATTENTION, else it is "sdpa". "auto" takes the first back
end that works here and agrees with SDPA on a small input. A named back end that cannot work raises.

"products" keeps whole (L, L) matrices of weights, of a few pictures at a time, rounded to the dtype
of qkv. It is for CPUs: SDPA's blocks are slow there in bfloat16, and a few hundred positions need
none.

There is no kernel of our own for the short sequences: beside SDPA's 64 x 64 kernels the most it
could save is 4 % of a block, by `python bench/attention_floor.py`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BACKENDS = ("sdpa", "products", "flash", "xformers")
ENVIRONMENT = "TITOK_FAST_ATTENTION"
_CACHED_BYTES = 6 << 20  # of weights at once by "products": fresh memory costs more than the work


class BackendError(RuntimeError):
    """A named attention back end cannot work here; the message says why."""


def backend_name(requested: str | None) -> str:
    """The back end asked for by argument or environment, "sdpa" if by neither.

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
    """Full self-attention, scale head_dim**-0.5.

    Args:
        qkv: (B, L, 3, H, d) queries, keys and values.
        backend: one of BACKENDS or "auto".
        dropout: probability on attention weights; 0 outside training.

    Returns:
        (B, L, H * d) in qkv's dtype.

    Raises:
        BackendError: the back end cannot handle this device or dtype.
    """
    if backend == "auto":
        backend = _first_working(qkv.device.type, qkv.dtype, qkv.shape[-1])
    if backend == "sdpa":
        out = _sdpa(qkv, dropout)
    elif backend == "products":
        out = _products(qkv, dropout)
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


def _products(qkv: Tensor, dropout: float) -> Tensor:
    """(B, L, 3, H, d) -> (B, L, H, d)."""
    B, L, _, H, _ = qkv.shape
    return _Products.apply(qkv, *drop_mask((B, H, L, L), dropout, qkv.device))


def drop_mask(
    shape: Sequence[int], dropout: float, device: torch.device
) -> tuple[Tensor | None, float]:
    """What dropout keeps, for `dropped`: a mask, or None where it is 0, and the factor of the rest.

    True has a probability of 1 - dropout, to 2**-17. One number of 64 bits decides four times. On a
    CPU they are NumPy's, which has the faster generator, from a seed that torch's draws.
    """
    if not dropout:
        return None, 1.0
    count = prod(shape)
    words = -(-count // 4)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        numbers = torch.from_numpy(np.random.SFC64(seed).random_raw(words).view(np.int16))
    else:
        wide = torch.empty(words, dtype=torch.int64, device=device).random_(-(2**63), None)
        numbers = wide.view(torch.int16)
    kept = numbers[:count] >= round(dropout * 2**16) - 2**15
    return kept.view(*shape), 1 / (1 - dropout)


def dropped(x: Tensor, kept: Tensor | None, factor: float) -> Tensor:
    """Zero all that `drop_mask` does not keep, and scale the rest."""
    # as numbers: a CPU multiplies by booleans four times as slowly
    return x if kept is None else x * kept.view(torch.uint8) * factor


class _Products(torch.autograd.Function):
    """`attended`, of which qkv and the mask are kept."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, kept: Tensor | None, factor: float) -> Tensor:
        ctx.save_for_backward(qkv, kept)
        ctx.factor = factor
        return attended(qkv, kept, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        qkv, kept = ctx.saved_tensors
        return attended_backward(grad, qkv, kept, ctx.factor)[1], None, None


def attended(qkv: Tensor, kept: Tensor | None, factor: float) -> Tensor:
    """Attention by plain products, a few pictures at a time, to stay in the cache.

    Args:
        qkv: (B, L, 3, H, d).
        kept: of `drop_mask`, for weights (B, H, L, L).
        factor: the same.

    Returns:
        (B, L, H, d).
    """
    parts = []
    for part, mask in _in_parts(qkv, kept):
        _, _, v, weights = _weights(part)
        parts.append(torch.matmul(dropped(weights, mask, factor), v).transpose(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attended_backward(
    grad: Tensor, qkv: Tensor, kept: Tensor | None, factor: float
) -> tuple[Tensor, Tensor]:
    """`attended` again, and the gradient of qkv from that of its result."""
    out, made, start = torch.empty_like(grad), torch.empty_like(qkv), 0
    for part, mask in _in_parts(qkv, kept):
        at = slice(start, start + len(part))
        q, k, v, weights = _weights(part)
        left = dropped(weights, mask, factor)
        out[at].transpose(1, 2).copy_(torch.matmul(left, v))
        g_out = grad[at].transpose(1, 2).contiguous()
        to_q, to_k, to_v = made[at].permute(2, 0, 3, 1, 4)
        to_v.copy_(torch.matmul(left.transpose(-1, -2), g_out))
        g = dropped(torch.matmul(g_out, v.transpose(-1, -2)), mask, factor)
        g = torch.ops.aten._softmax_backward_data(g, weights, -1, weights.dtype)
        to_q.copy_(torch.matmul(g, k)).mul_(q.shape[-1] ** -0.5)
        to_k.copy_(torch.matmul(g.transpose(-1, -2), q))
        start = at.stop
    return out, made


def _in_parts(qkv: Tensor, kept: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    B, L, _, H, _ = qkv.shape
    size = max(1, _CACHED_BYTES // max(1, H * L * L * qkv.element_size()))
    for start in range(0, max(B, 1), size):
        at = slice(start, start + size)
        yield qkv[at], None if kept is None else kept[at]


def _weights(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled queries, keys, values, each (B, H, L, d), and softmax of their products."""
    # heads outermost in memory: the products then read their operands in order
    q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
    q = q * q.shape[-1] ** -0.5
    return q, k, v, torch.softmax(torch.matmul(q, k.transpose(-1, -2)), dim=-1)


@lru_cache
def _load(backend: str) -> Callable[..., Tensor]:
    """The package's function. A namespace can exist without it (flash-attn-4 alone), so look."""
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
            continue  # "auto" means: the next one
    return "sdpa"


def agrees_with_sdpa(backend: str, device_type: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Numeric self-test on 33 positions, the published sequence length least kind to tiles."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 33, 3, 2, head_dim, generator=generator).to(device_type, dtype)
    got, want = attend(qkv, backend).float(), attend(qkv.float(), "sdpa")
    # outputs are averages of unit normals: 2 % absolute is 4 to 5 roundings in bfloat16
    return bool((got - want).abs().max() < (1e-4 if dtype == torch.float32 else 0.02))
