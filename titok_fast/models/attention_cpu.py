"""Attention back end "products": whole matmuls with the (L, L) weights in memory, for CPUs.

SDPA's CPU kernels work on blocks, which is slow in bfloat16; a few hundred positions need no
blocks. Computes weights of a few images at a time, which fit the cache, in the dtype of qkv.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CACHED_BYTES = 6 << 20  # of weights at once: fresh memory costs more than the work


def attend_by_matmul(qkv: Tensor, dropout: float) -> Tensor:
    """(B, L, 3, H, d) -> (B, L, H, d), with dropout on the attention weights."""
    B, L, _, H, _ = qkv.shape
    return _MatmulAttention.apply(qkv, *dropout_mask((B, H, L, L), dropout, qkv.device))


def dropout_mask(
    shape: Sequence[int], dropout: float, device: torch.device
) -> tuple[Tensor | None, float]:
    """Draw the arguments of `apply_dropout`: a mask, True where a value stays, and the scale.

    The mask is None where dropout is 0. True has probability 1 - dropout, to 2**-17: one 64-bit
    number decides four values. On a CPU NumPy, whose generator is faster, draws them from a seed
    that torch draws.
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
    mask = numbers[:count] >= round(dropout * 2**16) - 2**15
    return mask.view(*shape), 1 / (1 - dropout)


def apply_dropout(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Zero x where the mask is False, and scale the rest."""
    # as numbers: a CPU multiplies by booleans four times as slowly
    return x if mask is None else x * mask.view(torch.uint8) * scale


class _MatmulAttention(torch.autograd.Function):
    """Saves qkv and the dropout mask; recomputes the weights in backward."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(qkv, mask)
        ctx.scale = scale
        return matmul_attention(qkv, mask, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        qkv, mask = ctx.saved_tensors
        return matmul_attention_backward(grad, qkv, mask, ctx.scale)[1], None, None


def matmul_attention(qkv: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, L, 3, H, d), and the (B, H, L, L) mask and scale of `dropout_mask` -> (B, L, H, d)."""
    parts = []
    for part, kept in _split(qkv, mask):
        _, _, v, weights = _weights(part)
        parts.append(torch.matmul(apply_dropout(weights, kept, scale), v).transpose(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def matmul_attention_backward(
    grad: Tensor, qkv: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The recomputed result of `matmul_attention`, and the gradient of qkv from the result's."""
    out, grad_qkv, start = torch.empty_like(grad), torch.empty_like(qkv), 0
    for part, kept in _split(qkv, mask):
        at = slice(start, start + len(part))
        q, k, v, weights = _weights(part)
        dropped = apply_dropout(weights, kept, scale)
        out[at].transpose(1, 2).copy_(torch.matmul(dropped, v))
        grad_out = grad[at].transpose(1, 2).contiguous()
        grad_q, grad_k, grad_v = grad_qkv[at].permute(2, 0, 3, 1, 4)
        grad_v.copy_(torch.matmul(dropped.transpose(-1, -2), grad_out))
        g = apply_dropout(torch.matmul(grad_out, v.transpose(-1, -2)), kept, scale)
        g = torch.ops.aten._softmax_backward_data(g, weights, -1, weights.dtype)
        grad_q.copy_(torch.matmul(g, k)).mul_(q.shape[-1] ** -0.5)
        grad_k.copy_(torch.matmul(g.transpose(-1, -2), q))
        start = at.stop
    return out, grad_qkv


def _split(qkv: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Parts of the batch whose weights fit the cache."""
    B, L, _, H, _ = qkv.shape
    size = max(1, _CACHED_BYTES // max(1, H * L * L * qkv.element_size()))
    for start in range(0, max(B, 1), size):
        at = slice(start, start + size)
        yield qkv[at], None if mask is None else mask[at]


def _weights(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled queries, keys and values, each (B, H, L, d), and the (B, H, L, L) weights."""
    # heads outermost in memory: the matmuls then read their operands in order
    q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
    q = q * q.shape[-1] ** -0.5
    return q, k, v, torch.softmax(torch.matmul(q, k.transpose(-1, -2)), dim=-1)
