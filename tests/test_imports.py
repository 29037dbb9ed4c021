"""What an import costs and drags in, and which way imports point."""

import ast
import re
import statistics
from pathlib import Path

import pytest
from support.processes import ROOT, python

HEAVY = ("torchvision", "transformers", "einops", "flash_attn", "xformers", "matplotlib", "skimage")


def test_import_needs_neither_network_nor_gpu_nor_heavy_packages(tmp_path: Path) -> None:
    code = f"""
import socket, sys
def refuse(*args, **options): raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch
torch.cuda.init = torch.cuda._lazy_init = refuse
import titok_fast
from titok_fast import *
print([name for name in {HEAVY!r} if name in sys.modules])
print(sorted(set(titok_fast.__all__) - set(dir(titok_fast))))
"""
    done = python("-c", code, cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_import_takes_at_most_half_a_second_more_than_torch(tmp_path: Path) -> None:
    code = """
import time, torch
start = time.process_time()
import titok_fast
print(time.process_time() - start)
"""
    # processor time: the wall clock also counts whatever else runs on a test machine
    times = [float(python("-c", code, cwd=tmp_path).stdout) for _ in range(3)]
    assert statistics.median(times) < 0.5, times


def imports_of(path: Path) -> set[str]:
    """Modules named by the import statements of a file, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert len(found) > 5
    return found


def test_kernels_import_nothing_from_the_model_layer() -> None:
    for path in files("kernels"):
        ours = {name for name in imports_of(path) if name.split(".")[0] == "titok_fast"}
        wrong = {n for n in ours if not (n + ".").startswith("titok_fast.kernels.")}
        assert wrong <= {"titok_fast"}, f"{path.name} imports {sorted(wrong)}"
        assert "titok_fast" not in ours or all(n == "titok_fast.kernels" for n in wrong)


def test_nothing_imports_tests_or_benchmarks() -> None:
    for path in [*files("titok_fast"), *files("kernels")]:
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert not roots & {"bench", "tests", "harness", "conftest", "kernels"}, path.name


def test_bare_kernels_is_refused() -> None:
    done = python("-c", "import kernels")
    assert done.returncode != 0
    assert "ImportError: this folder is the package titok_fast.kernels: install" in done.stderr


def packages() -> list[Path]:
    found = sorted(path.parent for path in (ROOT / "titok_fast").rglob("__init__.py"))
    assert len(found) > 10
    return found


@pytest.mark.parametrize("package", packages(), ids=lambda path: path.name)
def test_a_package_names_its_files_in_reading_order(package: Path) -> None:
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    assert text is not None
    _, order, listed = text.partition("Reading order:")
    assert order
    names = re.findall(r"[a-z_0-9]+", listed.partition(".")[0])
    parts = [p for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    assert sorted(names) == sorted(p.stem for p in parts if not p.stem.startswith("__"))


def test_the_root_stays_small() -> None:
    assert len(list((ROOT / "titok_fast").glob("*.py"))) <= 12
