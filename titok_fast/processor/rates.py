"""Measure how fast a processor multiplies: each number format, in each way that PyTorch has.

Sizes are those of a small model's layers for a few images.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titok_fast.processor.int8_products import (
    convolution,
    linear,
    pack_convolution,
    pack_linear,
)

_ROUNDS, _ENOUGH_S, _SLOW_S = 10, 0.05, 0.01
FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
Call = Callable[[], object]


def product_rates() -> dict[str, float]:
    """Operations per second (2 for a multiply-add) of all `measured`; 0 of what cannot work.

    The best of several rounds in which all take turns: other work on the machine disturbs some.
    """
    with torch.no_grad():
        calls = {name: _grown(make) for name, make in measured().items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(_ROUNDS):
            for name, found in calls.items():
                if found is not None and sum(times[name]) < _ENOUGH_S:
                    times[name].append(_seconds(found[0]))
    return {name: found[1] / min(times[name]) if found else 0.0 for name, found in calls.items()}


def measured() -> dict[str, Callable[[int], tuple[Call, float]]]:
    """What is measured: for a size 8..256 a call, and its operations."""
    found: dict[str, Callable[[int], tuple[Call, float]]] = {}
    for dtype, name in FORMATS.items():
        for way, make in (("plain", _plain), ("packed", _packed)):
            found[f"linear {way} {name}"] = partial(_linear, make, dtype)
        found[f"linear int8 to {name}"] = partial(_int8_linear, dtype)
        found[f"convolution plain {name}"] = partial(_convolution, dtype)
        found[f"convolution int8 to {name}"] = partial(_int8_convolution, dtype)
        for way, attend in (("sdpa", F.scaled_dot_product_attention), ("products", _products)):
            found[f"attention {way} {name}"] = partial(_attention, attend, dtype)
    return found


def _grown(make: Callable[[int], tuple[Call, float]]) -> tuple[Call, float] | None:
    """The call of the largest size, or of the first that is slow; None where it cannot work."""
    size = 8
    while True:
        try:
            call, operations = make(size)
            call()
            seconds = _seconds(call)
        except RuntimeError:  # PyTorch's word for a product that does not exist here
            return None
        if seconds > _SLOW_S or size == 256:
            return call, operations
        size *= 2


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _linear(way: Any, dtype: torch.dtype, n: int) -> tuple[Call, float]:
    x, weight = torch.ones(n, 4 * n, dtype=dtype), torch.ones(4 * n, 4 * n, dtype=dtype)
    return way(x, weight), 32.0 * n**3


def _plain(x: Tensor, weight: Tensor) -> Call:
    return lambda: F.linear(x, weight)


def _packed(x: Tensor, weight: Tensor) -> Call:
    ops: Any = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight, len(x))
    return lambda: ops._linear_pointwise(x, packed, None, "none", [], "")


def _int8_linear(dtype: torch.dtype, n: int) -> tuple[Call, float]:
    x, ints = torch.ones(n, 4 * n, dtype=torch.uint8), torch.ones(4 * n, 4 * n, dtype=torch.int8)
    weight = pack_linear(ints, torch.ones(4 * n))
    return lambda: linear(x, 0, weight, dtype), 32.0 * n**3


def _convolution(dtype: torch.dtype, n: int) -> tuple[Call, float]:
    x, kernel = (t.to(dtype).to(memory_format=torch.channels_last) for t in _image_and_kernel(n))
    return lambda: F.conv2d(x, kernel, padding=1), _convolution_operations(n)


def _int8_convolution(dtype: torch.dtype, n: int) -> tuple[Call, float]:
    x, kernel = _image_and_kernel(n)
    image = x.to(torch.uint8).to(memory_format=torch.channels_last)
    weight = pack_convolution(kernel.to(torch.int8), torch.ones(n))
    call = partial(convolution, image, 1.0, 0, weight, None, dtype)
    return call, _convolution_operations(n)


def _image_and_kernel(n: int) -> tuple[Tensor, Tensor]:
    """An image (1, n, n/8, n/8), at least 8 pixels wide, and a 3x3 kernel for it."""
    side = max(8, n // 8)
    return torch.ones(1, n, side, side), torch.ones(n, n, 3, 3)


def _convolution_operations(n: int) -> float:
    return 18.0 * n * n * max(8, n // 8) ** 2


def _attention(attend: Any, dtype: torch.dtype, n: int) -> tuple[Call, float]:
    """n/32 heads of 64 channels, 256 positions: their weights stay in the cache."""
    heads = max(1, n // 32)
    q, k, v = torch.ones(3, 1, heads, 256, 64, dtype=dtype)
    return lambda: attend(q, k, v), 4.0 * heads * 256**2 * 64


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q / 8, k.transpose(-1, -2)), dim=-1), v)


def exact_int8_limit() -> int:
    """127 where sums of products of 255 and 127 are exact in both kinds of product, else 64."""
    n, ones = 64, torch.ones(64)
    weight = torch.full((n, n), 127, dtype=torch.int8)
    kernel = torch.full((n, n, 3, 3), 127, dtype=torch.int8)
    rows = torch.full((n, n), 255, dtype=torch.uint8)
    image = torch.full((1, n, 8, 8), 255, dtype=torch.uint8).to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            sums = linear(rows, 0, pack_linear(weight, ones), torch.float32)
            packed = pack_convolution(kernel, ones)
            inner = convolution(image, 1.0, 0, packed, None, torch.float32)[0, :, 1, 1]
    except RuntimeError:  # no such product: then no limit matters
        return 127
    exact = bool((sums == 255 * 127 * n).all() and (inner == 255 * 127 * n * 9).all())
    return 127 if exact else 64
