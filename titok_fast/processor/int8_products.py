"""oneDNN's products of 8-bit integers: uint8 inputs, int8 weights, results of a floating type."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_ONEDNN: Any = torch.ops.onednn
_GEOMETRY = [1, 1], [1, 1], [1, 1], 1  # stride, padding, dilation, groups
_NO_EPILOGUE: tuple[str, list[float], str] = ("none", [], "")


class Weight(NamedTuple):
    """A weight in oneDNN's layout, with the (O,) float32 scale of each output and its zero, 0."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor


def pack_linear(ints: Tensor, scales: Tensor) -> Weight:
    """Of (O, D) int8."""
    packed = _ONEDNN.qlinear_prepack(ints, None)
    return Weight(packed, scales, torch.zeros(len(ints), dtype=torch.int64))


def linear(x: Tensor, zero: int, weight: Weight, dtype: torch.dtype) -> Tensor:
    """(R, D) uint8 whose zero is `zero` -> (R, O) of this dtype, in steps of 1 times the scales."""
    return _ONEDNN.qlinear_pointwise(x, 1.0, zero, *weight, None, 1.0, 0, dtype, *_NO_EPILOGUE)


def pack_convolution(ints: Tensor, scales: Tensor) -> Weight:
    """Of (O, C, k, k) int8."""
    packed = _ONEDNN.qconv_prepack(ints, scales, 1.0, 0, *_GEOMETRY, None)
    return Weight(packed, scales, torch.zeros(len(ints), dtype=torch.int64))


def convolution(
    x: Tensor, step: float, zero: int, weight: Weight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(1, C, H, W) uint8, channels-last, of this step and zero -> (1, O, H', W') of this dtype."""
    quantized = x, step, zero, *weight, bias
    return _ONEDNN.qconv2d_pointwise(*quantized, *_GEOMETRY, 1.0, 0, dtype, *_NO_EPILOGUE)
