"""Measure the way from upstream's arithmetic to the fast mode, one technique at a time.

    python bench/waterfall.py --upstream PATH --json bench/results
    python bench/waterfall.py --model titok-b-64 --batch-size 1 --rows plain,bf16,int8

Rows are cumulative: each adds one technique to its parent. Rows whose weights fit in memory
together take turns, as a group. Each group has a row in common with the one before, and ratios go
through it, so that clocks which drift in between do not enter them. Beside the file of --json
stands a plot under its name, ending in .svg.

The record has the fields of sampling.py's, and beside them

- "groups": of each, "anchor" (the row in common; null in the first), "images_per_s" of the anchor
  in this group, and "factor": the group's rates are multiplied by it before they are compared;
- "cases": a row each. "exact": same results but for rounding; "prepare_s": compile and packing;
  "x_upstream_fp32", "x_upstream_autocast", "x_parent": ratios of rates, null if unknown;
  "of_bf16_peak": official work per second over the bfloat16 matmul rate of this run; "quality"
  beside our float32: "step1_ids_equal" and "final_ids_equal" (same seeds; upstream's beside the
  reference sampler in float32), "logit_error" (relative, half the tokens masked), "pixel_rms" and
  "psnr_db" of the same ids (null: identical). A row that was left out has "not_measured", the
  reason; one that failed has "error".
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lib import upstream as official
from lib import waterfall_rows
from lib.candidates import measure
from lib.harness import PRECISIONS, RATES, matmul_peak, precision, say
from lib.options import COUNT, RUN, check, names_of, parser, save, start_record
from lib.tables import waterfall_table
from lib.waterfall_candidates import Inputs, Prepared
from lib.waterfall_rows import Row, next_group

from titok_fast import PRESETS, SamplingConfig
from titok_fast.costs import generation_costs

Case = dict[str, Any]


def measure_group(
    inputs: Inputs, group: Sequence[Row], repeats: int | None, anchor: Row | None = None
) -> dict[str, Case]:
    """Measured fields of each row of a group, or its "error", by name; no quality of the anchor."""
    inputs.enter(group)
    found: dict[str, Case] = {}
    ready: list[Prepared] = []
    for row in group:
        try:
            ready.append(inputs.make(row))
        except (ValueError, MemoryError, RuntimeError) as error:  # out of memory is a RuntimeError
            say(f"{row.name} failed: {error}")
            found[row.name] = {"error": type(error).__name__}
    rows = [row for row in group if row.name not in found]
    candidates = [made for made, _, _ in ready]
    cases = measure(candidates, images=inputs.batch, device=inputs.device, repeats=repeats)
    for row, (_, _, prepare_s), case in zip(rows, ready, cases, strict=True):
        for name in ("implementation", "agreement"):  # the row's name; quality says more
            case.pop(name, None)
        found[row.name] = case
        if "error" not in case and row is not anchor:
            say(f"{row.name}: quality")
            case |= {"prepare_s": prepare_s, "quality": inputs.quality(row)}
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
                "exact": row.exact,
                "techniques": list(row.techniques),
                "implementation": "upstream" if row.upstream else "ours",
                "sampling": asdict(config),
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
    inputs, anchor = Inputs(args, config), None
    while waiting:
        group = next_group(waiting, anchor)
        found = measure_group(inputs, group, args.repeats, anchor)
        common: Case = found.pop(anchor.name) if anchor is not None else {}
        number = len(record["groups"])
        record["groups"].append(
            {"anchor": anchor and anchor.name, "images_per_s": common.get("images_per_s")}
        )
        for name, case in found.items():
            cases[name] |= case | {"group": number}
        waiting = [row for row in waiting if row.name not in found]
        done = [row for row in group if "images_per_s" in cases[row.name]]
        anchor = done[-1] if done else anchor
        compare_rates(record)
        save(args.json, record)
    peaks = record[RATES]
    for name in peaks:  # the best of what was seen: other load may have met the first measurement
        with precision(name) as dtype:
            peaks[name] = max(peaks[name], matmul_peak(args.device, dtype))
    compare_rates(record)
    path = save(args.json, record)
    if path is not None:
        _draw(record, path)
    return record


def _draw(record: Mapping[str, Any], path: Path) -> None:
    try:
        from lib import plots
    except ImportError as missing:
        say(f"no plot: {missing}")
        return
    plots.write(plots.waterfall(record), path.with_suffix(".svg"))


def _rows(args: argparse.Namespace) -> list[Row]:
    system, why = PRESETS[args.model], None
    if args.upstream is None:
        why = "no --upstream"
    elif not official.supports(system.tokenizer):
        why = "upstream released no such model"
    return waterfall_rows.rows(system, args.device.type, args.batch_size, upstream=why)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; status 1 when a row failed."""
    p = parser(__doc__, "repeats", "weights", "upstream", *RUN)
    add, drawing = p.add_argument, [name for name, s in PRESETS.items() if s.generator is not None]
    what = "preset with a generator (default: titok-l-32)"
    add("--model", choices=drawing, default="titok-l-32", metavar="NAME", help=what)
    add("--batch-size", **COUNT, metavar="B", help="images at once; CPU: 8; CUDA: 32")
    add("--rows", **names_of(waterfall_rows.names()))
    args = p.parse_args(argv)
    dtypes = [name for name in PRECISIONS if name != "tf32"], list(PRECISIONS)
    check(p, args, batch_size=(8, 32), dtype=dtypes)
    record = run(args)
    print(waterfall_table(record))
    gflop, peaks = sum(record["gflop_per_image"].values()), record[RATES]
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in peaks.items())
    print(f"official work: {gflop:.0f} GFLOP per image; matmuls, GFLOP/s: {rates}")
    return int(any("error" in case for case in record["cases"]))


if __name__ == "__main__":
    sys.exit(main())
