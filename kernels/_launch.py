"""Where a kernel runs: Triton on CUDA tensors, the plain reference elsewhere.

Without a GPU the kernels can still be run, slowly, by Triton's interpreter: start Python with
`TRITON_INTERPRET=1` and enter `interpret_on_cpu()`. Tests do; nothing else should.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_interpret_on_cpu = False


def runs_triton(x: Tensor) -> bool:
    """Whether a public op given `x` launches its Triton kernel (else it runs its reference)."""
    return x.is_cuda or (_interpret_on_cpu and x.device.type == "cpu")


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
