"""The offline gate: the machine code of every kernel, without a GPU.

Kernels are compiled here, so the work is done in processes without TRITON_INTERPRET.
"""

import ast
import importlib
import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.bench_scripts import BENCH, scripts
from support.processes import python

KERNELS = BENCH.parent / "kernels"
(report,) = scripts("offline")
pytestmark = pytest.mark.filterwarnings("ignore")


def check_report(archs: list[int], path: Path) -> None:
    done = python("bench/offline.py", "--json", str(path), "--arch", *map(str, archs))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = json.loads(path.read_text())
    assert {row["module"] for row in rows} == set(report.kernel_modules())
    assert {row["arch"] for row in rows} == {f"sm_{arch}" for arch in archs}
    for row in rows:
        assert not row["failures"]
        assert row["registers"] > 0
        assert 0 < row["occupancy"] <= 1
        assert 0 < row["floor_us_h100"] <= row["floor_us_a100"]
        assert row["bytes_min"] <= row["bytes_unfused"]


def test_tightest_architecture_passes(tmp_path: Path) -> None:
    """sm_86 has the least shared memory and the fewest warps."""
    check_report([86], tmp_path / "rows.json")


@pytest.mark.slow
def test_all_architectures_pass(tmp_path: Path) -> None:
    check_report([80, 86, 89, 90], tmp_path / "rows.json")


def test_every_kernel_that_is_launched_is_covered() -> None:
    """By name of the function: what sources launch is what `offline_cases` list, no more, no less.

    traced.py compares the types of the arguments as well, for the launches that it sees.
    """
    sources = [path.read_text() for path in KERNELS.glob("*.py")]
    launched = {name for text in sources for name in re.findall(r"\bwrap_triton\((\w+)\)", text)}
    modules = [importlib.import_module(f"titok_fast.kernels.{n}") for n in report.kernel_modules()]
    listed = {case.kernel.__name__ for module in modules for case in module.offline_cases()}
    assert launched == listed


@pytest.mark.parametrize("name", report.kernel_modules())
def test_design_is_told_in_the_head(name: str) -> None:
    """Fifteen lines are enough for tiling, reason, floor and what share of it to expect."""
    head = ast.get_docstring(ast.parse((KERNELS / f"{name}.py").read_text())) or ""
    assert len(head.splitlines()) <= 15
    assert "Floor" in head
    assert re.search("expect|predict", head, re.IGNORECASE)


GOOD = {
    "arch": "sm_86",
    "registers": 64,
    "spill_bytes": 0,
    "stack_bytes": 0,
    "shared_bytes": 1024,
    "mma": 4,
    "streams": ["x_ptr"],
    "narrow_streams": [],
    "short_offsets": [],
}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"spill_bytes": 8}, "8 B of spills"),
        ({"stack_bytes": 16}, "16 B of stack"),
        ({"shared_bytes": (99 << 10) + 1}, "101376 B is the limit"),
        ({"arch": "sm_80", "shared_bytes": (163 << 10) + 1}, "166912 B is the limit"),
        ({"mma": 0}, "without tensor-core"),
        ({"streams": []}, "no stream"),
        ({"narrow_streams": ["x_ptr"]}, "less than 128 bits: x_ptr"),
        ({"short_offsets": ["x_ptr"]}, "32-bit offsets: x_ptr"),
        ({"registers": 0}, "no registers"),
    ],
)
def test_a_bad_row_fails(change: dict[str, Any], told: str) -> None:
    assert report.failures(GOOD, expects_mma=True, vector_loads=True) == []
    (why,) = report.failures(GOOD | change, expects_mma=True, vector_loads=True)
    assert told in why


def test_rules_follow_the_promises_of_a_case() -> None:
    bad = GOOD | {"streams": [], "narrow_streams": ["x_ptr"], "short_offsets": ["x_ptr"]}
    assert report.failures(bad, expects_mma=True, vector_loads=False) == []
    (why,) = report.failures(GOOD, expects_mma=False, vector_loads=True)
    assert "IEEE" in why


BAD = """
import sys
from dataclasses import replace
sys.path.insert(0, "bench")
import offline
from titok_fast.kernels import guided_sample, nearest_code  # the functions; their modules hide
search = sys.modules["titok_fast.kernels.nearest_code"].offline_cases()[0]
sample = sys.modules["titok_fast.kernels.guided_sample"].offline_cases()[0]

spills = replace(
    search, num_warps=4, constexprs=search.constexprs | {"BLOCK_R": 128, "BLOCK_N": 128}
)
# rows that need not begin at a multiple of 16 bytes; the other stream stays as it was
narrow = replace(sample, signature=sample.signature | {"uncond_stride_k": "i32"})
offline.kernel_modules = lambda: ["nearest_code"]
sys.modules["titok_fast.kernels.nearest_code"].offline_cases = lambda: [
    search, spills, sample, narrow
]
sys.exit(offline.main(["--arch", "80", "--cache", sys.argv[1], "--limit-s", sys.argv[2]]))
"""


def test_bad_kernels_fail_the_gate(tmp_path: Path) -> None:
    """Through compiler, assembler, table and exit status; the good ones beside them pass."""
    done = python("-c", BAD, str(tmp_path), "600")
    assert done.returncode == 1, done.stdout + done.stderr
    spills, narrow = (line for line in done.stdout.splitlines() if line.startswith("FAILS"))
    assert re.match(r"FAILS: search \[.*\] sm_80: \d+ B of spills", spills)
    assert narrow.startswith("FAILS: guided_sample [")
    assert narrow.endswith("] sm_80: read in less than 128 bits: uncond_ptr")
    assert "4 rows, 2 failed" in done.stdout
    assert len(list(tmp_path.glob("*.json"))) == 4


def test_a_gate_that_takes_too_long_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "build_report", lambda archs, cache: [])
    monkeypatch.setattr(report, "_processor_seconds", lambda: 301.0)
    assert report.main(["--limit-s", "302"]) == 0
    assert report.main(["--limit-s", "300"]) == 1
    assert "FAILS: the gate may take 300 s" in capsys.readouterr().out


def test_cache_is_read_and_follows_the_source(tmp_path: Path) -> None:
    """A kernel that cannot be compiled: only a cache that knows it can answer."""
    kernel = SimpleNamespace(cache_key="one", __name__="_fake_kernel")
    case = report.OfflineCase(kernel, "c", {}, {}, flops=1.0, bytes_min=1.0, bytes_unfused=1.0)
    code = report.MachineCode(40, 0, 0, 0, 0, 0, 0, 0, ["x_ptr"])
    entry = report.cache_path(case, 80, tmp_path)
    entry.write_text(json.dumps(asdict(code)))
    assert report.compile_cached(case, 80, tmp_path) == code
    other = SimpleNamespace(cache_key="two", __name__="_fake_kernel")
    changed = [
        replace(case, kernel=other),
        replace(case, num_warps=8),
        replace(case, constexprs={"BLOCK": 2}),
        replace(case, signature={"x_ptr": "*fp32"}),
    ]
    paths = [report.cache_path(other_case, 80, tmp_path) for other_case in changed]
    assert len({entry, report.cache_path(case, 90, tmp_path), *paths}) == 6


def test_interpreted_kernels_are_refused() -> None:
    case = importlib.import_module("titok_fast.kernels.soft_codes").offline_cases()[0]
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled in this process")
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        report.compile_offline(case, 80)


def test_occupancy() -> None:
    """By hand: 64 registers for 8 warps are 16384 of 65536; 20 KiB of shared memory fit 7 times."""
    free = report.MachineCode(64, 0, 0, 0, 0, 0, 1, 0)
    assert report.occupancy(free, 8, 80) == 4 * 8 / 64
    full = replace(free, registers=16, shared_bytes=20 << 10)
    assert report.occupancy(full, 4, 80) == 7 * 4 / 64
