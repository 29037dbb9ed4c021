"""Run work on many images in batches, and return images as PIL, NumPy or torch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from titok_fast.io.images import to_pil

OUTPUTS = ("pil", "numpy", "tensor")
Images = list[Image.Image] | np.ndarray | Tensor
Progress = Callable[[int], object]


def in_batches(
    total: int, size: int, work: Callable[[slice], Tensor], progress: Progress | None
) -> Iterator[Tensor]:
    """Call `work` on one slice of 0..total after the other, and yield its results on the CPU.

    Args:
        total: number of images; for 0, `work` still gets one empty slice, to check its input.
        size: images at once, 1 or more.
        work: computes the result of a slice, on any device.
        progress: called with the number of images finished since the last call.

    Raises:
        ValueError: a size below 1.
        MemoryError: a batch does not fit; the message names a smaller one.
    """
    if size < 1:
        raise ValueError(f"batch_size wants at least 1; got {size}")
    for start in range(0, total, size) or range(1):
        with _memory_advice(min(size, max(total, 1))):
            part = work(slice(start, start + size)).cpu()
        if progress is not None:
            progress(len(part))
        yield part


def check_output(output: str) -> None:
    """Raise ValueError unless `as_output` knows the kind of output."""
    if output not in OUTPUTS:
        raise ValueError(f"output wants one of {OUTPUTS}; got {output!r}")


def as_output(parts: Iterator[Tensor], output: str) -> Images:
    """Batches (B, S, S, 3) uint8 as "pil" list, or one "numpy" or "tensor" array."""
    pixels = torch.cat(list(parts))
    if output == "tensor":
        return pixels
    return pixels.numpy() if output == "numpy" else to_pil(pixels)


@contextmanager
def _memory_advice(size: int) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "allocate memory" not in str(error):  # the CPU allocator's RuntimeError
            raise
        advice = f"try batch_size={size // 2}" if size > 1 else "even one image does not fit"
        raise MemoryError(f"out of memory with batch_size={size}: {advice}. ({error})") from error
