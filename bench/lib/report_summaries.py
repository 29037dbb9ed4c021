"""What a section of the README shows before its long tables: the few numbers people come for."""

import re
from collections.abc import Callable
from statistics import median
from typing import Any

from lib.cost_model import worst
from lib.harness import NOT_MEASURED, table
from lib.report_tables import Record, group_of, name_of, shipped_dtype

_LONG = 16  # rows that are read at a glance; what is longer waits for a click
_TABLE = re.compile(r"^\|.*\n\|[ |-]+\|\n(?:\|.*(?:\n|\Z))+", re.MULTILINE)


def fold_tables(text: str) -> str:
    """Markdown with its long tables closed until they are clicked on."""

    def fold(found: re.Match[str]) -> str:
        lines = found[0].strip("\n")
        rows = lines.count("\n") - 1
        if rows <= _LONG:
            return found[0]
        end = found[0][len(lines) :]
        return f"<details>\n<summary>All {rows} rows</summary>\n\n{lines}\n\n</details>{end}"

    return _TABLE.sub(fold, text)


def sampling_summary(record: Record) -> str:
    """A line per model and batch: samples/s, and in brackets the ratio to each upstream."""
    shown = {("upstream", shipped_dtype(record)), ("upstream", "bf16"), ("ours", "bf16")}
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    for case in record["cases"]:
        if (case["implementation"], case["dtype"]) in shown and "images_per_s" in case:
            rates = groups.setdefault(group_of(case), {})
            rates[name_of(case)] = case["images_per_s"]["median"]
    bases = ("upstream", "upstream, autocast")
    ours = dict.fromkeys(name for rates in groups.values() for name in rates if name not in bases)
    rows = []
    for (model, batch, *_), rates in groups.items():
        row: dict[str, Any] = {"model": model, "batch": batch}
        for name in (*bases, *ours):
            rate, over = rates.get(name), [rates[base] for base in bases if base in rates]
            row[name] = rate
            if rate and over and name in ours:
                row[name] = f"{rate:.3g} ({', '.join(f'{rate / base:.2f}x' for base in over)})"
        rows.append(row)
    lines = table(rows, ("model", "batch", *bases, *ours))
    return (
        "Samples/s. Ours in bfloat16; in brackets over upstream as shipped, then over upstream "
        f"under bfloat16 autocast:\n\n{lines}"
    )


def kernels_summary(record: Record) -> str:
    """A line per op: how many times as fast as upstream's lines, over all its cases."""
    ratios: dict[str, list[float]] = {}
    for case in record["cases"]:
        if case["by"] == "ours" and case.get("x_upstream"):
            ratios.setdefault(case["op"], []).append(case["x_upstream"])
    rows = [
        {"op": op, "cases": len(r)}
        | {"slowest": f"{min(r):.2f}x", "median": f"{median(r):.2f}x", "fastest": f"{max(r):.2f}x"}
        for op, r in ratios.items()
    ]
    return f"Times as fast as upstream's lines:\n\n{table(rows, tuple(rows[0]))}" if rows else ""


def peers_summary(record: Record) -> str:
    """A line per system: our fastest model beside it, and the paper's ratio for the same two."""
    rows = []
    for case in record["cases"]:
        best = max(case.get("ours", ()), key=lambda own: own.get("speed_up") or 0, default=None)
        if best is None:
            continue
        rows.append({
            "system": case["generator"], "side": case["side"], "steps": case["steps"],
            "ours": f"{best['model']}, {best['mode']}", "times faster": best.get("speed_up"),
            "paper's A100": best.get("paper_ratio"),
        })  # fmt: skip
    return table(rows, tuple(rows[0])) if rows else ""


def cost_model_summary(record: Record) -> str:
    """How far the worst predictions are off."""
    lines = record["cost_model"]["lines"]
    free, own = (
        NOT_MEASURED if error is None else f"{error:.1%}"
        for error in (worst(lines, fitted=fitted)["total"] for fitted in (False, True))
    )
    return f"Totals are predicted within {free}, those of the fit itself within {own}."


SUMMARIES: dict[str, Callable[[Record], str]] = {
    "sampling": sampling_summary,
    "kernels": kernels_summary,
    "peers": peers_summary,
    "cost-model": cost_model_summary,
}
