"""Wide transformer blocks in training on a CPU: less memory for activations, faster products.

Each Linear layer is one autograd function together with the LayerNorm or GELU before it. It keeps
that one's input alone, and forms norm or GELU again in the backward. Attention by plain
products keeps queries, keys and values alone, likewise (attention.py).

Products take their weights in oneDNN's own layout, made of the master weights in each pass: oneDNN
would do the same inside of every plain product, and slower.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titok_fast.attention import attend, keep_mask
from titok_fast.blocks import Attention, PostNormBlock, PreNormBlock


def make_lean(block: PreNormBlock | PostNormBlock) -> None:
    """Replace a block's forward, in place; parameters and results stay as they are.

    Args:
        block: on the CPU, with float32 parameters; runs in float32 or under bfloat16 autocast.
    """
    forward: Callable[..., Tensor] = _pre_norm if isinstance(block, PreNormBlock) else _post_norm
    block.forward = partial(forward, block)  # type: ignore[method-assign]


def _pre_norm(block: PreNormBlock, x: Tensor, skip: Tensor | None = None) -> Tensor:
    if block.skip_linear is not None:
        assert skip is not None
        x = _product(torch.cat([x, skip], dim=-1), block.skip_linear)
    x = x + _mixed(block.attn, _product(x, block.attn.qkv, norm=block.norm1))
    return x + _product(_product(x, block.mlp.fc1, norm=block.norm2), block.mlp.fc2, gelu=True)


def _post_norm(block: PostNormBlock, x: Tensor) -> Tensor:
    h = _mixed(block.attn, _product(x, block.attn.qkv))
    x = block.norm1(_dropped(h, block.dropout) + x)
    h = _product(_product(x, block.mlp.fc1), block.mlp.fc2, gelu=True)
    return block.norm2(_dropped(h, block.dropout) + x)


def _dropped(x: Tensor, dropout: nn.Dropout) -> Tensor:
    if not (dropout.training and dropout.p):
        return x
    return x * keep_mask(x.shape, dropout.p, x.device) * (1 / (1 - dropout.p))


def _mixed(attn: Attention, qkv: Tensor) -> Tensor:
    qkv = qkv.unflatten(-1, (3, attn.heads, -1))
    dropout = attn.dropout if attn.training else 0.0
    return _product(attend(qkv, attn.backend, dropout), attn.proj)


def _product(
    x: Tensor, linear: nn.Linear, *, norm: nn.LayerNorm | None = None, gelu: bool = False
) -> Tensor:
    """(..., D) -> (..., E): the linear layer of x, of norm(x) or of GELU(x)."""
    dtype = linear.weight.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    after = (norm.weight, norm.bias, norm.eps) if norm is not None else (None, None, 0.0)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _Product.apply(rows, linear.weight, linear.bias, *after, gelu, dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (R, D)
        weight: Tensor,  # (E, D)
        bias: Tensor | None,  # (E,)
        norm_weight: Tensor | None,  # (D,)
        norm_bias: Tensor | None,  # (D,)
        eps: float,
        gelu: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.given = x.dtype
        if norm_weight is None and not gelu:
            x = x.to(dtype)  # before it is kept
        ctx.save_for_backward(x, weight, norm_weight, norm_bias)
        ctx.eps, ctx.gelu, ctx.dtype = eps, gelu, dtype
        h = F.gelu(x) if gelu else x
        if norm_weight is not None:
            h = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        return _times(h.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm_weight, norm_bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        h = F.gelu(x) if ctx.gelu else x
        statistics: list[Tensor] = []
        if norm_weight is not None:
            h, *statistics = torch.native_layer_norm(
                x, x.shape[-1:], norm_weight, norm_bias, ctx.eps
            )
        g_weight = (grad.t() @ h.to(ctx.dtype)).to(weight.dtype) if needs[1] else None
        g_bias = grad.sum(0).to(weight.dtype) if needs[2] else None
        del h
        if not any((needs[0], needs[3], needs[4])):
            return None, g_weight, g_bias, *[None] * 5
        g = _times(grad, weight.to(ctx.dtype).t(), None)
        if ctx.gelu:  # whose input another product made, of the same dtype
            g = torch.ops.aten.gelu_backward(g, x)
        if norm_weight is None:
            return g.to(ctx.given), g_weight, g_bias, *[None] * 5
        mask = [needs[0], needs[3], needs[4]]
        given = torch.ops.aten.native_layer_norm_backward(
            g.to(x.dtype), x, x.shape[-1:], *statistics, norm_weight, norm_bias, mask
        )
        return given[0], g_weight, g_bias, given[1], given[2], None, None, None


def _times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(R, D), (E, D), (E,) -> x @ weight.T + bias, all of one dtype."""
    if not packs(x.dtype):
        return F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), len(x))
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this dtype on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
