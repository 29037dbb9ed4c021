"""Write the few numbers that people come for: lines and short tables before the long ones."""

import re
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from lib.cost_model import worst
from lib.harness import NOT_MEASURED, table
from lib.tables import Case, Record, agreement, group_of, name_of, shipped_dtype

_LONG = 16  # longer tables are folded
_TABLE = re.compile(r"^\|.*\n\|[ |-]+\|\n(?:\|.*(?:\n|\Z))+", re.MULTILINE)


def fold_tables(text: str) -> str:
    """Fold the long tables of a Markdown text."""

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
    return f"Times as fast as upstream's lines:\n\n{table(rows)}" if rows else ""


def peers_summary(record: Record) -> str:
    """A line per system: our fastest model beside it, and the paper's ratio for the same two."""
    rows = []
    for case in record["cases"]:
        best = max(case.get("ours", ()), key=lambda own: own.get("speed_up") or 0, default=None)
        if best is None:
            continue
        rows.append(
            {
                "system": case["generator"],
                "side": case["side"],
                "steps": case["steps"],
                "ours": f"{best['model']}, {best['mode']}",
                "times faster": best.get("speed_up"),
                "paper's A100": best.get("paper_ratio"),
            }
        )
    return table(rows) if rows else ""


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


_MODEL = "titok-l-32"
_EXACT, _INT8 = ("eager", "compiled", "fast"), "int8"
_OVER = ("x upstream as shipped", "x upstream under autocast")


def _newest(records: Sequence[Record]) -> tuple[dict[str, dict[str, Any]], int, str]:
    """Rows of _MODEL in bfloat16 by mode, of the newest device; its largest batch, and its name."""
    fitting = [r for r in records if any(map(_is_ours, r["cases"]))]
    if not fitting:
        return {}, 0, ""
    record = max(fitting, key=lambda r: r["environment"]["date_utc"])
    batch: int = max(case["batch"] for case in record["cases"] if _is_ours(case))
    cases = [c for c in record["cases"] if c["batch"] == batch and "images_per_s" in c]
    upstream = {
        case["dtype"]: case["images_per_s"]["median"]
        for case in cases
        if (case["model"], case["implementation"]) == (_MODEL, "upstream")
    }
    rows = {}
    for case in filter(_is_ours, cases):
        rate = case["images_per_s"]["median"]
        row = {"mode": case["mode"], "samples/s": rate} | agreement(case)
        for column, dtype in zip(_OVER, (shipped_dtype(record), "bf16"), strict=True):
            row[column] = f"{rate / upstream[dtype]:.2f}" if dtype in upstream else NOT_MEASURED
        rows[case["mode"]] = row
    return rows, batch, device_of(record)


def _is_ours(case: Case) -> bool:
    key = case["model"], case["implementation"], case["dtype"]
    return key == (_MODEL, "ours", "bf16") and "images_per_s" in case


def device_of(record: Record) -> str:
    """The device of a record, a CPU with its threads."""
    e = record["environment"]
    return e["device"] + ("" if "driver" in e else f", {e['threads']} threads")


def headline(records: Sequence[Record]) -> str:
    """One sentence: samples/s of the fastest exact mode and of int8, and over upstream's."""
    rows, batch, device = _newest(records)
    if not rows:
        return f"TiTok-L-32: {NOT_MEASURED}."
    exact = [mode for mode in _EXACT if mode in rows]
    best = max(exact, key=lambda mode: rows[mode]["samples/s"], default="")
    said = []
    for mode, words in ((best, f"bfloat16, mode {best}"), (_INT8, "int8")):
        if mode not in rows:
            said.append(f"{words}: {NOT_MEASURED}")
            continue
        rate, (shipped, autocast) = rows[mode]["samples/s"], (rows[mode][name] for name in _OVER)
        over = f"{shipped} times upstream as shipped, {autocast} times upstream under autocast"
        said.append(f"{rate:.3g} samples/s in {words} ({over})")
    return f"TiTok-L-32 at batch {batch} on {device}: {'; '.join(said)}."


def fast_modes(records: Sequence[Record]) -> str:
    """A table of eager, fast and int8 on the newest device: speed, ratios, agreement."""
    rows, batch, device = _newest(records)
    shown = [rows.get(mode, {"mode": mode}) for mode in ("eager", "fast", _INT8)]
    lines = table(shown, ("mode", "samples/s", *_OVER, "ids equal", "PSNR dB"))
    return f"{_MODEL}, bfloat16, batch {batch}; {device}.\n\n{lines}" if rows else lines


def training_minutes(record: Record | None) -> str:
    """One line: minutes of each run in a record of `fashion.py --times`, and their sum."""
    if record is None:
        return f"Minutes of training: {NOT_MEASURED}."
    runs = record["cases"]
    each = ", ".join(f"{run['run']} {run['minutes']:.0f}" for run in runs)
    total = sum(run["minutes"] for run in runs)
    return f"Minutes of training on {device_of(record)}: {each}; {total:.0f} in all."
