"""Accelerate an object in place by exchanging its class for a subclass, and undo it.

The subclass overrides a method or two and adds no state, so parameters, hooks, configuration and
`isinstance` do not change, the object's own code is `super()`, and restoring is one assignment.
(torch.nn.utils.parametrize and FSDP2 exchange classes in the same way.)
"""

from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from titok_fast.kernels.nearest_code import MAX_CHANNELS, MAX_CODES


class Fast:
    """Base of the overriding classes, one per kind of object."""

    accelerated_from: ClassVar[type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are of the original class: they load where this package is absent."""
        # as of protocol 0, since later ones insist on the object's own class
        reduced: Any = super().__reduce_ex__(0)
        rebuild, (_, *args), *state = reduced
        return rebuild, (type(self).accelerated_from, *args), *state


Plan = list[tuple[Any, Any]]  # objects and their subclasses of Fast


@cache  # one class per pair, so that torch.compile sees one type
def _fast_class(original: Any, overrides: Any) -> type:
    # under its own name, which libraries write into configuration files
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    members = names | {"__doc__": original.__doc__, "accelerated_from": original}
    return type(original.__name__, (overrides, original), members)


def swap(plan: Plan) -> None:
    """Exchange the class of every part that is not fast yet."""
    for obj, overrides in plan:
        if not isinstance(obj, Fast):
            original: Any = type(obj)
            obj.__class__ = _fast_class(original, overrides)


def swap_back(obj: Any) -> None:
    """Restore the class of a fast object; ValueError if another tool has exchanged it since."""
    if "accelerated_from" not in vars(type(obj)):
        raise ValueError(
            f"restore cannot undo a {type(obj).__name__} whose class was changed again after "
            "accelerate: undo the later change first"
        )
    obj.__class__ = type(obj).accelerated_from


def refuse(obj: object, reason: str) -> None:
    """Raise the ValueError of `accelerate` for a known kind of object."""
    raise ValueError(f"accelerate cannot take this {type(obj).__name__}: {reason}")


def check_codebook(obj: object, table: Tensor) -> None:
    """Refuse a codebook (N, C) beyond the limits of `nearest_code`."""
    N, C = table.shape
    if C > MAX_CHANNELS or N > MAX_CODES:
        refuse(
            obj,
            f"its codebook is {N} x {C}; nearest_code takes {MAX_CODES} codes of "
            f"{MAX_CHANNELS} channels at most",
        )
