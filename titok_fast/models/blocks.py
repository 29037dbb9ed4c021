"""Transformer blocks: one attention and one MLP, arranged in the two ways the published models use.

Parameter names here are the project's own; weights.py knows upstream's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast.models.attention import attend, backend_name


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection: rows of q, then k, then v."""

    def __init__(self, D: int, heads: int, *, qkv_bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout, self.backend = heads, dropout, "sdpa"
        self.qkv = nn.Linear(D, 3 * D, bias=qkv_bias)
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.heads, D // self.heads)
        return self.proj(attend(qkv, self.backend, self.dropout if self.training else 0.0))


class Mlp(nn.Module):
    """Linear, exact GELU (the tanh form changes logits), Linear."""

    def __init__(self, D: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D, hidden)
        self.fc2 = nn.Linear(hidden, D)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class PreNormBlock(nn.Module):
    """Block of the tokenizer's ViTs and of U-ViT; with `skip` it first merges a long skip."""

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
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PostNormBlock(nn.Module):
    """BERT's block: normalise after each residual sum, eps 1e-12 (statistics in float32)."""

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
        x = self.norm1(self.dropout(self.attn(x)) + x)
        return self.norm2(self.dropout(self.mlp(x)) + x)


def set_attention(module: nn.Module, backend: str | None) -> None:
    """Set the attention back end of every block inside `module`; see `backend_name`."""
    name = backend_name(backend)
    for part in module.modules():
        if isinstance(part, Attention):
            part.backend = name
