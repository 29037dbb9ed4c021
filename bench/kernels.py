"""Time each kernel beside its reference, torch.compile, upstream's formulas and libraries.

    python bench/kernels.py [--quick] [--only remask] [--json bench/results]
    pytest bench/kernels.py --benchmark-only

Every implementation is compared with float64 first. A wrong one is not timed; if it is ours, the
whole case is not, and the exit status is 1. The rest take turns in random order, with caches
flushed before each call. On CUDA the times are those of device events, and "host us" is the host's
time to issue a call; on the CPU they are wall-clock times.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lib.harness import precision, spread, summary, synchronize, table
from lib.kernels.cases import Case, Rival, Spec
from lib.kernels.ops import BUILDERS
from lib.kernels.timing import peaks, time_calls
from lib.options import new_record, parser, save

BUDGET_S, QUICK_BUDGET_S = 5.0, 0.5  # for the timed rounds of a case
_COLUMNS = [
    *("op", "model", "B", "dtype", "work", "by", "ms (p20-p80)", "host us", "GB/s", "of peak"),
    *("x upstream", "checked", "status"),
]


def plan(on_cuda: bool, quick: bool) -> list[Spec]:
    """The published shapes to measure, fewer of them when quick."""
    batches = [1, 8, 128] if on_cuda and not quick else [1, 8]
    dtypes = [torch.float32, torch.bfloat16][: 1 if quick else 2]
    generators = ["L-32"] if quick else ["L-32", "B-64", "S-128"]
    specs = []
    for B in batches:
        for model in [*generators, "SL-256"]:
            if quick and (model, B) == ("SL-256", 8):
                continue
            specs.append(Spec("nearest_code", model, B, torch.float32))
            specs.append(Spec("nearest_code_stats", model, B, torch.float32, training=True))
        specs += [Spec("remask", model, B, torch.float32) for model in generators]
        for dtype in dtypes:
            for model in generators:
                specs.append(Spec("guided_sample", model, B, dtype))
                specs.append(Spec("lm_head_sample", model, B, dtype))
                specs.append(Spec("masked_cross_entropy", model, B, dtype, training=True))
            specs.append(Spec("soft_codes", "L-32", B, dtype))
            for block in ("512x16", "256x64", "128x256"):
                # more images are decoded a few at a time; on a CPU one takes long enough
                if B == 1 or (on_cuda and B <= 8):
                    specs.append(Spec("group_norm_silu", block, B, dtype))
                    specs.append(Spec("group_norm_silu", block, B, dtype, training=True))
    return sorted(specs, key=lambda spec: list(BUILDERS).index(spec.op))


def build(spec: Spec, device: torch.device) -> Case:
    """The tensors of a spec, the same in every run."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # else the eighth shape of a function falls back to eager
    return BUILDERS[spec.op](spec, device)


def check(rival: Rival) -> str | None:
    """What is wrong with an implementation, or None."""
    try:
        rival.check()
    except AssertionError as error:
        return f"wrong: {error}"
    except Exception as error:  # noqa: BLE001 - the row says how it failed
        return f"failed: {type(error).__name__}"
    return None


def measure(
    spec: Spec, case: Case, device: torch.device, *, compiled: bool, budget_s: float
) -> list[dict[str, Any]]:
    """Judge all implementations of a case, time those that are right; a row each, "ours" first."""
    rivals = dict(case.rivals)
    status = {"ours": check(rivals["ours"]) or "ok"}
    if status["ours"] == "ok":
        if compiled:
            rivals["compiled"] = case.compiled()
        status |= {name: check(rivals[name]) or "ok" for name in rivals if name != "ours"}
    else:
        status |= {name: "not measured: ours failed" for name in rivals if name != "ours"}
    right = {name: rivals[name].call for name in rivals if status[name] == "ok"}
    on_device, on_host = time_calls(right, device, budget_s)
    status |= case.absent | ({} if compiled else {"compiled": "not measured"})
    rows = []
    for name, text in status.items():
        row: dict[str, Any] = {"op": spec.op, "model": spec.model, "batch": spec.batch}
        row |= {"dtype": str(spec.dtype).removeprefix("torch."), "work": spec.work, "by": name}
        row |= {"checked": name in right, "status": text}
        if name in right:
            row["seconds"] = summary(on_device[name])
            row["host_seconds"] = summary(on_host[name])["median"] if name in on_host else None
            row |= {"bytes_min": case.bytes_min, "flops": case.flops}
        rows.append(row)
    return rows


def add_rates(rows: Sequence[dict[str, Any]], peak: dict[str, Any]) -> None:
    """Add GB/s, the share of the device's peak, and the speed over upstream's to a case's rows."""
    timed = [row for row in rows if "seconds" in row]
    upstream = next((r["seconds"]["median"] for r in timed if r["by"] == "upstream"), None)
    for row in timed:
        seconds = row["seconds"]["median"]
        arithmetic = row["flops"] / (peak["tflops"][row["dtype"]] * 1e12)
        floor = max(row["bytes_min"] / (peak["gbps"] * 1e9), arithmetic)
        row["gbps"] = row["bytes_min"] / seconds / 1e9
        row["share_of_peak"] = floor / seconds
        row["x_upstream"] = None if upstream is None else upstream / seconds


def slower_than_upstream(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each case in which ours is over 5 % slower than upstream's formula."""
    return [
        f"{r['op']} {r['model']} B={r['batch']} {r['dtype']} {r['work']}: {r['x_upstream']:.2f}x"
        for r in rows
        if r["by"] == "ours" and (r.get("x_upstream") or 1) < 0.95
    ]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    shown = row | {"B": row["batch"]}
    if "seconds" in row:
        shown["ms (p20-p80)"] = spread(row["seconds"], 1e3)
        shown |= {"GB/s": row["gbps"], "of peak": f"{row['share_of_peak']:.0%}"}
        shown["x upstream"] = row["x_upstream"]
        if row["host_seconds"] is not None:
            shown["host us"] = 1e6 * row["host_seconds"]
    return shown


def run(
    specs: Sequence[Spec],
    device: torch.device,
    *,
    compiled: bool,
    budget_s: float,
    keep: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """Measure a plan; `keep` saves the record after each case: an interruption loses one."""
    clock = "device events" if device.type == "cuda" else "wall clock"
    timing = f"{clock}, caches flushed, random order"
    record = new_record("kernels", device, timing=timing, budget_s=budget_s)
    record["peaks"] = peaks(device)
    for i, spec in enumerate(specs):
        print(f"{i + 1}/{len(specs)} {spec}", file=sys.stderr, flush=True)
        rows = measure(spec, build(spec, device), device, compiled=compiled, budget_s=budget_s)
        add_rates(rows, record["peaks"])
        record["cases"] += rows
        keep(record)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table; 0 unless one of ours is wrong."""
    p = parser(__doc__, "json", "device")
    add = p.add_argument
    add("--quick", action="store_true", help="few shapes, short, no torch.compile")
    compile_help = "also the reference through torch.compile; on by default unless --quick"
    add("--compile", action=argparse.BooleanOptionalAction, default=None, help=compile_help)
    add("--only", choices=BUILDERS, nargs="+", metavar="NAME", help="these ops")
    args = p.parse_args(argv)

    device = torch.device(args.device)
    specs = [s for s in plan(device.type == "cuda", args.quick) if s.op in (args.only or BUILDERS)]
    compiled = not args.quick if args.compile is None else args.compile
    budget_s = QUICK_BUDGET_S if args.quick else BUDGET_S
    keep = partial(save, args.json)
    with precision("fp32-ieee"):
        record = run(specs, device, compiled=compiled, budget_s=budget_s, keep=keep)
    rows = record["cases"]
    print(table([_shown(row) for row in rows], _COLUMNS))
    for line in slower_than_upstream(rows):
        print(f"slower than upstream: {line}")
    wrong = [row for row in rows if row["by"] == "ours" and row["status"] != "ok"]
    for row in wrong:
        print(f"NOT RIGHT: {row['op']} {row['model']} B={row['batch']}: {row['status']}")
    return int(bool(wrong))


def pytest_generate_tests(metafunc: Any) -> None:
    """Give pytest the quick plan."""
    libraries = {"nearest_code": "vector-quantize-pytorch", "masked_cross_entropy": "liger-kernel"}
    pairs = [
        (spec, by)
        for spec in plan(torch.cuda.is_available(), quick=True)
        for by in ("ours", "reference", "upstream", "compiled", libraries.get(spec.op))
        if by is not None
    ]
    metafunc.parametrize(("spec", "by"), pairs, ids=[f"{by}-{spec}" for spec, by in pairs])


def test_kernel(benchmark: Any, spec: Spec, by: str) -> None:
    """One implementation at one shape, for pytest-benchmark: wall clock, until the device idles."""
    import pytest  # the script itself runs without it

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = build(spec, device)
    if by in case.absent:
        pytest.skip(case.absent[by])
    rival = case.compiled() if by == "compiled" else case.rivals[by]
    rival.check()
    benchmark.group = str(spec)

    def call() -> None:
        rival.call()
        synchronize(device)

    benchmark(call)


if __name__ == "__main__":
    sys.exit(main())
