"""Fixtures of the kernel tests: where kernels run, and poisoned uninitialised memory."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from calls import DEVICE
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from titok_fast.kernels._launch import interpret_on_cpu


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fill uninitialised tensors with NaN or the largest integer.

    PyTorch does so in deterministic mode; warn_only allows the operations that it would refuse.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_before = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_before)


def _dot(self: InterpreterBuilder, a: Any, b: Any, d: Any, *_: Any) -> TensorHandle:
    """Matmul of two interpreted tiles; Triton 3.8 multiplies bfloat16 bit patterns."""
    x, y = (
        (tile.data.astype(np.uint32) << 16).view(np.float32)
        if tile.dtype.scalar == tl.bfloat16
        else tile.data
        for tile in (a, b)
    )
    return TensorHandle(np.matmul(x, y, dtype=d.data.dtype) + d.data, d.dtype.scalar)


_convert_float = interpreter._convert_float


def _convert(x: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
    """Triton 3.8 truncates float32 where a GPU rounds, and misreads subnormal bfloat16."""
    if source == tl.float32 and target == tl.bfloat16:
        return torch.tensor(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    if source == tl.bfloat16 and target == tl.float32:
        return x.view(np.uint16).astype(np.uint32) << 16
    return _convert_float(x, source, target, mode)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run Triton kernels: on CUDA where there is one, else on CPU tensors by the interpreter."""
    if torch.cuda.is_available():
        yield
        return
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _dot)
    monkeypatch.setattr(interpreter, "_convert_float", _convert)
    # NumPy warns of infinities and NaN, which some tests use
    with interpret_on_cpu(), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture
def device(interpreted: None) -> torch.device:
    """Where kernels run: a test that asks for it takes no reference, even on a CPU."""
    return DEVICE


@pytest.fixture(params=["reference", "kernel"])
def op_device(request: pytest.FixtureRequest) -> torch.device:
    """The device on which this implementation runs."""
    if request.param == "reference":
        return torch.device("cpu")
    kernels_on: torch.device = request.getfixturevalue("device")
    return kernels_on
