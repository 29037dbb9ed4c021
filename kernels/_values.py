"""Values of arguments, looked at before a launch: NaN, infinities, numbers out of range.

Looking at values in a GPU's memory means to wait for it, and in training a NaN is the loop's to
meet: it must reach the loss. So an op looks where ids alone come out of it, which would hide a NaN,
and a CPU computes; and every op looks, on every device, where Python was started with
TITOK_FAST_CHECK_VALUES=1, which is for finding a fault, not for speed. None does while
torch.compile traces or a CUDA graph is captured: there are no values then.
"""

import os
from collections.abc import Callable, Mapping
from math import isfinite

import torch
from torch import Tensor
from torch.nn import Parameter

from titok_fast.kernels._launch import is_traced, runs_triton

ENVIRONMENT = "TITOK_FAST_CHECK_VALUES"
# read once: asking the environment at each call costs as much as a small op's other checks
_asked_for = os.environ.get(ENVIRONMENT, "0") not in ("", "0")


def looks_at_values(x: Tensor, *, ids_only: bool) -> bool:
    """Whether an op whose first argument is `x` checks the values of its arguments.

    Args:
        x: tells the device.
        ids_only: nothing but ids and their scores comes out of the op, or `x` itself holds ids.
    """
    always = ids_only and x.is_cpu and not runs_triton(x)
    if not (always or _asked_for):
        return False
    # subclasses: fake tensors have no values, and distributed ones would have to be gathered
    if is_traced() or type(x) not in (Tensor, Parameter) or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def check_no_nan(op: str, **tensors: Tensor | None) -> None:
    """Raise a ValueError that names the first NaN in `tensors`, name to tensor; infinities pass."""
    _check(op, "without NaN", torch.isnan, tensors)


def check_finite(op: str, **tensors: Tensor | None) -> None:
    """Raise a ValueError that names the first NaN or infinity in `tensors`, name to tensor."""
    _check(op, "with finite values", _not_finite, tensors)


def check_in_range(op: str, name: str, x: Tensor | None, low: int, high: float) -> None:
    """Raise a ValueError unless all of `x` lies in [low, high); high may be infinite."""
    if x is None or not x.numel():
        return
    least, most = (end.item() for end in x.detach().aminmax())
    if not (least >= low and most < high):  # so put that NaN fails too
        bad = ~((x >= low) & (x < high))
        raise ValueError(f"{op} wants {name} in [{low}, {high}); got {_first(x, bad)}")


def _not_finite(x: Tensor) -> Tensor:
    return ~torch.isfinite(x)


def _check(
    op: str, wanted: str, is_bad: Callable[[Tensor], Tensor], tensors: Mapping[str, Tensor | None]
) -> None:
    for name, x in tensors.items():
        # one number tells of most tensors that all is well, at the speed of memory
        if x is None or not x.numel() or isfinite(x.detach().sum().item()):
            continue
        bad = is_bad(x)
        if bad.any():
            raise ValueError(f"{op} wants {name} {wanted}; got {_first(x, bad)}")


def _first(x: Tensor, bad: Tensor) -> str:
    where = tuple(bad.nonzero()[0].tolist())
    at = ", ".join(str(i) for i in where)
    return f"{x[where].item()} at [{at}], {int(bad.sum())} such of {x.numel()}"
