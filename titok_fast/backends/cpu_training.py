"""Wide transformer blocks in training on a CPU: fewer saved activations, faster matmuls.

Each Linear and the op before it form one autograd function that saves only that op's input and
recomputes its output in backward. The op is a LayerNorm, GELU or attention by matmuls; behind a
LayerNorm it is all of an MLP up to its second Linear, whose wide rows would be a third of all
saved activations and cost a ninth of the matmuls to recompute.

Weights are reordered into oneDNN's own layout in each pass: inside a plain matmul oneDNN does the
same, but slower.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titok_fast.models.attention import attend
from titok_fast.models.attention_cpu import (
    apply_dropout,
    dropout_mask,
    matmul_attention,
    matmul_attention_backward,
)
from titok_fast.models.blocks import Attention, PostNormBlock, PreNormBlock

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
Grads = Sequence[Tensor | None]


def recompute_in_backward(block: PreNormBlock | PostNormBlock) -> None:
    """Replace the forward of a block on the CPU, in place; parameters and results do not change.

    For float32 parameters, in float32 or under bfloat16 autocast.
    """
    forward: Callable[..., Tensor] = _pre_norm if isinstance(block, PreNormBlock) else _post_norm
    block.forward = partial(forward, block)  # type: ignore[method-assign]


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next update; False if the C library cannot.

    An update allocates and frees gigabytes of gradients and activations. glibc would return them to
    the system and take fresh pages of 4 KiB for the next, which under a hypervisor takes a good
    part of the update's time. Peak memory is the same, except for fragmentation.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def _pre_norm(block: PreNormBlock, x: Tensor, skip: Tensor | None = None) -> Tensor:
    if block.skip_linear is not None:
        assert skip is not None
        x = _linear(torch.cat([x, skip], dim=-1), block.skip_linear)
    norm, qkv = block.norm1, block.attn.qkv
    x = x + _attention(block.attn, _op_linear(_LayerNorm(norm.eps), x, qkv, *norm.parameters()))
    norm, fc1, fc2 = block.norm2, block.mlp.fc1, block.mlp.fc2
    op = _NormLinearGelu(norm.eps, _dtype(fc1.weight))
    return x + _op_linear(op, x, fc2, *norm.parameters(), *fc1.parameters())


def _post_norm(block: PostNormBlock, x: Tensor) -> Tensor:
    h = _attention(block.attn, _linear(x, block.attn.qkv))
    x = _dropout(h, block.dropout) + x
    op = _LayerNorm(block.norm1.eps, returned=True)
    x, h = _op_linear(op, x, block.mlp.fc1, *block.norm1.parameters())
    h = _op_linear(_Gelu(), h, block.mlp.fc2)
    return block.norm2(_dropout(h, block.dropout) + x)


def _dropout(x: Tensor, dropout: nn.Dropout) -> Tensor:
    p = dropout.p if dropout.training else 0.0
    return apply_dropout(x, *dropout_mask(x.shape, p, x.device))


def _attention(attn: Attention, qkv: Tensor) -> Tensor:
    """Attention and its output projection."""
    B, L, _ = qkv.shape
    qkv = qkv.unflatten(-1, (3, attn.heads, -1))
    p = attn.dropout if attn.training else 0.0
    if attn.backend != "products":
        return _linear(attend(qkv, attn.backend, p), attn.proj)
    mask, scale = dropout_mask((B, attn.heads, L, L), p, qkv.device)
    return _op_linear(_Attention(scale), qkv, attn.proj, mask)


def _linear(x: Tensor, linear: nn.Linear) -> Tensor:
    # cast here, so that the narrower tensor is saved
    return _op_linear(_Identity(), x.to(_dtype(linear.weight)), linear)


def _op_linear(op: "_Op", x: Tensor, linear: nn.Linear, *rest: Tensor | None) -> Any:
    return _OpLinear.apply(op, x, linear.weight, linear.bias, *rest)


def _dtype(weight: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return weight.dtype


class _Op(Protocol):
    """The op before a Linear: (..., D) x and the tensors it needs besides -> (..., D)."""

    def __call__(self, x: Tensor, /, *rest: Any) -> Tensor: ...

    def back(
        self, grad: Tensor, needs: list[bool], x: Tensor, /, *rest: Any
    ) -> tuple[Tensor, Grads]:
        """The result, recomputed, and from its gradient those of x and the other tensors."""


class _Identity:
    def __call__(self, x: Tensor) -> Tensor:
        return x

    def back(self, grad: Tensor, needs: list[bool], x: Tensor) -> tuple[Tensor, Grads]:
        return x, [grad]


class _Gelu:
    def __call__(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def back(self, grad: Tensor, needs: list[bool], x: Tensor) -> tuple[Tensor, Grads]:
        return F.gelu(x), [torch.ops.aten.gelu_backward(grad, x)]


class _LayerNorm(NamedTuple):
    eps: float
    returned: bool = False  # beside the Linear's result: the residual needs it too

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    def back(
        self, grad: Tensor, needs: list[bool], x: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Grads]:
        D = x.shape[-1:]
        h, mean, rstd = torch.native_layer_norm(x, D, weight, bias, self.eps)
        return h, torch.ops.aten.native_layer_norm_backward(
            grad.to(x.dtype), x, D, mean, rstd, weight, bias, needs
        )


class _NormLinearGelu(NamedTuple):
    eps: float
    dtype: torch.dtype  # of the matmul

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, wide: Tensor, wide_bias: Tensor
    ) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:], weight, bias, self.eps).to(self.dtype)
        return F.gelu(_matmul(h, wide.to(self.dtype), wide_bias.to(self.dtype)))

    def back(
        self, grad: Tensor, needs: list[bool], x: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Grads]:
        weight, bias, wide, wide_bias = rest
        D, low = x.shape[-1:], wide.to(self.dtype)
        h, mean, rstd = torch.native_layer_norm(x, D, weight, bias, self.eps)
        h = h.to(self.dtype)
        a = _matmul(h, low, wide_bias.to(self.dtype))
        grad_a = torch.ops.aten.gelu_backward(grad, a)
        grad_h = _matmul(grad_a, low.t(), None).to(x.dtype)
        norm_grads = torch.ops.aten.native_layer_norm_backward(
            grad_h, x, D, mean, rstd, weight, bias, needs[:3]
        )
        return F.gelu(a), [*norm_grads, *_linear_grads(grad_a, h, wide, needs[3:])]


class _Attention(NamedTuple):
    scale: float

    def __call__(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        return matmul_attention(qkv, mask, self.scale).flatten(2)

    def back(
        self, grad: Tensor, needs: list[bool], qkv: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Grads]:
        heads = grad.unflatten(-1, qkv.shape[-2:])
        out, grad_qkv = matmul_attention_backward(heads, qkv, mask, self.scale)
        return out.flatten(2), [grad_qkv, None]


class _OpLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, op: _Op, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, *rest)
        ctx.op, ctx.dtype = op, _dtype(weight)
        h, low = op(x, *rest), None if bias is None else bias.to(ctx.dtype)
        y = _matmul(h.to(ctx.dtype), weight.to(ctx.dtype), low)
        return (h, y) if isinstance(op, _LayerNorm) and op.returned else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *grads_h, grad = grads  # grads_h: one if h was returned as well, else none
        x, weight, *rest = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, *needs_rest = ctx.needs_input_grad
        op_grads: Grads = [None] * (1 + len(rest))
        h = None
        if needs_x or any(needs_rest):
            grad_h = sum(grads_h, start=_matmul(grad, weight.to(ctx.dtype).t(), None))
            h, op_grads = ctx.op.back(grad_h, [needs_x, *needs_rest], x, *rest)
        elif needs_weight:
            h = ctx.op(x, *rest)
        linear_grads = _linear_grads(grad, h, weight, [needs_weight, needs_bias])
        return None, op_grads[0], *linear_grads, *op_grads[1:]


def _linear_grads(
    grad: Tensor, x: Tensor | None, weight: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of a Linear's weight and bias, from that of its result and from its input."""
    grad_weight = grad_bias = None
    grad = grad.flatten(0, -2)
    if needs[0]:
        assert x is not None
        grad_weight = (grad.t() @ x.to(grad.dtype).flatten(0, -2)).to(weight.dtype)
    if needs[1]:
        grad_bias = grad.sum(0).to(weight.dtype)
    return [grad_weight, grad_bias]


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., D), (E, D), (E,) -> x @ weight.T + bias, all of one dtype."""
    if not has_onednn_matmul(x.dtype):
        return F.linear(x, weight, bias)
    rows = x.numel() // weight.shape[1]
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), reordered, bias, "none", [], "")


def has_onednn_matmul(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this dtype on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
