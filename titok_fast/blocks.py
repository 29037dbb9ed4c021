"""Transformer blocks: one attention and one MLP, arranged in the two ways the published models use.

Parameter names here are the project's own; checkpoint.py knows upstream's.

A block with `recompute` keeps for the backward what matrix products made (queries, keys and values,
the MLP's hidden layer) and the residual stream, and forms the rest again: norms, GELU, attention,
and the low-precision copies of weights. That is 9 widths per token instead of 16 and more.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titok_fast.attention import attend, backend_name


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection: rows of q, then k, then v."""

    def __init__(self, D: int, heads: int, *, qkv_bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout, self.backend = heads, dropout, "sdpa"
        self.qkv = nn.Linear(D, 3 * D, bias=qkv_bias)
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.mix(self.qkv(x))

    def mix(self, qkv: Tensor) -> Tensor:
        """What follows the fused projection: (B, L, 3 D) -> (B, L, D)."""
        B, L, D = qkv.shape
        qkv = qkv.view(B, L, 3, self.heads, D // (3 * self.heads))
        return self.proj(attend(qkv, self.backend, self.dropout if self.training else 0.0))


class Mlp(nn.Module):
    """Linear, exact GELU (the tanh form changes logits), Linear."""

    def __init__(self, D: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D, hidden)
        self.fc2 = nn.Linear(hidden, D)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.close(self.fc1(x))

    def close(self, x: Tensor) -> Tensor:
        """What follows the first layer: (..., hidden) -> (..., D)."""
        return self.fc2(F.gelu(x))


class PreNormBlock(nn.Module):
    """Block of the tokenizer's ViTs and of U-ViT; with `skip` it first merges a long skip."""

    recompute = False

    def __init__(
        self, D: int, heads: int, hidden: int, *, qkv_bias: bool = True, skip: bool = False
    ) -> None:
        super().__init__()
        self.skip_linear = nn.Linear(2 * D, D) if skip else None
        self.norm1 = nn.LayerNorm(D)
        self.attn = Attention(D, heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = Mlp(D, hidden)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, L, D), and another (B, L, D) where the block merges a skip -> (B, L, D)."""
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))  # current first: weights expect it
        if self.recompute and torch.is_grad_enabled():
            x = x + _again(self.attn.mix, _again(self._project, x))
            return x + _again(self.mlp.close, _again(self._widen, x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _project(self, x: Tensor) -> Tensor:
        return self.attn.qkv(self.norm1(x))

    def _widen(self, x: Tensor) -> Tensor:
        return self.mlp.fc1(self.norm2(x))


class PostNormBlock(nn.Module):
    """BERT's block: normalise after each residual sum, eps 1e-12 (statistics in float32)."""

    recompute = False

    def __init__(
        self, D: int, heads: int, hidden: int, *, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.attn = Attention(D, heads, dropout=attention_dropout)
        self.norm1 = nn.LayerNorm(D, eps=1e-12)
        self.mlp = Mlp(D, hidden)
        self.norm2 = nn.LayerNorm(D, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        if self.recompute and torch.is_grad_enabled():
            x = self.norm1(self.dropout(_again(self.attn.mix, _again(self.attn.qkv, x))) + x)
            return self.norm2(self.dropout(_again(self.mlp.close, _again(self.mlp.fc1, x))) + x)
        x = self.norm1(self.dropout(self.attn(x)) + x)
        return self.norm2(self.dropout(self.mlp(x)) + x)


def _again(work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`work(x)`, of which only `x` is kept: the backward works again, up to its last operation.

    That one is a matrix product, which is not formed twice: torch stops where all inputs are there.
    """
    kind = x.device.type
    bf16, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    # its cache would hold a cast copy of every weight until the last block is done
    with torch.autocast(kind, dtype, enabled=bf16, cache_enabled=False):
        return checkpoint(work, x, use_reentrant=False)


def set_attention(module: nn.Module, backend: str | None) -> None:
    """Choose the attention back end of every block inside `module`.

    Args:
        module: a model.
        backend: "sdpa", "flash", "xformers", "auto"; None reads TITOK_FAST_ATTENTION, else "sdpa".

    Raises:
        ValueError: unknown name.
        BackendError: the package behind the name cannot be used.
    """
    name = backend_name(backend)
    for part in module.modules():
        if isinstance(part, Attention):
            part.backend = name
