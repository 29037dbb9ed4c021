"""Samples/s and peak memory against batch, tokens, resolution, steps, threads and ranks.

    python bench/scaling.py
    python bench/scaling.py --axes batch,steps --json bench/results --plots bench/results

All points of an axis take turns. What the default leaves out for its time stands in the record as
not measured. The time of each stage is set beside the cost model's (cost_model.py), fitted on a few
of the same points. Ranks are processes that draw independently, as in `titok_fast.cli.sample`:
on a CPU they share its threads, on CUDA each has a device.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lib import cost_model
from lib.cases import say
from lib.harness import NOT_MEASURED, gib, spread, summary, table, timed
from lib.options import add_single, check, chosen_mode, in_mode, result_path, save, start_record
from lib.points import Point, Prepared, measure
from lib.weights import draw_only

AXES = ("batch", "tokens", "resolution", "steps", "threads", "ranks")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
TOKENS = (32, 64, 128, 256)
STEPS = (1, 2, 4, 8, 16, 32, 64)
# by resolution, 512 px last: the two pairs that the paper has
PAIRS = (("titok-l-32", "titok-l-64-512"), ("titok-b-64", "titok-b-128-512"))
# the paper's figure 4(d): samples/s of one A100, TiTok-B and MaskGIT-ViT, de-tokenisation included
PAPER_TOKENS = {32: 123.1, 64: 89.8, 128: 54.1, 256: 27.5}
FIT = (Point(), Point(batch=4), Point("titok-b-64", tokens=256), Point(steps=2))


def axis_points(axis: str, cores: int, devices: int | None) -> list[Point]:
    """All points of an axis.

    Args:
        axis: one of AXES.
        cores: CPU threads to go up to.
        devices: CUDA devices; None on a CPU.

    Returns:
        Points at batch 1, L-32 and 8 steps where the axis is not about that.
    """
    if axis == "batch":
        return [Point(batch=B) for B in BATCHES]
    if axis == "tokens":
        return [Point("titok-b-64", tokens=K) for K in TOKENS]
    if axis == "resolution":
        return [Point(name) for pair in PAIRS for name in pair]
    if axis == "steps":
        return [Point(steps=T) for T in STEPS]
    if axis == "threads":
        return [Point(threads=n) for n in _doubling(cores)] if devices is None else []
    if axis == "ranks":
        if devices is not None:
            return [Point(ranks=R) for R in _doubling(devices)]
        return [Point(ranks=R, threads=max(1, cores // R)) for R in (1, 2)]
    raise ValueError(f"axis wants one of {', '.join(AXES)}; got {axis!r}")


def _doubling(top: int) -> list[int]:
    """1, 2, 4 .. and `top` itself."""
    return sorted({1 << i for i in range(top.bit_length())} | {top})


def left_out(point: Point, max_batch: int, cores: int) -> str | None:
    """Why a point is not measured; None where it is."""
    if point.batch > max_batch:
        return f"over --max-batch {max_batch}"
    if point.threads is not None and point.threads * point.ranks > cores:
        return f"{point.ranks} ranks want more than {cores} CPU threads"
    return None


def measure_ranks(
    point: Point, *, device: torch.device, dtype: str, repeats: int, mode: str = "eager"
) -> dict[str, Any]:
    """A row of a point with `ranks` processes that begin each round together.

    Its "seconds" are those of the slowest rank in each round; memory is not measured.
    """
    context = torch.multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(point.ranks), context.SimpleQueue()
    row: dict[str, Any] = point.row() | {"dtype": dtype, "mode": mode}
    work = (point, device.type, dtype, mode, repeats, barrier, results)
    try:
        torch.multiprocessing.spawn(_rank, work, nprocs=point.ranks)
    except (torch.multiprocessing.ProcessRaisedException,
            torch.multiprocessing.ProcessExitedException) as error:  # fmt: skip
        say(f"{point} failed: {error}")
        return row | {"error": type(error).__name__}
    per_rank = [results.get() for _ in range(point.ranks)]
    seconds = [max(round_) for round_ in zip(*per_rank, strict=True)]
    rates = [point.ranks * point.batch / s for s in seconds]
    return row | {"seconds": seconds, "images_per_s": summary(rates), "peak_bytes": None}


def _rank(
    index: int,
    point: Point,
    kind: str,
    dtype: str,
    mode: str,
    repeats: int,
    barrier: Any,
    results: Any,
) -> None:
    device = torch.device(kind, index) if kind == "cuda" else torch.device(kind)
    torch.set_num_threads(point.threads or torch.get_num_threads())
    weights = torch.bfloat16 if dtype == "bf16" else torch.float32
    pipe = in_mode(draw_only(point.system, device, weights), mode)
    alone = Prepared(replace(point, threads=None), pipe, dtype)
    alone.draw()
    seconds = []
    for _ in range(repeats):
        barrier.wait(timeout=600)  # a rank that died before it would be waited for for ever
        seconds.append(timed(alone.draw, device))
    results.put(seconds)


def measure_axis(axis: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of an axis, those left out included."""
    cores = torch.get_num_threads()
    devices = torch.cuda.device_count() if args.device.type == "cuda" else None
    points = axis_points(axis, cores, devices)
    reasons = {p: left_out(p, args.max_batch, cores) for p in points}
    chosen = [p for p in points if reasons[p] is None]
    common: dict[str, Any] = {
        "device": args.device, "dtype": args.dtype, "repeats": args.repeats, "mode": args.mode
    }  # fmt: skip
    if axis == "ranks":
        rows = [measure_ranks(p, **common) for p in chosen]
    else:
        rows = measure(chosen, **common) if chosen else []
    measured = dict(zip(chosen, rows, strict=True))
    same = {"dtype": args.dtype, "mode": args.mode}
    return [
        {"axis": axis}
        | measured.get(p, p.row() | {**same, "not_measured": reasons[p]})
        | {"paper_a100_images_per_s": PAPER_TOKENS.get(p.tokens or 0)}
        for p in points
    ]


def scaling_table(record: Mapping[str, Any]) -> str:
    """Markdown, a line per point."""
    rows = []
    for case in record["cases"]:
        speed, missing = case.get("images_per_s"), case.get("not_measured") or case.get("error")
        rows.append(
            {name: case[name] for name in ("axis", "model", "batch", "tokens", "side", "steps")}
            | {"threads": case["threads"] or "all", "ranks": case["ranks"]}
            | {
                "samples/s (p20-p80)": f"{NOT_MEASURED}: {missing}"
                if speed is None
                else spread(speed),
                "peak GiB": gib(case.get("peak_bytes")),
            }
        )
    columns = ("axis", "model", "batch", "tokens", "side", "steps", "threads", "ranks")
    return table(rows, (*columns, "samples/s (p20-p80)", "peak GiB"))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure axis after axis; the JSON, where asked for, is rewritten after each."""
    record = start_record("scaling", args)
    record["protocol"]["warmup"] = "two calls of each: first call, memory"
    for axis in args.axes:
        say(f"axis {axis}")
        record["cases"] += measure_axis(axis, args)
        save(args.json, record)
    try:
        record["cost_model"] = cost_model.analysis(record["cases"], FIT)
    except (ValueError, ImportError) as error:  # axes without the points to fit on
        say(f"no cost model: {error}")
    save(args.json, record)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; status 1 when a point failed."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--axes", metavar="A,B", default=",".join(AXES), help=f"default: {','.join(AXES)}")
    add("--max-batch", type=int, metavar="B", help="CPU: 8; CUDA: 64")
    add("--plots", metavar="DIR", help="also a plot there, named after the run")
    add_single(p, "all points")
    args = p.parse_args(argv)
    on_cuda = check(p, args, "max_batch", "repeats", "threads")
    args.axes, args.mode = args.axes.split(","), chosen_mode(p, args)
    unknown = [axis for axis in args.axes if axis not in AXES]
    if unknown:
        p.error(f"--axes: unknown {', '.join(unknown)}; known: {', '.join(AXES)}")
    args.max_batch = (64 if on_cuda else 8) if args.max_batch is None else args.max_batch
    if args.plots is not None and not Path(args.plots).is_dir():
        p.error(f"--plots wants an existing folder; got {args.plots}")
    record = run(args)
    print(scaling_table(record))
    if "cost_model" in record:
        print("\n" + cost_model.comparison_table(record["cost_model"]["lines"]))
    if args.plots is not None:
        from lib import plots

        stem = result_path(args.json or ".", record).stem
        plots.write(plots.scaling(record), Path(args.plots) / f"{stem}.svg")
    return int(any("error" in case for case in record["cases"]))


if __name__ == "__main__":
    sys.exit(main())
