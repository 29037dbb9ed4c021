"""From upstream's arithmetic to the fast mode, one technique at a time: speed and quality of each.

    python bench/waterfall.py --upstream PATH --json bench/results
    python bench/waterfall.py --model titok-b-64 --batch-size 1 --rows plain,bf16,int8

Rows are cumulative: each adds one technique to its parent. An aside is measured and left out again.
Rows that fit in memory take turns. The groups that this makes each have a row in common with the
one before, and ratios go through it, so that clocks that drift in between do not enter them. Beside
the file of --json stands a plot under its name, ending in .svg.

The JSON has the fields of sampling.py's record ("benchmark": "waterfall", "environment",
"protocol", "upstream_commit", "matmul_flop_per_s"), and beside them

- "model", "batch", "gflop_per_image": the official work of one picture by stage (costs.py);
- "groups": of each, "anchor" (the row in common; null in the first), "images_per_s" of the anchor
  in this group, and "factor": the group's rates are multiplied by it before they are compared;
- "cases": a row each, with "row", "text", "parent", "aside", "exact" (true: same results but for
  rounding), "techniques", "implementation" ("ours", "upstream") and "sampling". One that was left
  out has "not_measured", the reason; one that failed has "error". The others have
    - "dtype", "mode", "group", "seconds" of each round, "images_per_s" (median, p20, p80, repeats);
    - "stages_s", medians; "prepare_s" (compile, packing), and "first_call_s" after it;
    - "weight_bytes", and "peak_bytes", what a call adds to them included;
    - "x_upstream_fp32", "x_upstream_autocast", "x_parent": ratios of rates; null if unknown;
    - "of_bf16_peak": official work per second over the bfloat16 matrix-product rate of this run;
    - "quality" beside our float32: "step1_ids_equal" and "final_ids_equal" (same seeds; upstream's
      beside the reference sampler in float32), "logit_error" (relative, half the tokens masked),
      "pixel_rms" and "psnr_db" of the same ids (null: identical). Null: not measured.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lib import upstream as official
from lib import waterfall_rows
from lib.cases import measure, say
from lib.harness import NOT_MEASURED, RATES, gib, matmul_peak, precision, spread, table
from lib.options import add_run, add_upstream, check, save, start_record
from lib.waterfall_candidates import Bench, Made, settings
from lib.waterfall_rows import Row, next_group

from titok_fast import PRESETS, SamplingConfig
from titok_fast.costs import generation_costs

Case = dict[str, Any]


def measure_group(
    bench: Bench, group: Sequence[Row], repeats: int | None, anchor: Row | None = None
) -> dict[str, Case]:
    """Measured fields of each row of a group, or its "error", by name; no quality of the anchor."""
    bench.enter(group)
    found: dict[str, Case] = {}
    ready: list[Made] = []
    for row in group:
        try:
            ready.append(bench.make(row))
        except (ValueError, MemoryError, RuntimeError) as error:  # out of memory is a RuntimeError
            say(f"{row.name} failed: {error}")
            found[row.name] = {"error": type(error).__name__}
    prepared = [row for row in group if row.name not in found]
    candidates = [made.candidate for made in ready]
    cases = measure(candidates, images=bench.batch, device=bench.device, repeats=repeats)
    for row, made, case in zip(prepared, ready, cases, strict=True):
        for name in ("implementation", "agreement"):  # the row's name; quality says more
            case.pop(name, None)
        found[row.name] = case
        if "error" not in case and row is not anchor:
            say(f"{row.name}: quality")
            case |= {"prepare_s": made.prepare_s, "quality": bench.quality(row)}
    return found


def compare_rates(record: Mapping[str, Any]) -> None:
    """Fill in what follows from the rates: the factor of each group, the ratios of each case."""
    flop = 1e9 * sum(record["gflop_per_image"].values())
    peak = record[RATES]["bf16"]
    measured = [case for case in record["cases"] if "images_per_s" in case]
    rates: dict[str, float] = {}  # as if all had been in the first group
    for i, group in enumerate(record["groups"]):
        factor = None if rates else 1.0
        if group["images_per_s"] is not None and group["anchor"] in rates:
            factor = rates[group["anchor"]] / group["images_per_s"]["median"]
        group["factor"] = factor
        for case in measured:
            if case["group"] == i and factor is not None:
                rates[case["row"]] = factor * case["images_per_s"]["median"]
    for case in measured:
        for field, other in (
            ("x_upstream_fp32", "upstream-fp32"),
            ("x_upstream_autocast", "upstream-autocast"),
            ("x_parent", case["parent"]),
        ):
            known = case["row"] in rates and other in rates
            case[field] = rates[case["row"]] / rates[other] if known else None
        case["of_bf16_peak"] = case["images_per_s"]["median"] * flop / peak


def _begin(args: argparse.Namespace, rows: Sequence[Row], config: SamplingConfig) -> dict[str, Any]:
    """The record before anything of it is measured."""
    system, record = PRESETS[args.model], start_record("waterfall", args)
    assert system.generator is not None
    costs = generation_costs(system.tokenizer, system.generator, config)
    record["protocol"] |= {
        "groups": "rows of a group take turns; ratios between groups go through the common row",
        "quality": "beside our float32, same seeds. Random weights attend to everything alike: the "
        "errors of trained weights will differ",
    }
    return record | {
        "model": args.model,
        "batch": args.batch_size,
        "gflop_per_image": {stage: cost.flops / 1e9 for stage, cost in costs.items()},
        "groups": [],
        "cases": [
            {
                "row": row.name,
                "text": row.text,
                "parent": row.parent,
                "aside": row.aside,
                "exact": row.exact,
                "techniques": list(row.techniques),
                "implementation": "upstream" if row.upstream else "ours",
                "sampling": asdict(settings(row, config)),
            }
            | ({} if row.not_measured is None else {"not_measured": row.not_measured})
            for row in rows
        ],
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the rows; the JSON, where asked for, is rewritten after every group."""
    config = PRESETS[args.model].sampling or SamplingConfig()
    rows = [row for row in _rows(args) if row.name in args.rows]
    record = _begin(args, rows, config)
    cases: dict[str, Case] = {case["row"]: case for case in record["cases"]}
    waiting = [row for row in rows if row.not_measured is None]
    bench, anchor = Bench(args, config), None
    while waiting:
        group = next_group(waiting, anchor)
        found = measure_group(bench, group, args.repeats, anchor)
        common: Case = found.pop(anchor.name) if anchor is not None else {}
        number = len(record["groups"])
        record["groups"].append(
            {"anchor": anchor and anchor.name, "images_per_s": common.get("images_per_s")}
        )
        for name, case in found.items():
            cases[name] |= case | {"group": number}
        waiting = [row for row in waiting if row.name not in found]
        done = [r for r in group if "images_per_s" in cases[r.name] and not r.aside]
        anchor = done[-1] if done else anchor
        compare_rates(record)
        save(args.json, record)
    _measure_peaks_again(record, args.device)
    compare_rates(record)
    path = save(args.json, record)
    if path is not None:
        _draw(record, path)
    return record


def _measure_peaks_again(record: dict[str, Any], device: torch.device) -> None:
    """A peak is the best of what was seen: other load may have met the first measurement."""
    peaks = record[RATES]
    for name in peaks:
        with precision(name) as dtype:
            peaks[name] = max(peaks[name], matmul_peak(device, dtype))


def _draw(record: Mapping[str, Any], path: Path) -> None:
    try:
        from lib import waterfall_plot
    except ImportError as missing:
        say(f"no plot: {missing}")
        return
    waterfall_plot.write(waterfall_plot.waterfall(record), path.with_suffix(".svg"))


def waterfall_table(record: Mapping[str, Any]) -> str:
    """Markdown, a line per row; asides are indented, rows that were left out say why."""
    lines = []
    for case in record["cases"]:
        line = {"row": ("+ " if case["aside"] else "") + case["row"], "technique": case["text"]}
        lines.append(line)
        if "images_per_s" not in case:
            why = case.get("not_measured") or f"failed ({case.get('error')})"
            line["samples/s (p20-p80)"] = f"{NOT_MEASURED}: {why}"
            continue
        quality = case["quality"]
        psnr = "identical" if quality["pixel_rms"] == 0 else f"{quality['psnr_db']:.1f}"
        line |= {
            "samples/s (p20-p80)": spread(case["images_per_s"]),
            "x upstream fp32": case["x_upstream_fp32"],
            "x autocast": case["x_upstream_autocast"],
            "x parent": case["x_parent"] and f"{case['x_parent']:.3f}",
            "of bf16 peak": f"{case['of_bf16_peak']:.0%}",
            "peak GiB": gib(case["peak_bytes"]),
            "first call s": case["prepare_s"] + case["first_call_s"],
            "exact": "yes" if case["exact"] else "no",
            "ids, step 1": _percent(quality["step1_ids_equal"]),
            "ids, end": _percent(quality["final_ids_equal"]),
            "logit error": f"{quality['logit_error']:.2g}",
            "PSNR dB": psnr,
        }
    columns = dict.fromkeys(name for line in lines for name in line)
    return table(lines, list(columns))


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _rows(args: argparse.Namespace) -> list[Row]:
    system, why = PRESETS[args.model], None
    if args.upstream is None:
        why = "no --upstream"
    elif not official.supports(system.tokenizer):
        why = "upstream released no such model"
    return waterfall_rows.rows(system, args.device.type, args.batch_size, upstream=why)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; status 1 when a row failed."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, known = p.add_argument, waterfall_rows.names()
    add("--model", default="titok-l-32", metavar="NAME", help="preset (default: titok-l-32)")
    add("--batch-size", type=int, metavar="B", help="pictures at once; CPU: 8; CUDA: 32")
    add("--rows", metavar="A,B", help=f"default: all of {', '.join(known)}")
    add("--repeats", type=int, metavar="N", help="timed rounds; default: what fits a minute, 3 up")
    sources = "directories or hub names; `published`; default: random"
    add("--weights", metavar="TOKENIZER[,GENERATOR]", help=sources)
    add_upstream(p)
    add_run(p)
    args = p.parse_args(argv)
    _check(p, args, known)
    record = run(args)
    print(waterfall_table(record))
    gflop, peaks = sum(record["gflop_per_image"].values()), record[RATES]
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in peaks.items())
    print(f"official work: {gflop:.0f} GFLOP per picture; matrix products, GFLOP/s: {rates}")
    return int(any("error" in case for case in record["cases"]))


def _check(p: argparse.ArgumentParser, args: argparse.Namespace, known: Sequence[str]) -> None:
    """Refuse before any work, and fill in what depends on the device."""
    if args.model not in PRESETS or PRESETS[args.model].generator is None:
        fitting = ", ".join(name for name, s in PRESETS.items() if s.generator is not None)
        p.error(f"--model wants a preset with a generator; got {args.model}; known: {fitting}")
    args.rows = args.rows.split(",") if args.rows else list(known)
    unknown = [name for name in args.rows if name not in known]
    if unknown:
        p.error(f"--rows: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    on_cuda = check(p, args, "batch_size", "repeats", "threads")
    args.batch_size = (32 if on_cuda else 8) if args.batch_size is None else args.batch_size
    args.dtype = ["fp32-ieee", *["tf32"] * on_cuda, "bf16"]


if __name__ == "__main__":
    sys.exit(main())
