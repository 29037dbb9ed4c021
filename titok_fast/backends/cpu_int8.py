"""Layers in 8-bit integers for inference on a CPU: oneDNN's products, twice bfloat16's speed.

Weights get one scale per output channel, once; activations one per token (per image in the pixel
decoder), at every call, so an image does not depend on its batch. Sums are exact in int32: without
VNNI, where pairs of products are added in 16 bits, weights take 64 in place of 127. Results leave
the products in the type that the processor writes faster. Those of GELU and SiLU are nearly all
positive, so their range starts at the functions' minimum. Softmax, residual sums and heads stay in
the model's dtype. The steps between products are in cpu_int8_ops.py.
"""

import torch
from torch import Tensor, nn

from titok_fast.backends.cpu_int8_ops import (
    GELU_MIN,
    SYMMETRIC,
    dequantize_rows,
    gelu_quantize_rows,
    norm_silu_quantize,
    quantize_image,
    quantize_rows,
    warn_without_compiler,
)
from titok_fast.backends.cpu_packed import Layers, packed_layers
from titok_fast.models.blocks import Mlp
from titok_fast.models.vqgan import NormSiLU
from titok_fast.processor import int8_products
from titok_fast.processor.here import processor


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, ...) to int8 of the same shape, and the (O,) float32 scales."""
    limit = processor().int8_limit
    ints, scales = torch.empty_like(weight, dtype=torch.int8), torch.empty(len(weight))
    # in parts that stay in the cache: a fifth of the time
    for rows, into, scale in zip(
        weight.detach().split(256), ints.split(256), scales.split(256), strict=True
    ):
        wide = rows.float()
        scale.copy_(wide.abs().flatten(1).amax(dim=1).clamp(min=1e-12) / limit)
        into.copy_((wide / scale.view(-1, *[1] * (wide.ndim - 1))).round())
    return ints, scales


class _Int8Matmul(nn.Module):
    """The int8 matmul of a Linear, times the scales of its weights; the caller adds the bias."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_weight(layer.weight)
        self._weight = int8_products.pack_linear(weight, scale)
        self.packed_bytes = weight.nbytes
        result = processor().int8_result("linear", layer.weight.dtype)
        self._result = result or torch.float32
        self.sums = weight.sum(dim=1, dtype=torch.int32) * scale  # of each output's weights
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float()
        self.bias = bias

    def forward(self, x: Tensor, zero: int) -> Tensor:
        """(R, D) uint8 whose zero is `zero` -> (R, E), float32 or the model's dtype."""
        return int8_products.linear(x, zero, self._weight, self._result)


class Int8Linear(nn.Module):
    """A Linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.matmul = _Int8Matmul(layer)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., E)."""
        rows, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        y = self.matmul(rows, SYMMETRIC)
        return dequantize_rows(y, scale, self.matmul.bias, x.dtype).view(*x.shape[:-1], -1)


class Int8Mlp(nn.Module):
    """An Mlp: GELU and the quantization after it are one op."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.fc1, self.fc2 = _Int8Matmul(mlp.fc1), _Int8Matmul(mlp.fc2)
        # the second matmul takes GELU - GELU_MIN; what that adds is the same for every row
        self._bias = self.fc2.bias + GELU_MIN * self.fc2.sums

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        rows, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        rows, scale = gelu_quantize_rows(self.fc1(rows, SYMMETRIC), scale, self.fc1.bias)
        return dequantize_rows(self.fc2(rows, 0), scale, self._bias, x.dtype).view(x.shape)


class Int8Conv(nn.Module):
    """A convolution with stride 1 and padding 1, and the NormSiLU before it if there is one."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, norm: NormSiLU | None = None
    ) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self._result = processor().int8_result("convolution", self.dtype) or torch.float32
        kernel, scale = quantize_weight(weight)
        self._weight = int8_products.pack_convolution(kernel, scale)
        self._bias = None if bias is None else bias.detach().float()
        self._norm = None if norm is None else norm_arguments(norm)
        self.packed_bytes = kernel.nbytes
        if norm is not None:
            self.packed_bytes += norm.weight.nbytes + norm.bias.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H', W'), channels-last."""
        if len(x) != 1:
            return torch.cat([self(one) for one in x.split(1)])
        quantized = quantize_image(x) if self._norm is None else norm_silu_quantize(x, *self._norm)
        weight = self._weight, self._bias
        return int8_products.convolution(*quantized, *weight, self._result).to(self.dtype)


def norm_arguments(norm: NormSiLU) -> tuple[Tensor, Tensor, int, float]:
    """The arguments of norm_silu_quantize: float32 weight and bias, groups, eps."""
    weight, bias = (t.detach().float().clone() for t in (norm.weight, norm.bias))
    return weight, bias, norm.num_groups, norm.eps


INT8_LAYERS = Layers(Int8Linear, Int8Mlp, Int8Conv)


def int8_layers(dtype: torch.dtype) -> Layers:
    """INT8_LAYERS as far as they pay on this processor, for a model of this dtype.

    Warns if their C++ ops cannot be compiled.

    Raises:
        ValueError: no kind of product is faster in 8 bits.
    """
    own, plain = processor(), packed_layers(dtype)
    linear, convolution = (own.int8_result(kind, dtype) for kind in ("linear", "convolution"))
    if linear is None and convolution is None:
        raise ValueError(
            f"int8 is not faster than {dtype} on {own.name} (titok-fast info shows the rates): "
            "take fast=True"
        )
    warn_without_compiler()
    return Layers(
        *(plain if linear is None else INT8_LAYERS)[:2],
        (plain if convolution is None else INT8_LAYERS).conv,
    )
