"""Wide transformer blocks in training on a CPU: less memory for activations, faster products.

Each Linear layer is one autograd function together with what comes before it: a LayerNorm, GELU or
attention by plain products. It keeps that one's input alone, and forms its result again in the
backward; a norm whose result is the residual as well gives both. An MLP behind a LayerNorm is one
function as a whole: its inner rows, four times as wide as x, would be a third of all that is kept,
and forming them again takes a ninth of the products.

Products take their weights in oneDNN's own layout, made of the master weights in each pass: oneDNN
would do the same inside of every plain product, and slower.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titok_fast.models.attention import (
    attend,
    attended,
    attended_backward,
    drop_mask,
    dropped,
)
from titok_fast.models.blocks import Attention, PostNormBlock, PreNormBlock


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
    norm, fc1, fc2 = block.norm2, block.mlp.fc1, block.mlp.fc2
    own = (norm.weight, norm.bias, fc1.weight, fc1.bias)
    return x + _Product.apply(_Widened(norm.eps, _dtype(fc1.weight)), x, fc2.weight, fc2.bias, *own)


def _post_norm(block: PostNormBlock, x: Tensor) -> Tensor:
    h = _mixed(block.attn, _product(x, block.attn.qkv))
    norm, fc1, x = block.norm1, block.mlp.fc1, _dropped(h, block.dropout) + x
    own = (norm.weight, norm.bias)
    x, h = _Product.apply(_NormedToo(norm.eps), x, fc1.weight, fc1.bias, *own)
    h = _product(h, block.mlp.fc2, gelu=True)
    return block.norm2(_dropped(h, block.dropout) + x)


def _dropped(x: Tensor, dropout: nn.Dropout) -> Tensor:
    return dropped(x, *drop_mask(x.shape, dropout.p if dropout.training else 0.0, x.device))


def _mixed(attn: Attention, qkv: Tensor) -> Tensor:
    B, L, _ = qkv.shape
    qkv = qkv.unflatten(-1, (3, attn.heads, -1))
    dropout = attn.dropout if attn.training else 0.0
    if attn.backend != "products":
        return _product(attend(qkv, attn.backend, dropout), attn.proj)
    kept, factor = drop_mask((B, attn.heads, L, L), dropout, qkv.device)
    return _Product.apply(_Attended(factor), qkv, attn.proj.weight, attn.proj.bias, kept)


def _product(
    x: Tensor, linear: nn.Linear, *, norm: nn.LayerNorm | None = None, gelu: bool = False
) -> Tensor:
    """(..., D) -> (..., E): the linear layer of x, of norm(x) or of GELU(x)."""
    if norm is not None:
        own = (norm.weight, norm.bias)
        return _Product.apply(_Normed(norm.eps), x, linear.weight, linear.bias, *own)
    if gelu:
        return _Product.apply(_Gelu(), x, linear.weight, linear.bias)
    # cast here: what is kept is the narrower
    return _Product.apply(_Same(), x.to(_dtype(linear.weight)), linear.weight, linear.bias)


def _dtype(weight: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return weight.dtype


class _Before(Protocol):
    """What is done to x before a product, with parameters of its own."""

    def __call__(self, x: Tensor, *own: Any) -> Tensor:
        """(..., D), the product's input."""

    def back(
        self, grad: Tensor, needs: list[bool], x: Tensor, *own: Any
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The same again, and from its gradient those of x and of the parameters."""


class _Same:
    def __call__(self, x: Tensor) -> Tensor:
        return x

    def back(self, grad: Tensor, needs: list[bool], x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return x, [grad]


class _Gelu:
    def __call__(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def back(self, grad: Tensor, needs: list[bool], x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return F.gelu(x), [torch.ops.aten.gelu_backward(grad, x)]


class _Normed(NamedTuple):
    eps: float

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    def back(
        self, grad: Tensor, needs: list[bool], x: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        D = x.shape[-1:]
        h, mean, rstd = torch.native_layer_norm(x, D, weight, bias, self.eps)
        return h, torch.ops.aten.native_layer_norm_backward(
            grad.to(x.dtype), x, D, mean, rstd, weight, bias, needs
        )


class _NormedToo(_Normed):
    """A norm whose result is wanted beside the product."""


class _Widened(NamedTuple):
    """GELU of a linear layer of a LayerNorm."""

    eps: float
    dtype: torch.dtype  # of the product

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, wide: Tensor, wide_bias: Tensor
    ) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:], weight, bias, self.eps).to(self.dtype)
        return F.gelu(_times(h, wide.to(self.dtype), wide_bias.to(self.dtype)))

    def back(
        self,
        grad: Tensor,
        needs: list[bool],
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        wide: Tensor,
        wide_bias: Tensor,
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        D, low = x.shape[-1:], wide.to(self.dtype)
        h, mean, rstd = torch.native_layer_norm(x, D, weight, bias, self.eps)
        h = h.to(self.dtype)
        a = _times(h, low, wide_bias.to(self.dtype))
        to_a = torch.ops.aten.gelu_backward(grad, a)
        to_h = _times(to_a, low.t(), None).to(x.dtype)
        of_norm = torch.ops.aten.native_layer_norm_backward(
            to_h, x, D, mean, rstd, weight, bias, needs[:3]
        )
        return F.gelu(a), [*of_norm, *_of_linear(to_a, h, wide, needs[3:])]


class _Attended(NamedTuple):
    factor: float

    def __call__(self, qkv: Tensor, kept: Tensor | None) -> Tensor:
        return attended(qkv, kept, self.factor).flatten(2)

    def back(
        self, grad: Tensor, needs: list[bool], qkv: Tensor, kept: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        heads = grad.unflatten(-1, qkv.shape[-2:])
        out, made = attended_backward(heads, qkv, kept, self.factor)
        return out.flatten(2), [made, None]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, before: _Before, x: Tensor, weight: Tensor, bias: Tensor | None, *own: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, *own)
        ctx.before, ctx.dtype = before, _dtype(weight)
        h, low = before(x, *own), None if bias is None else bias.to(ctx.dtype)
        y = _times(h.to(ctx.dtype), weight.to(ctx.dtype), low)
        return (h, y) if isinstance(before, _NormedToo) else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *of_h, grad = grads  # of_h: where h was returned as well
        x, weight, *own = ctx.saved_tensors
        _, to_x, to_weight, to_bias, *to_own = ctx.needs_input_grad
        given: Sequence[Tensor | None] = [None] * (1 + len(own))
        h = None
        if to_x or any(to_own):
            g = sum(of_h, start=_times(grad, weight.to(ctx.dtype).t(), None))
            h, given = ctx.before.back(g, [to_x, *to_own], x, *own)
        elif to_weight:
            h = ctx.before(x, *own)
        of_linear = _of_linear(grad, h, weight, [to_weight, to_bias])
        return None, given[0], *of_linear, *given[1:]


def _of_linear(
    grad: Tensor, x: Tensor | None, weight: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """The gradients of a linear layer's weight and bias, from its result's and its input."""
    to_weight = to_bias = None
    grad = grad.flatten(0, -2)
    if needs[0]:
        assert x is not None
        to_weight = (grad.t() @ x.to(grad.dtype).flatten(0, -2)).to(weight.dtype)
    if needs[1]:
        to_bias = grad.sum(0).to(weight.dtype)
    return [to_weight, to_bias]


def _times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., D), (E, D), (E,) -> x @ weight.T + bias, all of one dtype."""
    if not packs(x.dtype):
        return F.linear(x, weight, bias)
    rows = x.numel() // weight.shape[1]
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this dtype on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
