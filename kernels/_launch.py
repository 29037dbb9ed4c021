"""Choose between a Triton kernel (CUDA tensors) and its reference, and register operators.

Triton's interpreter runs the kernels, slowly, without a GPU: start Python with `TRITON_INTERPRET=1`
and enter `interpret_on_cpu()`. Only tests do.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.compiler import is_compiling

_interpret_on_cpu = False
_registering = Lock()  # torch refuses to register a name twice


def runs_triton(x: Tensor) -> bool:
    """Whether a public op given `x` launches its Triton kernel (else it runs its reference)."""
    return x.is_cuda or (_interpret_on_cpu and x.device.type == "cpu")


def is_traced() -> bool:
    """Whether torch.compile or a torch.func transform is tracing: tensors then have no memory."""
    return is_compiling() or _are_functorch_transforms_active()


def is_plain_cpu(x: Tensor) -> bool:
    """Whether `x` is an ordinary CPU tensor, which in-place and NumPy code may read."""
    return x.is_cpu and not (_interpret_on_cpu or is_traced())


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Disable autocast on the device of `x`; matmuls then run in the dtypes of their arguments.

    With autocast off it enters nothing: entering costs a tenth of a small CPU call.
    """
    kind = x.device.type
    if is_traced() or torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


@contextmanager
def interpret_on_cpu() -> Iterator[None]:
    """Run the Triton kernels on CPU tensors through Triton's interpreter while inside.

    Raises:
        RuntimeError: `TRITON_INTERPRET=1` was not set when Triton was imported.
    """
    global _interpret_on_cpu
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("interpret_on_cpu needs TRITON_INTERPRET=1 before triton is imported")
    before, _interpret_on_cpu = _interpret_on_cpu, True
    try:
        yield
    finally:
        _interpret_on_cpu = before


def lazy_triton_op(
    name: str,
    save: Callable[..., None] | None = None,
    backward: Callable[..., tuple] | None = None,
    *,
    like: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`torch.library.triton_op`, registered at the first call instead of at import.

    Registering imports Inductor: 0.9 s that a CPU user need not spend. torch.compile may make the
    first call: it runs `register` while tracing and then sees the operator itself. Of several
    threads one registers and the others wait. `save` and `backward` are the `setup_context` and
    `backward` of `register_autograd`. The operator's signature is that of `like`, else of `fn`.
    """

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        done = False

        def register() -> bool:
            nonlocal done
            if not done:
                with _registering:
                    if not done:  # another thread may have been first
                        schema = torch.library.infer_schema(like or fn, mutates_args=())
                        op: Any = torch.library.triton_op(
                            f"titok_fast::{name}", fn, mutates_args=(), schema=schema
                        )
                        if backward is not None:
                            op.register_autograd(backward, setup_context=save)
                        done = True
            return done

        def call(*args: Any) -> Any:
            register()
            return getattr(torch.ops.titok_fast, name)(*args)

        register._dynamo_marked_constant = True  # type: ignore[attr-defined]
        call.register = register  # type: ignore[attr-defined]
        return call

    return decorate
