"""Run everything that wants a GPU: tests, kernels, sampling, training, report.

    python bench/gpu_all.py --upstream PATH    all of it
    python bench/gpu_all.py --quick            one model and few shapes

Tests run first, and a failed test ends the run, since the speed of wrong results means nothing.
`--only` runs single steps. Commit what it leaves in bench/results/ and in the tables of docs/.
"""

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lib.harness import environment
from lib.options import parser, save

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("tests", "kernels", "sampling", "reconstruction", "training", "report")
_DRAWING = ("--models", "titok-l-32", "--batch", "1", "32", "--repeats", "5")
_QUICK = {
    "kernels": ("--quick",),
    "sampling": _DRAWING,
    "reconstruction": _DRAWING,
    "training": ("--models", "titok-l-32", "--stages", "stage1", "generator", "--rounds", "1"),
}


def command(step: str, quick: bool, results: Path, upstream: Path | None) -> list[str]:
    """What a benchmark step runs, from the root."""
    line = [sys.executable, f"bench/{step}.py"]
    if step == "report":
        return line
    line += ["--json", str(results)]
    if quick:
        line += _QUICK[step]
    if upstream is not None and step != "kernels":  # kernels.py has upstream's lines itself
        line += ["--upstream", str(upstream)]
    return line


def run_tests(results: Path) -> int:
    """Run the suite with the tests marked gpu, leave a record of it, return its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # on this machine no kernel is interpreted, so the quick tests are GPU tests too
        line = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", f"--junitxml={report}"]
        began = time.perf_counter()
        status = subprocess.run(line, cwd=ROOT).returncode
        record = {
            "benchmark": "gpu-tests",
            "environment": environment("cuda"),
            "command": "pytest -m 'not slow'",
            "exit_status": status,
            "seconds": time.perf_counter() - began,
            **(outcome(report.read_text()) if report.exists() else {}),
        }
    save(str(results), record)
    return status


def outcome(junit: str) -> dict[str, Any]:
    """Counts and the tests that failed, from pytest's JUnit report."""
    cases = list(ElementTree.fromstring(junit).iter("testcase"))
    failed = [case for case in cases if {"failure", "error"} & {child.tag for child in case}]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "failed": sorted(f"{case.get('classname')}::{case.get('name')}" for case in failed),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; 0 if all of them succeeded, 2 without a GPU."""
    p = parser(__doc__, "upstream")
    p.add_argument("--quick", action="store_true", help="few shapes")
    p.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, metavar="STEP")
    results = ROOT / "bench" / "results"
    p.add_argument("--results", type=Path, default=results, metavar="FOLDER")
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_all wants a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    args.results.mkdir(parents=True, exist_ok=True)
    failed = []
    for step in [s for s in STEPS if s in args.only]:
        print(f"== {step}", flush=True)
        if step == "tests":
            status = run_tests(args.results)
        else:
            line = command(step, args.quick, args.results, args.upstream)
            status = subprocess.run(line, cwd=ROOT).returncode
        if status:
            failed.append(step)
        if failed == ["tests"]:
            break
    print(f"failed: {', '.join(failed)}" if failed else "to commit: bench/results and docs/results")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
