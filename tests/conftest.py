"""Shared fixtures. Without a GPU, kernels under test run in Triton's interpreter."""

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

# `python -m pytest` puts the repository's root here, where transformers and diffusers would take
# the folder kernels/ for another project's package
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

if os.environ.get("TITOK_REQUIRE_EXTRAS") == "1":
    # CI has installed every extra: one that cannot be imported is a fault, not a reason to skip
    pytest.importorskip = lambda name, *_, **__: importlib.import_module(name)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark `extras` each test that asks for an optional package, or whose file does for all."""
    tests = [item for item in items if isinstance(item, pytest.Function)]
    own = {test.function: inspect.getsource(test.function) for test in tests}
    shared = {test.path: test.path.read_text() for test in tests}
    for test in tests:
        shared[test.path] = shared[test.path].replace(own[test.function], "")
    for test in tests:
        if "importorskip" in own[test.function] + shared[test.path]:
            test.add_marker("extras")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _float32_products_as_found() -> Iterator[None]:
    """A training run turns TF32 on for its whole process."""
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(before[0])
    cudnn.allow_tf32, cudnn.benchmark = before[1:]


@pytest.fixture(autouse=True, scope="session")
def _no_cache_in_the_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """TiTokPipeline.compile keeps compiled code in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@contextmanager
def _single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What is compared bit by bit: the order of float32 sums follows the number of threads."""
    with _single_thread():
        yield


@pytest.fixture(scope="module")
def one_thread_for_all() -> Iterator[None]:
    """`one_thread` for a whole file, whose module-scoped fixtures compute as well."""
    with _single_thread():
        yield
