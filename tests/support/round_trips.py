"""What the tests of titok_fast.integrations share."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from titok_fast.integrations import accelerate, restore
from titok_fast.kernels._launch import interpret_on_cpu

KERNELS = [
    "find_codes",
    "nearest_code_stats",
    "group_norm_silu",
    "soft_codes",
    "guided_sample",
    "remask",
]

Call = Callable[[], Any]


def bits(value: Any) -> Any:
    """Tensors as bytes, anything around them as it is."""
    if isinstance(value, Tensor):
        raw = value.detach().reshape(-1).view(torch.uint8)
        return value.dtype, value.shape, raw.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, list | tuple) else value


def alike(got: Any, want: Any, atol: float) -> None:
    """Integers equal, floats within atol, NaN where NaN was, same structure."""
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
        tolerance = atol if want.is_floating_point() else 0.0
        torch.testing.assert_close(got, want, rtol=0.0, atol=tolerance, equal_nan=True)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        alike(list(got.values()), list(want.values()), atol)
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            alike(a, b, atol)
    else:
        assert got == want


def round_trip(obj: Any, call: Call, atol: float = 1e-5, interpreted: bool = False) -> None:
    """`call` must give the same results and leave the same random stream in all three states.

    Kernels run in Triton's interpreter if asked for; else CPU tensors take their references.
    """
    if interpreted and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is present, so Triton was imported without its interpreter")

    def run() -> tuple[Any, Tensor]:
        torch.manual_seed(1)
        return call(), torch.get_rng_state()

    kind, (before, stream) = type(obj), run()
    assert accelerate(obj) is obj
    with interpret_on_cpu() if interpreted else nullcontext():
        during, stream_during = run()
    assert restore(obj) is obj
    assert type(obj) is kind
    after, _ = run()
    alike(during, before, atol)
    assert torch.equal(stream, stream_during)
    assert bits(after) == bits(before)


def kernel_calls(patch: Any, *modules: Any) -> list[str]:
    """Names of the kernels' public functions, as `modules` call them from now on."""
    seen: list[str] = []

    def spied(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen.append(name)
            return kernel(*args, **options)

        return call

    for module in modules:
        for name in KERNELS:
            if hasattr(module, name):
                patch.setattr(module, name, spied(name, getattr(module, name)))
    return seen
