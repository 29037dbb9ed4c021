"""Layers in 8-bit integers for inference on a CPU: oneDNN's VNNI products, twice bfloat16's speed.

Weights get one scale per output channel, once; activations one per token (per image in the pixel
decoder), at every call, so a picture does not depend on its batch. Sums are exact in int32. What
follows GELU or SiLU is nearly all positive, so its range starts at the smallest value those have.
Normalisation, softmax, residual sums and heads stay in the model's dtype. The passes between two
products are compiled by Inductor, 20 s once per machine: its disk cache serves later processes.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast.blocks import Mlp

_SYMMETRIC = 128  # the zero of uint8 for values of both signs
_GELU_MIN, _SILU_MIN = -0.17, -0.2785  # lower bounds of exact GELU (-0.16997) and SiLU (-0.27846)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, ...) to int8 of the same shape, and the (O,) float32 scales that give it back."""
    ints, scales = torch.empty_like(weight, dtype=torch.int8), torch.empty(len(weight))
    # in parts that stay in the cache: a fifth of the time
    for rows, into, scale in zip(
        weight.detach().split(256), ints.split(256), scales.split(256), strict=True
    ):
        wide = rows.float()
        scale.copy_(wide.abs().flatten(1).amax(dim=1).clamp(min=1e-12) / 127)
        into.copy_((wide / scale.view(-1, *[1] * (wide.ndim - 1))).round())
    return ints, scales


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(R, D) float -> (R, D) uint8 with zero at 128, (R, 1) float32 scales."""
    # literals: a global number would be guarded, and the function traced twice
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / 127
    return ((x.float() / scale).round() + _SYMMETRIC).to(torch.uint8), scale


def gelu_quantize_rows(y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize GELU(y * scale + bias), with _GELU_MIN at 0.

    Args:
        y: (R, D).
        scale: (R, 1) float32.
        bias: (D,) float32.

    Returns:
        (R, D) uint8 and (R, 1) float32 scales.
    """
    x = y.float() * scale + bias
    # GELU(x) < x, and nearly x where it is largest: its own maximum would want it computed twice
    scale = (x.amax(dim=1, keepdim=True).clamp(min=0.0) - _GELU_MIN) / 255
    return ((F.gelu(x) - _GELU_MIN) * (1.0 / scale)).round().to(torch.uint8), scale


def dequantize_rows(y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """(R, E) * (R, 1) + (E,), in float32, to the dtype of y."""
    return (y.float() * scale + bias).to(y.dtype)


def quantize_image(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(1, C, H, W) float -> uint8, same memory format."""
    return ((x.float() / scale).round() + zero).clamp(0, 255).to(torch.uint8)


@lru_cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True)


class _Product(nn.Module):
    """The bare int8 product of a Linear layer, times the scales of its weights."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight, self._scale = quantize_weight(layer.weight)
        self._weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        self.packed_bytes = weight.nbytes
        self.dtype = layer.weight.dtype
        self.sums = weight.sum(dim=1, dtype=torch.int32) * self._scale  # of each output's weights
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float()
        self.bias = bias

    def forward(self, x: Tensor, zero: int) -> Tensor:
        """(R, D) uint8 whose zero is `zero` -> (R, E)."""
        return torch.ops.onednn.qlinear_pointwise(
            x, 1.0, zero, self._weight, self._scale, self._zeros, None, 1.0, 0, self.dtype,
            "none", [], "",
        )  # fmt: skip


class Int8Linear(nn.Module):
    """A Linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.product = _Product(layer)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., E)."""
        rows, scale = _compiled(quantize_rows)(x.reshape(-1, x.shape[-1]))
        y = self.product(rows, _SYMMETRIC)
        return _compiled(dequantize_rows)(y, scale, self.product.bias).view(*x.shape[:-1], -1)


class Int8Mlp(nn.Module):
    """An Mlp: GELU and the quantization after it in one pass."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.fc1, self.fc2 = _Product(mlp.fc1), _Product(mlp.fc2)
        # the second product takes GELU - _GELU_MIN; what that adds is the same for every row
        self._bias = self.fc2.bias + _GELU_MIN * self.fc2.sums

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        rows, scale = _compiled(quantize_rows)(x.reshape(-1, x.shape[-1]))
        h = self.fc1(rows, _SYMMETRIC)
        rows, scale = _compiled(gelu_quantize_rows)(h, scale, self.fc1.bias)
        y = self.fc2(rows, 0)
        return _compiled(dequantize_rows)(y, scale, self._bias).view(x.shape)


class Int8Conv(nn.Module):
    """A convolution with stride 1, of any input or of one that SiLU has made."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, padding: int, *, after_silu: bool
    ) -> None:
        super().__init__()
        self.dtype, self.padding, self.after_silu = weight.dtype, [padding, padding], after_silu
        kernel, self._scale = quantize_weight(weight)
        self._weight = torch.ops.onednn.qconv_prepack(
            kernel, self._scale, 1.0, 0, [1, 1], self.padding, [1, 1], 1, None
        )
        self._zeros = torch.zeros(len(kernel), dtype=torch.int64)
        self.packed_bytes = kernel.nbytes
        self._bias = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H', W'), channels-last."""
        if len(x) != 1:
            return torch.cat([self(one) for one in x.split(1)])
        # two passes: aminmax takes ten times as long. Padding is 0, so 0 must be a value
        low = _SILU_MIN if self.after_silu else min(float(x.amin()), 0.0)
        high = max(float(x.amax()), 0.0)
        scale = max((high - low) / 255, 1e-12)
        zero = round(-low / scale)
        q = _compiled(quantize_image)(x, torch.tensor(scale), torch.tensor(float(zero)))
        return torch.ops.onednn.qconv2d_pointwise(
            q, scale, zero, self._weight, self._scale, self._zeros, self._bias, [1, 1],
            self.padding, [1, 1], 1, 1.0, 0, self.dtype, "none", [], "",
        )  # fmt: skip


class Int8Layers:
    """The layers of this file, for packed.pack."""

    linear = staticmethod(Int8Linear)
    mlp = staticmethod(Int8Mlp)
    conv = staticmethod(Int8Conv)
