"""A record of paper_trends.py to a picture: our curves above, the paper's below."""

from collections.abc import Mapping
from typing import Any

from lib.plots import Figure, write  # says how to get matplotlib where it is not
from paper.cells import GROUPS

__all__ = ["trends", "write"]

_COLOURS = {"S": "#8fb3dc", "B": "#1f5fa8", "L": "#12305a", "training": "#1f5fa8",
            "sampling": "#c0561e"}  # fmt: skip
_LOGARITHMIC = ("reconstruction-tokens", "generation-tokens", "speed")


def trends(record: Mapping[str, Any]) -> Figure:
    """A column for each group that was measured.

    Raises:
        ValueError: a record of another benchmark, or without a curve.
    """
    curves = [c for c in record.get("comparisons", ()) if not c["line"].endswith("tokens")]
    groups = [group for group in GROUPS if any(c["group"] == group for c in curves)]
    if record["benchmark"] != "paper-trends" or not groups:
        got = f"{record['benchmark']} with {len(curves)} curves"
        raise ValueError(f"trends wants a record of paper_trends.py with curves; got {got}")
    figure = Figure(figsize=(3.1 * len(groups), 5.6), layout="constrained")
    grid = figure.subplots(2, len(groups), squeeze=False)
    for column, group in enumerate(groups):
        mine = [c for c in curves if c["group"] == group]
        _panel(grid[0][column], mine, "x", "ours")
        _panel(grid[1][column], mine, "paper_x", "paper")
        grid[0][column].set_title(group, fontsize=9)
        grid[1][column].set_xlabel("tokens" if isinstance(mine[0]["x"][0], int) else "")
    e = record["environment"]
    where = f"{e['device']}, torch {e['torch']}, {e['date_utc'][:10]}"
    figure.suptitle(f"{record['protocol']['features']} | {where}", fontsize=8)
    return figure


def _panel(panel: Any, curves: list[Mapping[str, Any]], places: str, values: str) -> None:
    x = curves[0][places]
    if isinstance(x[0], str):
        panel.bar(range(len(x)), curves[0][values], color="#1f5fa8")
        panel.set_xticks(range(len(x)), x, fontsize=7, rotation=20)
        if values == "ours" and curves[0]["noise"]:
            ours, noise = curves[0]["ours"], curves[0]["noise"]
            panel.errorbar(range(len(x)), ours, noise, fmt="none", ecolor="#6b6b6b")
    else:
        for curve in curves:
            panel.plot(x, curve[values], "o-", color=_COLOURS[curve["line"]], label=curve["line"])
        panel.set_xscale("log", base=2)
        panel.set_xticks(x, [str(one) for one in x])
        if curves[0]["group"] in _LOGARITHMIC:
            panel.set_yscale("log")
        panel.legend(fontsize=7)
    what, where = ("metric_here", "here") if values == "ours" else ("metric", "paper")
    panel.set_ylabel(f"{curves[0][what]}, {where}", fontsize=8)
    panel.tick_params(labelsize=7)
