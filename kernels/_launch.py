"""Where a kernel runs: Triton on CUDA tensors, the plain reference elsewhere.

Without a GPU the kernels can still be run, slowly, by Triton's interpreter: start Python with
`TRITON_INTERPRET=1` and enter `interpret_on_cpu()`. Tests do; nothing else should.
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
_registering = Lock()  # torch refuses a name that it knows, so no two threads may register it


def runs_triton(x: Tensor) -> bool:
    """Whether a public op given `x` launches its Triton kernel (else it runs its reference)."""
    return x.is_cuda or (_interpret_on_cpu and x.device.type == "cpu")


def is_traced() -> bool:
    """Whether torch.compile or a torch.func transform is at work: tensors then have no memory."""
    return is_compiling() or _are_functorch_transforms_active()


def is_plain_cpu(x: Tensor) -> bool:
    """Whether `x` lies in CPU memory, where what is fastest there may be called on it."""
    return x.is_cpu and not (_interpret_on_cpu or is_traced())


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Inside, products on the device of `x` run in the dtypes of their arguments.

    Where autocast is off nothing is entered: that alone is a tenth of a small call on a CPU.
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
    name: str, setup: Callable[[Any], object] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`torch.library.triton_op`, registered at the first call instead of at import.

    Registering imports Inductor, 0.9 s that a CPU user never needs to wait for. torch.compile may
    be the first caller: it runs `register` while tracing and then sees the operator itself. So
    may several threads be: one registers, the others wait for it.

    Args:
        name: of the operator in namespace `titok_fast`.
        setup: given the registered operator, once; attaches its gradient.
    """

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        done = False

        def register() -> bool:
            nonlocal done
            if not done:
                with _registering:
                    if not done:  # another thread may have been first
                        op = torch.library.triton_op(f"titok_fast::{name}", mutates_args=())(fn)
                        if setup is not None:
                            setup(op)
                        done = True
            return done

        def call(*args: Any) -> Any:
            register()
            return getattr(torch.ops.titok_fast, name)(*args)

        register._dynamo_marked_constant = True  # type: ignore[attr-defined]
        call.register = register  # type: ignore[attr-defined]
        return call

    return decorate
