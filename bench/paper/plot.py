"""Draw a record of trends.py: our curves above, the paper's below."""

from collections.abc import Mapping, Sequence
from typing import Any

from lib.plots import Figure
from paper.experiments import GROUPS

_COLORS = {
    "S": "#8fb3dc",
    "B": "#1f5fa8",
    "L": "#12305a",
    "training": "#1f5fa8",
    "sampling": "#c0561e",
}


def trends(record: Mapping[str, Any]) -> Figure:
    """A column for each group that was measured.

    Raises:
        ValueError: a record of another benchmark, or without a curve.
    """
    curves = [c for c in record.get("comparisons", ()) if not c["line"].endswith("tokens")]
    groups = [group for group in GROUPS if any(c["group"] == group for c in curves)]
    if record["benchmark"] != "paper-trends" or not groups:
        got = f"{record['benchmark']} with {len(curves)} curves"
        raise ValueError(f"plot wants a record of trends.py with curves; got {got}")
    figure = Figure(figsize=(3.1 * len(groups), 5.6), layout="constrained")
    grid = figure.subplots(2, len(groups), squeeze=False)
    for column, group in enumerate(groups):
        lines = [c for c in curves if c["group"] == group]
        above, below = grid[0][column], grid[1][column]
        _panel(above, lines, "x", "ours", f"{lines[0]['metric_here']}, here")
        _panel(below, lines, "paper_x", "paper", f"{lines[0]['metric']}, paper")
        above.set_title(group, fontsize=9)
        below.set_xlabel("tokens" if isinstance(lines[0]["x"][0], int) else "")
    e = record["environment"]
    where = f"{e['device']}, torch {e['torch']}, {e['date_utc'][:10]}"
    figure.suptitle(f"{record['protocol']['features']} | {where}", fontsize=8)
    return figure


def _panel(panel: Any, curves: Sequence[Mapping[str, Any]], x: str, y: str, label: str) -> None:
    first, names = curves[0], [str(one) for one in curves[0][x]]
    if isinstance(first[x][0], str):
        error = first["noise"] or None if y == "ours" else None
        panel.bar(range(len(names)), first[y], yerr=error, color="#1f5fa8", ecolor="#6b6b6b")
        panel.set_xticks(range(len(names)), names, fontsize=7, rotation=20)
    else:
        for curve in curves:
            panel.plot(curve[x], curve[y], "o-", color=_COLORS[curve["line"]], label=curve["line"])
        panel.set_xscale("log", base=2)
        panel.set_xticks(first[x], names)
        panel.set_yscale("linear" if first["group"] == "probe-tokens" else "log")
        panel.legend(fontsize=7)
    panel.set_ylabel(label, fontsize=8)
    panel.tick_params(labelsize=7)
