"""Measure samples/s and peak memory against batch, tokens, resolution, steps, threads and ranks.

    python bench/scaling.py
    python bench/scaling.py --axes batch,steps --json bench/results --plots bench/results
    python bench/scaling.py --cost-model                  measure its own workloads, fit and check
    python bench/scaling.py --cost-model FILE_scaling.json
    python bench/scaling.py --floors

The workloads of an axis take turns. Those that the default leaves out for their time stand in the
record as not measured. The time of each stage is compared with that of lib/cost_model.py, fitted on
a few of the same workloads. Ranks are processes that draw independently, as in
`titok-fast sample`: on a CPU they share its threads, on CUDA each has a device. --floors measures
nothing: it prints the least time that the data sheets of A100 and H100 allow.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lib import cost_model, options
from lib.harness import NOT_MEASURED, say, summary, timed
from lib.tables import scaling_table
from lib.workloads import Workload, draw, measure, pipeline, settings
from paper.published import SAMPLES_PER_S
from torch.multiprocessing.spawn import ProcessException

AXES = ("batch", "tokens", "resolution", "steps", "threads", "ranks")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
TOKENS = (32, 64, 128, 256)
STEPS = (1, 2, 4, 8, 16, 32, 64)
# by resolution, 512 px last: the two pairs that the paper has
PAIRS = (("titok-l-32", "titok-l-64-512"), ("titok-b-64", "titok-b-128-512"))
FIT = (Workload(), Workload(batch=4), Workload("titok-b-64", tokens=256), Workload(steps=2))


def axis_workloads(axis: str, cores: int, devices: int | None) -> list[Workload]:
    """All workloads of an axis: L-32, batch 1 and 8 steps where the axis does not vary that.

    They go up to the CPU's `cores`, or the CUDA `devices` (None on a CPU).
    """
    if axis == "batch":
        return [Workload(batch=B) for B in BATCHES]
    if axis == "tokens":
        return [Workload("titok-b-64", tokens=K) for K in TOKENS]
    if axis == "resolution":
        return [Workload(name) for pair in PAIRS for name in pair]
    if axis == "steps":
        return [Workload(steps=T) for T in STEPS]
    if axis == "threads":
        return [Workload(threads=n) for n in _doubling(cores)] if devices is None else []
    if axis == "ranks":
        if devices is not None:
            return [Workload(ranks=R) for R in _doubling(devices)]
        return [Workload(ranks=R, threads=max(1, cores // R)) for R in (1, 2)]
    raise ValueError(f"axis wants one of {', '.join(AXES)}; got {axis!r}")


def _doubling(top: int) -> list[int]:
    """1, 2, 4 .. and `top` itself."""
    return sorted({1 << i for i in range(top.bit_length())} | {top})


def left_out(workload: Workload, max_batch: int, cores: int) -> str | None:
    """Why a workload is not measured; None where it is."""
    if workload.batch > max_batch:
        return f"over --max-batch {max_batch}"
    if workload.threads is not None and workload.threads * workload.ranks > cores:
        return f"{workload.ranks} ranks want more than {cores} CPU threads"
    return None


def measure_ranks(
    workload: Workload, *, device: torch.device, dtype: str, repeats: int, mode: str = "eager"
) -> dict[str, Any]:
    """A row of a workload whose ranks begin each round together; the slowest gives "seconds"."""
    context = torch.multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workload.ranks), context.SimpleQueue()
    row: dict[str, Any] = workload.row() | {"dtype": dtype, "mode": mode}
    job = (workload, device.type, (dtype, mode, repeats), barrier, results)
    try:
        torch.multiprocessing.spawn(_rank, job, nprocs=workload.ranks)
    except ProcessException as error:
        say(f"{workload} failed: {error}")
        return row | {"error": type(error).__name__}
    per_rank = [results.get() for _ in range(workload.ranks)]
    seconds = [max(round_) for round_ in zip(*per_rank, strict=True)]
    rates = [workload.ranks * workload.batch / s for s in seconds]
    return row | {"seconds": seconds, "images_per_s": summary(rates), "peak_bytes": None}


def _rank(index: int, workload: Workload, kind: str, how: Any, barrier: Any, results: Any) -> None:
    dtype, mode, repeats = how
    device = torch.device(kind, index) if kind == "cuda" else torch.device(kind)
    pipe = options.in_mode(pipeline(workload, device, dtype), mode)
    work = partial(draw, workload, pipe)
    seconds = []
    with settings(workload, dtype):
        work()
        for _ in range(repeats):
            barrier.wait(timeout=600)  # a rank that died would be waited for for ever
            seconds.append(timed(work, device))
    results.put(seconds)


def measure_axis(axis: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of an axis, those left out included."""
    cores = torch.get_num_threads()
    devices = torch.cuda.device_count() if args.device.type == "cuda" else None
    rows = []
    waiting: list[Workload] = []
    for workload in axis_workloads(axis, cores, devices):
        row = {"axis": axis} | workload.row() | {"dtype": args.dtype, "mode": args.mode}
        why = left_out(workload, args.max_batch, cores)
        waiting += [workload] if why is None else []
        rows.append(row if why is None else row | {"not_measured": why})
    common = {name: getattr(args, name) for name in ("device", "dtype", "repeats", "mode")}
    if axis == "ranks":
        measured = [measure_ranks(workload, **common) for workload in waiting]
    else:
        measured = measure(waiting, **common)
    found = iter(measured)
    for row in rows:
        row |= {} if "not_measured" in row else next(found)
        own = row["tokens"] if axis == "tokens" else None
        row["paper_a100_images_per_s"] = SAMPLES_PER_S["sampling"].get(own)
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure axis after axis; the JSON, where asked for, is rewritten after each."""
    record = options.start_record("scaling", args)
    record["protocol"]["warmup"] = "two calls of each: first call, memory"
    for axis in args.axes:
        say(f"axis {axis}")
        record["cases"] += measure_axis(axis, args)
        options.save(args.json, record)
    try:
        record["cost_model"] = cost_model.analysis(record["cases"], FIT)
    except (ValueError, ImportError) as error:  # axes without the workloads to fit on
        say(f"no cost model: {error}")
    options.save(args.json, record)
    return record


def cost_model_record(args: argparse.Namespace) -> dict[str, Any]:
    """The record of --cost-model: of a file of this script's, or of a run of its own."""
    if args.cost_model != "":
        record = json.loads(Path(args.cost_model).read_text())
        if "cost_model" not in record:
            raise ValueError(f"{args.cost_model}: this run measured too few workloads to fit on")
        fitted = [Workload(**fields) for fields in record["cost_model"]["fitted_on"]]
    else:
        record, fitted = options.start_record("cost-model", args), list(cost_model.FIT)
        common = {name: getattr(args, name) for name in ("device", "dtype", "repeats", "mode")}
        record["cases"] = measure((*cost_model.FIT, *cost_model.CHECK), **common)
    record["benchmark"] = "cost-model"  # so that its own file does not take the other's name
    record["cost_model"] = cost_model.analysis(record["cases"], fitted)
    return record


def report_cost_model(found: Mapping[str, Any]) -> int:
    """Print rates and errors; status 1 when a workload that was not fitted is off by over GOAL."""
    print("Rates: " + "; ".join(f"{k} {v}" for k, v in found["rates"].items()))
    print("\n" + cost_model.comparison_table(found["lines"]))
    errors = found["worst_error_of_unfitted"]
    shown = ", ".join(f"{k} {NOT_MEASURED if v is None else f'{v:.1%}'}" for k, v in errors.items())
    say(f"largest error of workloads that were not fitted: {shown}")
    return int(any(v is not None and v > cost_model.GOAL for v in errors.values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; status 1 when a workload failed, or the cost model missed its goal."""
    p = options.single_parser(__doc__, "all workloads", "plots")
    add = p.add_argument
    add("--axes", **options.names_of(AXES))
    add("--max-batch", **options.COUNT, metavar="B", help="CPU: 8; CUDA: 64")
    what = "fit and check the cost model: on a record of this script, or on a run of its own"
    add("--cost-model", nargs="?", const="", metavar="FILE", help=what)
    add("--floors", action="store_true", help="print the floors of A100 and H100 instead")
    args = p.parse_args(argv)
    if args.floors:
        print("Floors, ms per image, bfloat16, batch 128:\n\n" + cost_model.floors_table())
        return 0
    options.check(p, args, max_batch=(8, 64))
    args.mode = options.chosen_mode(p, args)
    if args.cost_model is not None:
        try:
            record = cost_model_record(args)
        except ValueError as error:
            p.error(f"--cost-model {error}")
        options.save(args.json, record)
        return report_cost_model(record["cost_model"])
    record = run(args)
    print(scaling_table(record))
    if "cost_model" in record:
        print("\n" + cost_model.comparison_table(record["cost_model"]["lines"]))
    if args.plots is not None:
        from lib import plots

        plots.write(plots.scaling(record), args.plots / f"{options.stem(args.json, record)}.svg")
    return int(any("error" in case for case in record["cases"]))


if __name__ == "__main__":
    sys.exit(main())
