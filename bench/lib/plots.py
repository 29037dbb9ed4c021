"""Records to pictures: scaling.py's curves, and peers.py's speed-ups beside the paper's.

python bench/plots.py bench/results/FILE_scaling.json bench/results/FILE_peers.json --out .
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

# what runs along each axis of scaling.py
ALONG = {
    "batch": "batch", "tokens": "tokens", "resolution": "side", "steps": "steps",
    "threads": "threads", "ranks": "ranks",
}  # fmt: skip
MEASURED, PREDICTED, PAPER = ("#1f5fa8", "#2f8f5b"), "#c0561e", "#6b6b6b"  # lines in order


def scaling(record: Mapping[str, Any]) -> Figure:
    """Samples/s above, peak memory below, a column per axis that was measured.

    Raises:
        ValueError: a record of another benchmark, or without a measured point.
    """
    cases = [c for c in record["cases"] if c.get("images_per_s")]
    axes = [a for a in ALONG if any(c.get("axis") == a for c in cases)]
    if record["benchmark"] != "scaling" or not axes:
        got = f"{record['benchmark']} with {len(cases)} measured cases"
        raise ValueError(f"scaling wants a record of scaling.py with measured points; got {got}")
    figure = Figure(figsize=(3.2 * len(axes), 5.4), layout="constrained")
    grid = figure.subplots(2, len(axes), squeeze=False)
    for column, axis in enumerate(axes):
        speed, memory = grid[0][column], grid[1][column]
        lines = _by_line([c for c in cases if c["axis"] == axis], axis)
        for color, (model, points) in zip(MEASURED, lines.items(), strict=False):
            x = [c[ALONG[axis]] for c in points]
            _speeds(speed, x, points, record, model, color)
            peaks = [(a, c["peak_bytes"] / 2**30) for a, c in zip(x, points, strict=True)
                     if c["peak_bytes"] is not None]  # fmt: skip
            if peaks:
                memory.plot(*zip(*peaks, strict=True), "o-", color=color)
        for panel in (speed, memory):
            panel.set_xscale("log", base=2)
            ticks = sorted({c[ALONG[axis]] for c in cases if c["axis"] == axis})
            panel.set_xticks(ticks, [str(t) for t in ticks])
            panel.set_ylim(0, 1.15 * panel.get_ylim()[1])
            panel.set_xlabel(axis if axis != "resolution" else "image side, pixels")
        speed.set_title(axis)
        if not memory.lines:
            memory.text(0.5, 0.5, "not measured", ha="center", transform=memory.transAxes)
        speed.legend(fontsize=7)
    grid[0][0].set_ylabel("samples/s")
    grid[1][0].set_ylabel("peak memory, GiB")
    figure.suptitle(_caption(record), fontsize=9)
    return figure


def _by_line(cases: Sequence[Mapping[str, Any]], axis: str) -> dict[str, list[Mapping[str, Any]]]:
    """Cases that one line joins: a model each, or the models of a resolution pair."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        # titok-l-32 and titok-l-64-512 differ by more than their side, but the paper pairs them
        name = case["model"][:7] if axis == "resolution" else case["model"]
        lines.setdefault(name, []).append(case)
    return lines


def _speeds(
    panel: Any,
    x: list[int],
    points: Sequence[Mapping[str, Any]],
    record: Any,
    label: str,
    color: str,
) -> None:
    rates = [c["images_per_s"] for c in points]
    low = [r["median"] - r["p20"] for r in rates]
    high = [r["p80"] - r["median"] for r in rates]
    panel.errorbar(x, [r["median"] for r in rates], [low, high], fmt="o-", color=color, label=label)
    guesses = {
        (g["model"], g["batch"], g["tokens"], g["steps"]): g["batch"] / g["predicted_s"]
        for g in record.get("cost_model", {}).get("lines", ())
        if g["stage"] == "total"
    }
    keys = [(c["model"], c["batch"], c["tokens"], c["steps"]) for c in points]
    whole = [c["threads"] is None and c["ranks"] == 1 for c in points]
    known = [(a, guesses[k]) for a, k, w in zip(x, keys, whole, strict=True) if w and k in guesses]
    if known:
        first = not any(line.get_label() == "cost model" for line in panel.lines)
        name = "cost model" if first else None
        panel.plot(*zip(*known, strict=True), "x--", color=PREDICTED, label=name)


def peers(record: Mapping[str, Any]) -> Figure:
    """How many times faster ours are than each system, beside the ratio of the paper's figures.

    Raises:
        ValueError: a record of another benchmark, or without a measured system.
    """
    cases = [c for c in record["cases"] if c.get("ours")]
    if record["benchmark"] != "peers" or not cases:
        got = f"{record['benchmark']} with {len(cases)} measured cases"
        raise ValueError(f"peers wants a record of peers.py with measured systems; got {got}")
    bars = [(c, own) for c in cases for own in c["ours"]]
    figure = Figure(figsize=(7.5, 0.9 + 0.36 * len(bars)), layout="constrained")
    panel = figure.subplots()
    for y, (_, own) in enumerate(reversed(bars)):
        panel.barh(y + 0.18, own["speed_up"], 0.34, color=MEASURED[0])
        panel.text(own["speed_up"], y + 0.18, f" {own['speed_up']:.3g}", va="center", fontsize=7)
        if own["paper_ratio"] is not None:
            panel.barh(y - 0.18, own["paper_ratio"], 0.34, color=PAPER)
    names = [
        f"{c['generator']} {c['side']} px / {o['model']}, {o['mode']}" for c, o in reversed(bars)
    ]
    panel.set_yticks(range(len(names)), names, fontsize=7)
    panel.set_xscale("log")
    panel.set_xlabel("times faster: measured (blue), ratio of the paper's A100 figures (grey)")
    panel.set_title(_caption(record), fontsize=8)
    return figure


def _caption(record: Mapping[str, Any]) -> str:
    e = record["environment"]
    case = next(c for c in record["cases"] if "dtype" in c)
    threads = "" if "driver" in e else f", {e['threads']} CPU threads"
    return f"{e['device']}{threads}, torch {e['torch']}, {case['dtype']}, {e['date_utc'][:10]}"


def write(figure: Figure, path: str | Path) -> None:
    """Write or replace an SVG, whole or not at all; the same figure gives the same file."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "titok_fast"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_atomic(Path(path), buffer.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("records", nargs="+", type=Path, metavar="FILE")
    p.add_argument("--out", type=Path, default=Path(), metavar="DIR")
    args = p.parse_args(argv)
    for path in args.records:
        record = json.loads(path.read_text())
        draw = {"scaling": scaling, "peers": peers}.get(record.get("benchmark"))
        if draw is None:
            p.error(f"{path} is no record of scaling.py or peers.py")
        write(draw(record), args.out / f"{record['benchmark']}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
