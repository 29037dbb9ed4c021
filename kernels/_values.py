"""Check arguments before a launch: shapes, dtypes, devices, and values where that is cheap.

Reading values from a GPU waits for it, and a training loop finds NaN in its loss. So values are
checked on a CPU if an op returns only ids, which would hide a NaN; and on every device if Python
was started with TITOK_FAST_CHECK_VALUES=1, a slow debugging mode. They are never checked under
torch.compile or while a CUDA graph is captured, when tensors have no values.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor
from torch.nn import Parameter

from titok_fast.kernels._launch import is_traced, runs_triton

ENVIRONMENT = "TITOK_FAST_CHECK_VALUES"
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_OR_DOUBLE = (*FLOAT_TYPES, torch.float64)
INT64 = (torch.int64,)
TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# read once: a look-up per call costs as much as all other checks of a small op
_asked_for = os.environ.get(ENVIRONMENT, "0") not in ("", "0")


def check_tensors(
    op: str,
    limits: Mapping[str, float],
    **tensors: tuple[Tensor | None, str, Sequence[torch.dtype]],
) -> dict[str, int]:
    """Check shapes, dtypes and devices; return the size of every dimension letter.

    Args:
        op: name of the public function, for the message.
        limits: largest size by letter, the smallest being 1; other letters may be 0.
        tensors: by name: the tensor, its dimension letters such as "BKN", its dtypes. A letter has
            one size in all of them, and all are on the first one's device. None is skipped.

    Raises:
        ValueError: a tensor does not fit the ones before it, or a size is out of its limits.
    """
    sizes: dict[str, int] = {}
    device = None
    for name, (x, letters, dtypes) in tensors.items():
        if x is None:
            continue
        shape, there = x.shape, x.device
        device = device or there
        fits = len(shape) == len(letters) and x.dtype in dtypes and there == device
        if fits:
            for letter, size in zip(letters, shape, strict=True):
                if sizes.get(letter, size) != size:
                    fits = False
        if not fits:
            dims = ", ".join(f"{d}={sizes[d]}" if d in sizes else d for d in letters)
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            got = f"{tuple(shape)} {x.dtype} on {there}"
            raise ValueError(f"{op} wants {name} ({dims}) {kinds} on {device}; got {got}")
        sizes.update(zip(letters, shape, strict=True))
    for letter, largest in limits.items():
        if not 1 <= sizes[letter] <= largest:
            most = f" and at most {largest}" if isfinite(largest) else ""
            raise ValueError(f"{op} wants {letter} at least 1{most}; got {sizes[letter]}")
    return sizes


def looks_at_values(x: Tensor, *, ids_only: bool) -> bool:
    """Whether an op checks the values of its arguments, by the device and type of one, `x`.

    `ids_only`: the op returns only ids and their scores, or `x` itself holds ids.
    """
    always = ids_only and x.is_cpu and not runs_triton(x)
    if not (always or _asked_for):
        return False
    # subclasses: fake tensors have no values, and reading distributed ones would gather them
    if is_traced() or type(x) not in (Tensor, Parameter) or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def check_no_nan(op: str, **tensors: Tensor | None) -> None:
    """Raise a ValueError that names the first NaN; infinities pass."""
    _check(op, "without NaN", torch.isnan, tensors)


def check_finite(op: str, **tensors: Tensor | None) -> None:
    """Raise a ValueError that names the first NaN or infinity."""
    _check(op, "with finite values", lambda x: ~torch.isfinite(x), tensors)


def check_in_range(op: str, name: str, x: Tensor | None, low: int, high: float) -> None:
    """Raise a ValueError unless all of `x` is in [low, high); high may be infinite."""
    if x is None or not x.numel():
        return
    least, most = (end.item() for end in x.detach().aminmax())
    if not (least >= low and most < high):  # negated, so that NaN fails too
        bad = ~((x >= low) & (x < high))
        raise ValueError(f"{op} wants {name} in [{low}, {high}); got {_first(x, bad)}")


def _check(
    op: str, wanted: str, is_bad: Callable[[Tensor], Tensor], tensors: Mapping[str, Tensor | None]
) -> None:
    for name, x in tensors.items():
        # a finite sum proves all values finite, at the speed of memory
        if x is None or not x.numel() or isfinite(x.detach().sum().item()):
            continue
        bad = is_bad(x)
        if bad.any():
            raise ValueError(f"{op} wants {name} {wanted}; got {_first(x, bad)}")


def _first(x: Tensor, bad: Tensor) -> str:
    where = tuple(bad.nonzero()[0].tolist())
    at = ", ".join(str(i) for i in where)
    return f"{x[where].item()} at [{at}], {int(bad.sum())} such of {x.numel()}"
