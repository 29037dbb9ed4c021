"""Operators in torch: registered once, checked by opcheck, the same compiled as eager.

None of it needs a GPU. test_gpu_calls.py checks on one what Inductor writes around the kernels, and
runs their machine code.
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
    done = python(str(TRACED), *checks)
    assert done.returncode == 0, done.stderr[-6000:]


def test_every_public_kernel_has_a_call() -> None:
    """The checks below run the calls in calls.py; traced.py fails if an operator has none."""
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
    """The compiler uses the reference, eager the fastest CPU code, with one result."""
    torch._dynamo.reset()
    call = calls("cpu")[name]
    got = call.results(torch.compile(call.fn, fullgraph=True, backend=backend))
    for mine, theirs in zip(got, call.results(), strict=True):
        # sums are in another order
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_two_threads_register_an_operator_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second thread comes while the first is registering, and waits."""
    begun, go_on = Event(), Event()
    registered: list[Any] = []
    triton_op = torch.library.triton_op

    def slow_triton_op(*args: Any, **options: Any) -> Any:
        registered.append(args)
        begun.set()
        assert go_on.wait(60)
        return triton_op(*args, **options)

    monkeypatch.setattr(torch.library, "triton_op", slow_triton_op)

    @lazy_triton_op("registered_by_two_threads")
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
