"""Machine code of every kernel, judged without a GPU.

    python bench/offline.py [--json FILE] [--arch 90 ...] [--cache DIR] [--limit-s 300]

Compiles each kernel at the published shapes for sm_80, 86, 89 and 90 with Triton's own assembler
and prints registers, spills, shared memory, occupancy, instruction mix, and the time below which
physics forbids to go. Exit status 1 if a row breaks a rule of `failures`: then the table says
which; or if all of it took longer than the limit. Results are cached by source, so only what
changed is compiled again.
"""

import argparse
import hashlib
import importlib
import json
import os
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

import titok_fast.kernels
from titok_fast.costs import DEVICES
from titok_fast.kernels._machine_code import MachineCode
from titok_fast.kernels._offline import OfflineCase, compile_offline

DEFAULT_CACHE = Path.home() / ".cache" / "titok_fast" / "kernel_report"


@dataclass(frozen=True)
class Limits:
    """Resources of one streaming multiprocessor, from the CUDA programming guide's table."""

    warps: int
    programs: int
    shared: int  # bytes per multiprocessor
    shared_program: int  # bytes that one program may have


LIMITS = {
    80: Limits(warps=64, programs=32, shared=164 << 10, shared_program=163 << 10),
    86: Limits(warps=48, programs=16, shared=100 << 10, shared_program=99 << 10),
    89: Limits(warps=48, programs=24, shared=100 << 10, shared_program=99 << 10),
    90: Limits(warps=64, programs=32, shared=228 << 10, shared_program=227 << 10),
}
_REGISTERS = 65536  # per multiprocessor, on all four
_REGISTER_UNIT = 256  # allocated to a warp in such steps
_SHARED_RESERVED = 1 << 10  # per program, taken by the driver


@dataclass(frozen=True)
class Peak:
    """Data-sheet peaks: bytes/s of memory, float32 and dense bf16 tensor-core operations/s."""

    memory: float
    fp32: float
    tensor: float


PEAKS = {
    name: Peak(card.gbps * 1e9, card.tflops["float32"] * 1e12, card.tflops["bfloat16"] * 1e12)
    for name, card in (("a100", DEVICES["a100-sxm-80gb"]), ("h100", DEVICES["h100-sxm"]))
}


def kernel_modules() -> list[str]:
    """Names of the files under kernels/ that list cases, helpers left out."""
    folder = Path(titok_fast.kernels.__file__).parent
    names = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    return [name for name in names if "def offline_cases(" in (folder / f"{name}.py").read_text()]


def occupancy(code: MachineCode, num_warps: int, arch: int) -> float:
    """Share of a multiprocessor's warps that can be resident, in [0, 1]."""
    limits = LIMITS[arch]
    per_warp = -(-max(1, code.registers) * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    programs = min(
        limits.programs,
        limits.warps // num_warps,
        _REGISTERS // per_warp // num_warps,
        limits.shared // (code.shared_bytes + _SHARED_RESERVED),
    )
    return programs * num_warps / limits.warps


def floor_us(case: OfflineCase, peak: Peak) -> float:
    """The larger of the times that memory and arithmetic need at their peaks, in microseconds."""
    operations = peak.tensor if case.expects_mma else peak.fp32
    return 1e6 * max(case.bytes_min / peak.memory, case.flops / operations)


def report_row(case: OfflineCase, arch: int, code: MachineCode) -> dict[str, Any]:
    """One line of the table; `failures` of it come last."""
    row = {
        "kernel": case.kernel.__name__.strip("_").removesuffix("_kernel"),
        "config": case.config,
        "arch": f"sm_{arch}",
        **asdict(code),
        "occupancy": round(occupancy(code, case.num_warps, arch), 3),
        "num_warps": case.num_warps,
        "bytes_min": case.bytes_min,
        "bytes_unfused": case.bytes_unfused,
        "flops": case.flops,
        **{f"floor_us_{name}": round(floor_us(case, p), 3) for name, p in PEAKS.items()},
        # what the plain operators need for their traffic alone
        "unfused_us_a100": round(1e6 * case.bytes_unfused / PEAKS["a100"].memory, 3),
    }
    row["failures"] = failures(row, case.expects_mma, case.vector_loads)
    return row


def failures(row: dict[str, Any], expects_mma: bool, vector_loads: bool) -> list[str]:
    """The rules that a row breaks, in words.

    Args:
        row: with arch ("sm_80") and the figures of `MachineCode`.
        expects_mma: whether tensor-core instructions must be there; if not, they must not.
        vector_loads: whether there must be streams, read in 128 bits and found by 64-bit offsets.

    Returns:
        One sentence each; empty if the row passes.
    """
    limit = LIMITS[int(row["arch"].removeprefix("sm_"))].shared_program
    broken = []
    if row["spill_bytes"] or row["stack_bytes"]:
        broken.append(f"{row['spill_bytes']} B of spills, {row['stack_bytes']} B of stack")
    if row["shared_bytes"] > limit:
        broken.append(f"{row['shared_bytes']} B of shared memory, {limit} B is the limit")
    if expects_mma and not row["mma"]:
        broken.append("a matrix product without tensor-core instructions")
    if not expects_mma and row["mma"]:
        broken.append(f"{row['mma']} tensor-core instructions where IEEE float32 is promised")
    if vector_loads:
        if not row["streams"]:
            broken.append("no stream: no load has 16 bytes for every thread")
        if row["narrow_streams"]:
            broken.append(f"read in less than 128 bits: {', '.join(row['narrow_streams'])}")
        if row["short_offsets"]:
            broken.append(f"rows found by 32-bit offsets: {', '.join(row['short_offsets'])}")
    if row["registers"] == 0:
        broken.append("the assembler reported no registers")
    return broken


@cache
def _readers() -> str:
    """Source of the files that compile, and read what comes of it."""
    files = [importlib.import_module(c.__module__).__file__ for c in (OfflineCase, MachineCode)]
    return "\n".join(Path(file or "").read_text() for file in files)


def _key(case: OfflineCase, arch: int) -> str:
    """Hash of all that decides the machine code: the config's name and shape counts do not."""
    choices = (dict(case.signature), dict(case.constexprs), case.num_warps, case.num_stages, arch)
    # Triton's own key of a kernel covers the helpers and globals that it uses
    parts = [case.kernel.cache_key, repr(choices), triton.__version__, _readers()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _path(case: OfflineCase, arch: int, cache: Path) -> Path:
    return cache / f"{_key(case, arch)}.json"


def _compiled(case: OfflineCase, arch: int, cache: Path) -> MachineCode:
    path = _path(case, arch, cache)
    if path.exists():
        return MachineCode(**json.loads(path.read_text()))
    code = compile_offline(case, arch)
    cache.mkdir(parents=True, exist_ok=True)
    # renamed into place: two runs may share the cache
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(asdict(code)))
    part.replace(path)
    return code


def _cases(name: str) -> list[OfflineCase]:
    cases: list[OfflineCase] = importlib.import_module(f"titok_fast.kernels.{name}").offline_cases()
    return cases


def _fill(name: str, index: int, arch: int, cache: Path) -> None:
    _compiled(_cases(name)[index], arch, cache)


def _fill_cache(archs: list[int], cache: Path) -> None:
    """Compile what the cache lacks, in one process for each processor."""
    lacking = {
        path: (name, index, arch, cache)
        for name in kernel_modules()
        for index, case in enumerate(_cases(name))
        for arch in archs
        if not (path := _path(case, arch, cache)).exists()
    }
    if lacking:
        with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
            list(pool.map(_fill, *zip(*lacking.values(), strict=True)))


def build_report(archs: list[int], cache: Path) -> list[dict[str, Any]]:
    """Rows of all kernels on the given architectures."""
    _fill_cache(archs, cache)
    return [
        {"module": name} | report_row(case, arch, _compiled(case, arch, cache))
        for name in kernel_modules()
        for case in _cases(name)
        for arch in archs
    ]


_COLUMNS = {
    "kernel": "kernel",
    "config": "config",
    "arch": "arch",
    "registers": "regs",
    "spill_bytes": "spill",
    "shared_bytes": "shared",
    "occupancy": "occup",
    "mma": "mma",
    "fma": "fma",
    "loads_128": "ld128",
    "loads_narrow": "ld<128",
    "bytes_min": "MB min",
    "bytes_unfused": "MB unfused",
    "flops": "GFLOP",
    "floor_us_a100": "A100 us",
    "floor_us_h100": "H100 us",
}
_UNITS = {"bytes_min": 1e6, "bytes_unfused": 1e6, "flops": 1e9}


def table(rows: list[dict[str, Any]]) -> str:
    """The report as aligned text, failures after the row they belong to."""

    def cell(row: dict[str, Any], column: str) -> str:
        value = row[column]
        if column in _UNITS:
            return f"{value / _UNITS[column]:.3f}"
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    cells = [list(_COLUMNS.values())] + [[cell(row, c) for c in _COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    told = [[], *(row["failures"] for row in rows)]
    return "\n".join(
        line + "".join(f"\n    FAILS: {why}" for why in whys)
        for line, whys in zip(lines, told, strict=True)
    )


def _processor_seconds() -> float:
    """Time this process and its assemblers have worked: a clock would time the neighbours too."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main(argv: list[str] | None = None) -> int:
    """Print the table; 0 if every row passes, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--arch", type=int, nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument(
        "--limit-s", type=float, default=float("inf"), help="fail if it takes longer"
    )
    args = parser.parse_args(argv)

    rows = build_report(args.arch, args.cache)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    failed = sum(bool(row["failures"]) for row in rows)
    seconds = _processor_seconds()
    print(f"{len(rows)} rows, {failed} failed, {seconds:.0f} s of one processor")
    if seconds > args.limit_s:
        print(f"FAILS: the gate may take {args.limit_s:.0f} s")
    return int(failed > 0 or seconds > args.limit_s)


if __name__ == "__main__":
    sys.exit(main())
