"""A checkout of bytedance/1d-tokenizer, where TITOK_UPSTREAM names one."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = os.environ.get("TITOK_UPSTREAM", "")
needs_upstream = pytest.mark.skipif(
    not CHECKOUT, reason="TITOK_UPSTREAM names no checkout of bytedance/1d-tokenizer"
)
PACKAGES = ("modeling", "utils", "data", "evaluator")


@contextmanager
def official(module: str) -> Iterator[ModuleType]:
    """A module of the checkout. Its packages have common names, so nothing of them stays behind."""
    root = Path(__file__).resolve().parents[2]
    before = sys.path[:]
    # transformers probes for another project's `kernels`: our folder must not answer
    sys.path[:] = [CHECKOUT, *(p for p in before if p and Path(p).resolve() != root)]
    try:
        yield importlib.import_module(module)
    finally:
        sys.path[:] = before
        for name in [n for n in sys.modules if n.split(".")[0] in PACKAGES]:
            del sys.modules[name]
