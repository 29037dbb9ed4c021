"""Run objects of other libraries on this package's kernels: `accelerate`, undone by `restore`.

| object | what runs on kernels |
| --- | --- |
| `TiTok` (bytedance/1d-tokenizer) | code search, soft pixel codes, the whole pixel decoder |
| `ImageBert`, `UViTBert` (same) | `generate`: guidance in one batch, sampling, re-masking |
| its `VectorQuantizer` | code search, training included |
| `VectorQuantize` (vector_quantize_pytorch) | code search of evaluation, both metrics |
| `VQModel` (diffusers), or its quantizer | code search, training included |
| `AmusedScheduler` (diffusers) | `step` |

Weights, `state_dict`, hooks, signatures, return types and results do not change. Ids are equal,
after sampling too, because the kernels get the noise that the object itself would have drawn, and
the random generator ends in the same state; only codes or tokens whose scores differ by float32
rounding (about 1e-6) may swap. Pixels agree to rounding. A call outside the table (training mode
where only evaluation is listed, autocast, an option such as a mask or top-k) runs the object's own
code.

Objects are recognised by the name of their class and of its module: nothing is imported for it.
Reading order: _swap, upstream, vector_quantize, diffusers.
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from titok_fast.integrations._swap import Fast, Plan, swap, swap_back
from titok_fast.integrations.diffusers import plan_amused, plan_vq_model, plan_vq_quantizer
from titok_fast.integrations.upstream import (
    plan_imagebert,
    plan_quantizer,
    plan_titok,
    plan_uvit,
)
from titok_fast.integrations.vector_quantize import plan_vector_quantize

__all__ = ["accelerate", "restore"]

T = TypeVar("T")

# class name, pattern of its module's name, what to do; upstream is no package and may lie anywhere
_KINDS: tuple[tuple[str, str, Callable[[Any], Plan]], ...] = (
    ("TiTok", r"(^|\.)modeling\.titok$", plan_titok),
    ("ImageBert", r"(^|\.)modeling\.maskgit$", plan_imagebert),
    ("UViTBert", r"(^|\.)modeling\.maskgit$", plan_uvit),
    ("VectorQuantizer", r"(^|\.)modeling\.quantizer\.quantizer$", plan_quantizer),
    ("VectorQuantize", r"^vector_quantize_pytorch\.", plan_vector_quantize),
    ("VQModel", r"^diffusers\.", plan_vq_model),
    ("VectorQuantizer", r"^diffusers\.", plan_vq_quantizer),
    ("AmusedScheduler", r"^diffusers\.", plan_amused),
)


def accelerate(obj: T) -> T:
    """Make an object of another library run on this package's kernels, in place; return it.

    Copies and pickles of an accelerated object are plain ones. Accelerating twice changes nothing.

    Args:
        obj: an instance of a class in the table above, not of a subclass or a wrapper (for
            DistributedDataParallel or torch.compile, pass the module inside).

    Raises:
        ValueError: an unknown class, or an option that the kernels do not cover; the message says
            which. Nothing has been changed then.
    """
    cls = type(obj)
    for name, module, plan in _KINDS:
        if cls.__name__ == name and re.search(module, cls.__module__):
            swap(plan(obj))
            return obj
    known = ", ".join(f"{name} ({module})" for name, module, _ in _KINDS)
    raise ValueError(
        f"accelerate does not know {cls.__module__}.{cls.__qualname__}; it knows, by class and "
        f"module: {known}. Subclasses are not taken, as they may override what is replaced"
    )


def restore(obj: T) -> T:
    """Undo `accelerate` in an object, or in all parts of a module; return it.

    Raises:
        ValueError: nothing in it is accelerated.
    """
    parts = list(obj.modules()) if isinstance(obj, nn.Module) else [obj]
    fast = [part for part in parts if isinstance(part, Fast)]
    if not fast:
        raise ValueError(f"restore wants an accelerated object; got a plain {type(obj).__name__}")
    for part in fast:
        swap_back(part)
    return obj
