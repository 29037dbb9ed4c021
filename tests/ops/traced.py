"""Every operator under torch's own tracers, with or without a GPU. Run by test_registration.py.

    TRITON_INTERPRET=0 python tests/ops/traced.py opcheck static dynamic

torch traces compiled kernels, which need a GPU, and refuses interpreted ones. So kernels here are
compiled ones until their launch, which the interpreter runs. What Inductor makes of the graphs is
tested on a GPU (test_gpu_calls.py).
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton
from calls import DEVICE, OpCall, calls
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction, mangle_type

import titok_fast.kernels
from titok_fast.kernels import _launch, nearest_code

found: list[fx.Node] = []  # launches in the graphs of the last compilation
launched: dict[str, dict[str, set[str]]] = {}  # kernel: argument: Triton types at its launches


def interpret_launches() -> None:
    """Run every launch in the interpreter, and pretend that there is a GPU to compile for."""
    interpreted = lru_cache(interpreter.InterpretedFunction)

    def run(kernel: JITFunction, *args: Any, **options: Any) -> None:
        interpreted(kernel.fn).run(*args, **options)

    def call(kernel: JITFunction, *args: Any, **options: Any) -> Any:
        # Triton leaves its language patched, and torch then fails to parse the next kernel
        scope = interpreter._patch_lang(kernel.fn)
        try:
            return interpreted(kernel.fn).rewrite()(*args, **options)
        finally:
            scope.restore()

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 80, 32)

    JITFunction.run, JITFunction.__call__ = run, call
    triton.runtime.driver.set_active(Driver())
    _launch._interpret_on_cpu = True
    np.seterr(all="ignore")


def note_launches() -> None:
    launch = JITFunction.run

    def run(kernel: JITFunction, *args: Any, **options: Any) -> Any:
        types = launched.setdefault(kernel.__name__, {})
        for parameter, arg in zip(kernel.params, args, strict=False):
            if not parameter.is_constexpr:
                types.setdefault(parameter.name, set()).add(mangle_type(arg))
        return launch(kernel, *args, **options)

    JITFunction.run = run


def kernel_modules() -> list[ModuleType]:
    found = pkgutil.iter_modules(titok_fast.kernels.__path__, "titok_fast.kernels.")
    return [importlib.import_module(module.name) for module in found]


def registered_ops() -> set[str]:
    """Register every operator of the package; return their names."""
    for module in kernel_modules():
        for value in vars(module).values():
            if hasattr(getattr(value, "register", None), "_dynamo_marked_constant"):
                value.register()
    every = torch._C._dispatch_get_all_op_names()
    return {name for name in every if name.startswith("titok_fast::")}


class Operators(TorchDispatchMode):
    """Records calls of our operators, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "titok_fast":
            forward = torch._C._current_graph_task_id() < 0  # a backward is not differentiable
            fresh = [
                x.detach().clone().requires_grad_(x.requires_grad and forward)
                if isinstance(x, Tensor)
                else x
                for x in args
            ]
            self.noted.append((func, tuple(fresh)))
        return func(*args, **(kwargs or {}))


def check_launches() -> None:
    """The offline report compiles what is launched: the same kernels and argument types."""
    for call in calls(DEVICE).values():
        call.results()
    listed: dict[str, dict[str, set[str]]] = {}
    for module in kernel_modules():
        for case in getattr(module, "offline_cases", list)():
            for name, kind in case.signature.items():
                types = listed.setdefault(case.kernel.__name__, {}).setdefault(name, set())
                types.add(kind.removesuffix(":16").replace("i1", "u1"))  # two names of a bool
    assert listed.keys() == launched.keys()
    for kernel, given in launched.items():
        for name, types in given.items():
            # a pointer that is not read may be any other tensor
            assert types & listed[kernel][name], f"{kernel}: {name} is launched as {types}"


def check_fakes() -> None:
    """On fake CUDA tensors every operator and its gradient has the right shape, dtype and device.

    None waits: a fake tensor has no value to wait for. The gradient formula is called directly:
    torch's engine needs a real device.
    """
    want = {name: [facts(x) for x in call.outputs()] for name, call in calls("cpu").items()}
    with FakeTensorMode():
        for name, call in calls("cuda").items():
            with Operators() as operators:
                outputs = call.with_gradients().outputs()
            assert [facts(x) for x in outputs] == want[name]
            assert all(x.device.type == "cuda" for x in outputs)
            for op, args in operators.noted:
                check_fake_gradient(op, args)
        codebook = torch.empty(4096, 12, device="cuda")
        for rows in (0, 5000):  # none, and enough that no codebook is shared
            ids = nearest_code(torch.empty(rows, 12, device="cuda"), codebook)
            assert (facts(ids), ids.device.type) == (((rows,), (1,), torch.int64), "cuda")


def check_fake_gradient(op: Any, args: tuple) -> None:
    if not any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return
    out = op(*args)
    node = next(x.grad_fn for x in (out if isinstance(out, tuple) else [out]) if x.requires_grad)
    given = [torch.empty(m.shape, dtype=m.dtype, device="cuda") for m in node._input_metadata]
    with torch.no_grad():
        gradients = node.apply(*given)
    for x, gradient in zip(args, gradients, strict=False):
        if isinstance(x, Tensor) and x.requires_grad:
            assert (gradient.shape, gradient.dtype, gradient.device) == (x.shape, x.dtype, x.device)


def facts(x: Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype


def check_operators() -> None:
    checked = set()
    for call in calls(DEVICE).values():
        with Operators() as operators:
            call.results()
        for op, args in operators.noted:
            say(f"opcheck of {op}")
            checks = ("test_schema", "test_autograd_registration", "test_faketensor")
            opcheck(op, args, test_utils=checks)
            out = op(*args)
            if not (out if isinstance(out, Tensor) else out[0]).is_floating_point():
                # torch adds all outputs to the first one, which fails for integers: no gradients
                args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
            opcheck(op, args, test_utils="test_aot_dispatch_dynamic")
            checked.add(op.name())
    missing = registered_ops() - checked
    assert not missing, f"no call in calls.py reaches {sorted(missing)}"


def look(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """A backend that runs the graph unchanged, and checks its kernels."""
    nodes = [n for n in graph.graph.nodes if n.target is triton_kernel_wrapper_functional]
    for node in nodes:
        for name in node.kwargs["tensors_to_clone"]:
            # torch copies tensors that a kernel writes: for an input that would be an extra pass
            assert node.kwargs["kwargs"][name].op != "placeholder", f"{name} counts as written"
    found.extend(nodes)
    return make_boxed_func(graph.forward)


def check_compiled(call: OpCall, fn: Any) -> None:
    found.clear()
    for mine, theirs in zip(call.results(fn), call.results(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        assert mine.stride() == theirs.stride()


def check_all_compiled(*, dynamic: bool) -> None:
    """The graphs contain the kernels; compiled for any shape, a call takes another batch size."""
    more = calls(DEVICE, batch=5)
    for name, call in calls(DEVICE).items():
        say(f"{name}, {dynamic=}")
        backend = aot_autograd(fw_compiler=look)
        fn = torch.compile(call.fn, fullgraph=True, dynamic=dynamic, backend=backend)
        check_compiled(call, fn)
        if dynamic:
            check_compiled(more[name], fn)
        else:
            assert found, "no kernel in the graph"


def say(what: str) -> None:
    """Announce the next check, to give a traceback its context."""
    sys.stderr.write(what + "\n")


CHECKS = {
    "launches": check_launches,
    "fakes": check_fakes,
    "opcheck": check_operators,
    "static": partial(check_all_compiled, dynamic=False),
    "dynamic": partial(check_all_compiled, dynamic=True),
}

if __name__ == "__main__":
    if DEVICE.type == "cpu":
        interpret_launches()
    note_launches()
    registered_ops()
    # uninitialised memory is filled with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    for asked in sys.argv[1:]:
        CHECKS[asked]()
