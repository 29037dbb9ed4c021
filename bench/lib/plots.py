"""Draw records of scaling.py, peers.py, waterfall.py and paper/trends.py as SVG.

python bench/lib/plots.py bench/results/FILE_scaling.json bench/results/FILE_peers.json --out .
"""

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from titok_fast.io.files import write_atomic

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as missing:
    raise ImportError("plots want matplotlib: pip install 'titok_fast[bench]'") from missing

Record = Mapping[str, Any]
AXES = ("batch", "tokens", "resolution", "steps", "threads", "ranks")  # of scaling.py
MEASURED, PREDICTED, PAPER = ("#1f5fa8", "#2f8f5b"), "#c0561e", "#6b6b6b"  # lines in order
NOT_KEPT = "#a9c5e4"
CURVES = {"S": "#8fb3dc", "B": "#1f5fa8", "L": "#12305a", "training": "#1f5fa8"}
CURVES |= {"sampling": "#c0561e"}
_LOGARITHMIC = ("reconstruction-tokens", "generation-tokens", "speed")


def _wanted(record: Record, benchmark: str, found: Sequence[Any], what: str) -> None:
    """Refuse a record of another benchmark, or one with nothing to draw."""
    if record.get("benchmark") != benchmark or not found:
        got = f"{record.get('benchmark')} with {len(found)} measured cases"
        script = f"{benchmark.removeprefix('paper-')}.py"
        raise ValueError(f"{benchmark} wants a record of {script} with {what}; got {got}")


def caption(record: Record, dtype: str | None = None) -> str:
    """Device, versions and date of a record."""
    e = record["environment"]
    threads = "" if "driver" in e or "threads" not in e else f", {e['threads']} CPU threads"
    kind = "" if dtype is None else f", {dtype}"
    return f"{e['device']}{threads}, torch {e['torch']}{kind}, {e['date_utc'][:10]}"


def scaling(record: Record) -> Figure:
    """Samples/s above, peak memory below, a column per axis that was measured."""
    cases = [c for c in record["cases"] if c.get("images_per_s")]
    axes = [a for a in AXES if any(c.get("axis") == a for c in cases)]
    _wanted(record, "scaling", axes, "measured workloads")
    figure = Figure(figsize=(3.2 * len(axes), 5.4), layout="constrained")
    grid = figure.subplots(2, len(axes), squeeze=False)
    for (speed, memory), axis in zip(grid.T, axes, strict=True):
        field = "side" if axis == "resolution" else axis
        lines: dict[str, list[Record]] = {}
        for case in (c for c in cases if c["axis"] == axis):
            # titok-l-32 and titok-l-64-512 differ by more than their side, but the paper pairs them
            name = case["model"][:7] if axis == "resolution" else case["model"]
            lines.setdefault(name, []).append(case)
        for color, (model, line) in zip(MEASURED, lines.items(), strict=False):
            x = [c[field] for c in line]
            _speeds(speed, x, line, record, model, color)
            peaks = [(c[field], c["peak_bytes"] / 2**30) for c in line if c["peak_bytes"]]
            if peaks:
                memory.plot(*zip(*peaks, strict=True), "o-", color=color)
        ticks = sorted({c[field] for line in lines.values() for c in line})
        for panel in (speed, memory):
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [str(t) for t in ticks])
            panel.set_ylim(0, 1.15 * panel.get_ylim()[1])
            panel.set_xlabel(axis if axis != "resolution" else "image side, pixels")
        speed.set_title(axis)
        if not memory.lines:
            memory.text(0.5, 0.5, "not measured", ha="center", transform=memory.transAxes)
        speed.legend(fontsize=7)
    grid[0][0].set_ylabel("samples/s")
    grid[1][0].set_ylabel("peak memory, GiB")
    figure.suptitle(caption(record, cases[0]["dtype"]), fontsize=9)
    return figure


def _speeds(
    panel: Any, x: list[int], cases: Sequence[Record], record: Record, label: str, color: str
) -> None:
    """One line of measured rates, and where the cost model has them its predictions."""
    rates = [c["images_per_s"] for c in cases]
    low, high = zip(*((r["median"] - r["p20"], r["p80"] - r["median"]) for r in rates), strict=True)
    panel.errorbar(x, [r["median"] for r in rates], [low, high], fmt="o-", color=color, label=label)
    keys = ("model", "batch", "tokens", "steps")
    predicted = {
        tuple(line[key] for key in keys): line["batch"] / line["predicted_s"]
        for line in record.get("cost_model", {}).get("lines", ())
        if line["stage"] == "total"
    }
    found = [
        (a, predicted[tuple(c[key] for key in keys)])
        for a, c in zip(x, cases, strict=True)
        if c["threads"] is None and c["ranks"] == 1 and tuple(c[key] for key in keys) in predicted
    ]
    if found:
        first = not any(line.get_label() == "cost model" for line in panel.lines)
        name = "cost model" if first else None
        panel.plot(*zip(*found, strict=True), "x--", color=PREDICTED, label=name)


def peers(record: Record) -> Figure:
    """How many times faster ours are than each system, beside the ratio of the paper's figures."""
    bars = [(case, own) for case in record["cases"] for own in case.get("ours") or ()]
    _wanted(record, "peers", bars, "measured systems")
    figure = Figure(figsize=(7.5, 0.9 + 0.36 * len(bars)), layout="constrained")
    panel = figure.subplots()
    for y, (_, own) in enumerate(reversed(bars)):
        panel.barh(y + 0.18, own["speed_up"], 0.34, color=MEASURED[0])
        panel.text(own["speed_up"], y + 0.18, f" {own['speed_up']:.3g}", va="center", fontsize=7)
        if own["paper_ratio"] is not None:
            panel.barh(y - 0.18, own["paper_ratio"], 0.34, color=PAPER)
    names = [f"{c['generator']} {c['side']} px / {o['model']}, {o['mode']}" for c, o in bars[::-1]]
    panel.set_yticks(range(len(names)), names, fontsize=7)
    panel.set_xscale("log")
    panel.set_xlabel("times faster: measured (blue), ratio of the paper's A100 figures (grey)")
    panel.set_title(caption(record, bars[0][0]["dtype"]), fontsize=8)
    return figure


def waterfall(record: Record) -> Figure:
    """Samples/s of each measured row, first at the top, with the ratio to upstream's float32."""
    cases = [case for case in record["cases"] if "images_per_s" in case]
    _wanted(record, "waterfall", cases, "measured rows")
    figure = Figure(figsize=(8, 0.9 + 0.28 * len(cases)), layout="constrained")
    panel = figure.subplots()
    for y, case in enumerate(reversed(cases)):
        rate, official = case["images_per_s"], case["implementation"] == "upstream"
        spread = [[rate["median"] - rate["p20"]], [rate["p80"] - rate["median"]]]
        color = NOT_KEPT if case.get("aside") else PAPER if official else MEASURED[0]
        panel.barh(y, rate["median"], xerr=spread, color=color)
        times = case["x_upstream_fp32"]
        text = f" {rate['median']:.3g}" + (f", {times:.2f}x" if times is not None else "")
        panel.text(rate["p80"], y, text, va="center", fontsize=7)
    names = [("+ " if case.get("aside") else "") + case["text"] for case in reversed(cases)]
    panel.set_yticks(range(len(cases)), names, fontsize=7)
    panel.margins(x=0.15, y=0.01)
    panel.set_xlabel("samples/s, ratio to the official code in float32")
    panel.set_title(f"{record['model']}, batch {record['batch']}: {caption(record)}", fontsize=8)
    return figure


def trends(record: Record) -> Figure:
    """Our curves above, the paper's below, a column for each group that was measured."""
    curves = [c for c in record.get("comparisons", ()) if not c["line"].endswith("tokens")]
    _wanted(record, "paper-trends", curves, "curves")
    groups = list(dict.fromkeys(c["group"] for c in curves))
    figure = Figure(figsize=(3.1 * len(groups), 5.6), layout="constrained")
    grid = figure.subplots(2, len(groups), squeeze=False)
    for (above, below), group in zip(grid.T, groups, strict=True):
        mine = [c for c in curves if c["group"] == group]
        _curves(above, mine, "x", "ours")
        _curves(below, mine, "paper_x", "paper")
        above.set_title(group, fontsize=9)
        below.set_xlabel("tokens" if isinstance(mine[0]["x"][0], int) else "")
    figure.suptitle(f"{record['protocol']['features']} | {caption(record)}", fontsize=8)
    return figure


def _curves(panel: Any, curves: Sequence[Record], places: str, values: str) -> None:
    first = curves[0]
    x = first[places]
    if isinstance(x[0], str):
        panel.bar(range(len(x)), first[values], color=MEASURED[0])
        panel.set_xticks(range(len(x)), x, fontsize=7, rotation=20)
        if values == "ours" and first["noise"]:
            panel.errorbar(range(len(x)), first["ours"], first["noise"], fmt="none", ecolor=PAPER)
    else:
        for curve in curves:
            panel.plot(x, curve[values], "o-", color=CURVES[curve["line"]], label=curve["line"])
        panel.set_xscale("log", base=2)
        panel.set_xticks(x, [str(one) for one in x])
        if first["group"] in _LOGARITHMIC:
            panel.set_yscale("log")
        panel.legend(fontsize=7)
    metric, where = ("metric_here", "here") if values == "ours" else ("metric", "paper")
    panel.set_ylabel(f"{first[metric]}, {where}", fontsize=8)
    panel.tick_params(labelsize=7)


DRAW = {"scaling": scaling, "peers": peers, "waterfall": waterfall, "paper-trends": trends}


def write(figure: Figure, path: str | Path) -> None:
    """Write or replace an SVG, whole or not at all; the same figure gives the same file."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "titok_fast"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_atomic(Path(path), buffer.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: an SVG for each record, under its name."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("records", nargs="+", type=Path, metavar="FILE")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: beside each record")
    args = p.parse_args(argv)
    for path in args.records:
        record = json.loads(path.read_text())
        draw = DRAW.get(record.get("benchmark"))
        if draw is None:
            p.error(f"{path} wants a record of {', '.join(DRAW)}")
        try:
            write(draw(record), (args.out or path.parent) / f"{path.stem}.svg")
        except ValueError as error:
            p.error(f"{path}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
