"""Operators as torch sees them: registered once, checked whole, and the same compiled as eager.

A GPU is needed for none of it. What is left to one (test_gpu_calls.py) is what Inductor writes
around the kernels that it finds in the graphs, and their machine code at work.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from calls import calls
from support.processes import python

from titok_fast import kernels
from titok_fast.kernels._launch import lazy_triton_op

TRACED = Path(__file__).with_name("traced.py")
NAMES = tuple(calls("cpu"))


def traced(*checks: str) -> None:
    """Run some of CHECKS in traced.py, in a process where kernels are compiled ones."""
    done = python(str(TRACED), *checks)
    assert done.returncode == 0, done.stderr[-6000:]


def test_every_public_kernel_has_a_call() -> None:
    """The checks below reach what calls.py lists; traced.py fails for an operator left out."""
    public = {name for name in kernels.__all__ if name[0].islower()}
    assert {name.split()[0] for name in NAMES} == public


def test_operators_under_torch_s_tracers() -> None:
    """Opcheck, fake CUDA tensors with gradients, graphs for fixed shapes; what is launched."""
    traced("launches", "fakes", "opcheck", "static")


@pytest.mark.slow
def test_operators_compiled_for_any_shape() -> None:
    traced("dynamic")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager_on_a_cpu(backend: str, name: str) -> None:
    """There the compiler takes the reference, and eager calls what is fastest: one result."""
    torch._dynamo.reset()
    call = calls("cpu")[name]
    got = call.results(torch.compile(call.fn, fullgraph=True, backend=backend))
    for mine, theirs in zip(got, call.results(), strict=True):
        # sums are added up in another order
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_two_threads_register_an_operator_once() -> None:
    """The second comes while the first is at it, and waits."""
    begun, go_on = Event(), Event()
    registered: list[Any] = []

    def setup(op: Any) -> None:
        registered.append(op)
        begun.set()
        assert go_on.wait(60)

    @lazy_triton_op("registered_by_two_threads", setup=setup)
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    register: Callable[[], bool] = double.register  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(register)
        assert begun.wait(60)
        second = pool.submit(register)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.2)
        go_on.set()
        assert first.result()
        assert second.result()
    assert len(registered) == 1
    assert double(torch.ones(1)) == 2
