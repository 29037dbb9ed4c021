"""Compile every kernel for four GPU architectures, without a GPU, and check the machine code.

    python bench/offline.py [--json FILE] [--arch 90 ...] [--cache DIR] [--limit-s 300]

Uses Triton's own assembler at the published shapes. Prints registers, spills, shared memory,
occupancy, instruction counts, and the least time that a data sheet allows. Exit status 1 if a row
breaks a rule of `failures`, or if the whole run used more processor time than the limit. Results
are cached by source: only what changed is compiled again.
"""

import hashlib
import importlib
import json
import os
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from lib import machine_code
from lib.harness import table, write_json
from lib.machine_code import MachineCode, compile_offline
from lib.options import parser

import titok_fast.kernels
from titok_fast.costs import DEVICES
from titok_fast.kernels._offline import OfflineCase

DEFAULT_CACHE = Path.home() / ".cache" / "titok_fast" / "kernel_report"
CARDS = {"a100": DEVICES["a100-sxm-80gb"], "h100": DEVICES["h100-sxm"]}


@dataclass(frozen=True)
class Limits:
    """Resources of one streaming multiprocessor, from the CUDA programming guide's table."""

    warps: int
    programs: int
    shared: int  # bytes


LIMITS = {
    80: Limits(warps=64, programs=32, shared=164 << 10),
    86: Limits(warps=48, programs=16, shared=100 << 10),
    89: Limits(warps=48, programs=24, shared=100 << 10),
    90: Limits(warps=64, programs=32, shared=228 << 10),
}
_REGISTERS = 65536  # per multiprocessor, on all four
_REGISTER_UNIT = 256  # granularity of a warp's allocation
_SHARED_RESERVED = 1 << 10  # bytes per program, taken by the driver


def kernel_modules() -> list[str]:
    """Names of the files under kernels/ that define `offline_cases`."""
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


def report_row(case: OfflineCase, arch: int, code: MachineCode) -> dict[str, Any]:
    """One line of the table, and the rules that it breaks under "failures"."""
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
    }
    for name, card in CARDS.items():
        tflops = card.tflops["bfloat16" if case.expects_mma else "float32"]
        seconds = max(case.bytes_min / (card.gbps * 1e9), case.flops / (tflops * 1e12))
        row[f"floor_us_{name}"] = round(1e6 * seconds, 3)
    # memory traffic of the plain operators alone
    row["unfused_us_a100"] = round(1e-3 * case.bytes_unfused / CARDS["a100"].gbps, 3)
    row["failures"] = failures(row, case.expects_mma, case.vector_loads)
    return row


def failures(row: dict[str, Any], expects_mma: bool, vector_loads: bool) -> list[str]:
    """The rules that a row breaks; `vector_loads` asks for wide streams with 64-bit offsets."""
    limit = LIMITS[int(row["arch"].removeprefix("sm_"))].shared - _SHARED_RESERVED
    broken = []
    if row["spill_bytes"] or row["stack_bytes"]:
        broken.append(f"{row['spill_bytes']} B of spills, {row['stack_bytes']} B of stack")
    if row["shared_bytes"] > limit:
        broken.append(f"{row['shared_bytes']} B of shared memory, {limit} B is the limit")
    if expects_mma and not row["mma"]:
        broken.append("a matmul without tensor-core instructions")
    if not expects_mma and row["mma"]:
        broken.append(f"{row['mma']} tensor-core instructions where IEEE float32 is promised")
    if vector_loads:
        if not row["streams"]:
            broken.append("no stream: no load has 16 bytes for every thread")
        if row["narrow_streams"]:
            broken.append(f"read in less than 128 bits: {', '.join(row['narrow_streams'])}")
        if row["short_offsets"]:
            broken.append(f"rows addressed by 32-bit offsets: {', '.join(row['short_offsets'])}")
    if row["registers"] == 0:
        broken.append("the assembler reported no registers")
    return broken


def cache_path(case: OfflineCase, arch: int, cache: Path) -> Path:
    """File named by a hash of all that decides the result; config name and costs do not."""
    choices = (dict(case.signature), dict(case.constexprs), case.num_warps, case.num_stages, arch)
    inspection = Path(machine_code.__file__).read_text()
    # Triton's own key of a kernel covers the helpers and globals that it uses
    parts = [case.kernel.cache_key, repr(choices), triton.__version__, inspection]
    return cache / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()}.json"


def compile_cached(case: OfflineCase, arch: int, cache: Path) -> MachineCode:
    """Machine code of a case, from the cache if it is there."""
    path = cache_path(case, arch, cache)
    if path.exists():
        return MachineCode(**json.loads(path.read_text()))
    code = compile_offline(case, arch)
    write_json(path, asdict(code))  # renamed into place: two runs may share the cache
    return code


def _cases(name: str) -> list[OfflineCase]:
    cases: list[OfflineCase] = importlib.import_module(f"titok_fast.kernels.{name}").offline_cases()
    return cases


def _fill(name: str, index: int, arch: int, cache: Path) -> None:
    compile_cached(_cases(name)[index], arch, cache)


def build_report(archs: list[int], cache: Path) -> list[dict[str, Any]]:
    """Rows of all kernels on these architectures, compiled in one process per processor."""
    todo = [
        (name, index, case, arch)
        for name in kernel_modules()
        for index, case in enumerate(_cases(name))
        for arch in archs
    ]
    lacking = {
        path: (name, index, arch, cache)  # kernels cannot be pickled, so a worker gets the index
        for name, index, case, arch in todo
        if not (path := cache_path(case, arch, cache)).exists()
    }
    if lacking:
        with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
            list(pool.map(_fill, *zip(*lacking.values(), strict=True)))
    return [
        {"module": name} | report_row(case, arch, compile_cached(case, arch, cache))
        for name, _, case, arch in todo
    ]


# keys of a row that are shown: as they are, and in larger units
_SHOWN = ("kernel", "config", "arch", "registers", "spill_bytes", "shared_bytes", "occupancy")
_SHOWN += ("mma", "fma", "loads_128", "loads_narrow", "floor_us_a100", "floor_us_h100")
_SCALED = {"MB min": ("bytes_min", 1e6), "MB unfused": ("bytes_unfused", 1e6)}
_SCALED |= {"GFLOP": ("flops", 1e9)}


def report_table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, then a line for each rule that one breaks."""
    shown = [row | {name: row[key] / unit for name, (key, unit) in _SCALED.items()} for row in rows]
    broken = [
        f"FAILS: {row['kernel']} [{row['config']}] {row['arch']}: {why}"
        for row in rows
        for why in row["failures"]
    ]
    return "\n".join([table(shown, [*_SHOWN, *_SCALED]), *broken])


def _processor_seconds() -> float:
    """Processor time of this process and its children; a clock would count the neighbours' load."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main(argv: list[str] | None = None) -> int:
    """Print the table; 0 if every row passes within the limit, else 1."""
    p = parser(__doc__)
    add = p.add_argument
    add("--json", type=Path, metavar="FILE", help="also write the rows there")
    add("--arch", type=int, nargs="+", choices=LIMITS, default=list(LIMITS))
    add("--cache", type=Path, metavar="DIR", default=DEFAULT_CACHE)
    limit_help = "fail if it takes more processor time"
    add("--limit-s", type=float, default=float("inf"), metavar="SECONDS", help=limit_help)
    args = p.parse_args(argv)

    rows = build_report(args.arch, args.cache)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(report_table(rows))
    failed = sum(bool(row["failures"]) for row in rows)
    seconds = _processor_seconds()
    print(f"{len(rows)} rows, {failed} failed, {seconds:.0f} s of one processor")
    if seconds > args.limit_s:
        print(f"FAILS: the gate may take {args.limit_s:.0f} s")
    return int(failed > 0 or seconds > args.limit_s)


if __name__ == "__main__":
    sys.exit(main())
