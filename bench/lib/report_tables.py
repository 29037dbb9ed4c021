"""Tables of result files: a function per benchmark, from its record to Markdown."""

import json
from collections.abc import Sequence
from math import log10
from pathlib import Path
from typing import Any

from lib.harness import RATES, gib, spread, table

Record = dict[str, Any]
Case = dict[str, Any]
Files = Sequence[tuple[Path, Record]]

IN_PACKAGE = "in the package"  # a case's `weights` where they are not those of its record
PAPER = "paper's figure: A100"
_COMMON = ("model", "batch", "implementation", "dtype")
_RATIOS = ("x upstream as shipped", "x upstream, same dtype")
_DETAILS = ("first call s", "GFLOP")
_COST_AND_QUALITY = ("of matmul peak", "peak GiB", "ids equal", "PSNR dB")
_STAGES = ("generator ms", "ViT decoder ms", "pixel decoder ms", "transfer ms")
_KERNEL_KEYS = ("op", "shape", "batch", "dtype", "pass")


def read(folder: Path) -> Files:
    """All records of a folder, with their files, by name."""
    found = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    return [(path, r) for path, r in found if isinstance(r, dict) and "benchmark" in r]


def sampling_table(record: Record, *, details: bool = False) -> str:
    """The Markdown table of one sampling record; with details as the terminal shows it."""
    more = ("x reference", *_STAGES, *_DETAILS, PAPER) if details else ()
    rates = ("steps", "samples/s (p20-p80)", *_RATIOS)
    columns = (*_COMMON, *rates, *_COST_AND_QUALITY, *more)
    rows = [_row(case, record, "samples/s (p20-p80)") for case in record["cases"]]
    return table(rows, columns)


def reconstruction_table(record: Record, *, details: bool = False) -> str:
    """The Markdown table of one reconstruction record."""
    rates = ("images/s (p20-p80)", *_RATIOS, *_COST_AND_QUALITY)
    columns = ("direction", *_COMMON, *rates, *(_DETAILS if details else ()))
    rows = [_row(case, record, "images/s (p20-p80)") for case in record["cases"]]
    return table(rows, columns)


def kernels_table(record: Record) -> str:
    """The Markdown table of one kernel record: a row per op, shape and pass.

    Ours beside upstream; then a column for each other implementation that was timed anywhere, with
    "-" where it does not exist: a library, channels-first memory, the compiled reference.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    rivals: dict[str, None] = {}
    for case in record["cases"]:
        key = case["op"], case["model"], case["batch"], case["dtype"], case["work"]
        row = rows.setdefault(key, dict(zip(_KERNEL_KEYS, key, strict=True)))
        column = f"{case['by']} ms"
        row[column] = None
        if case.get("seconds"):
            rivals[column] = None
            row[column] = f"{1000 * case['seconds']['median']:.3g}"
        if case["by"] == "ours":
            ratio = case.get("x_upstream")
            row["x upstream"] = ratio and f"{ratio:.2f}"
    others = [column for column in rivals if column not in ("ours ms", "upstream ms")]
    columns = (*_KERNEL_KEYS, "ours ms", "upstream ms", "x upstream", *others)
    return table([dict.fromkeys(others, "-") | row for row in rows.values()], columns)


def first_call_table(record: Record) -> str:
    """The Markdown table of what fresh processes wait for: cold, warm, and their ratio by mode."""
    rows: list[dict[str, Any]] = []
    seconds = tuple(record["cases"][0]["cold"])
    for case in record["cases"]:
        key = {k: case[k] for k in ("model", "batch", "mode")}
        rows += [key | {"process": name} | case[name] for name in ("cold", "warm")]
        blank = key | {"process": "warm / cold"} | dict.fromkeys(seconds, "")
        rows.append(blank | case["warm_over_cold"])
    return table(rows, ("model", "batch", "mode", "process", *seconds))


def _row(case: Case, record: Record, rate: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": case["model"],
        "batch": case["batch"],
        "direction": case.get("direction"),
        "implementation": name_of(case),
        "dtype": case["dtype"],
        "steps": case.get("sampling", {}).get("num_sample_steps"),
        PAPER: case.get("paper_a100_images_per_s"),
        "GFLOP": sum(case["gflop_per_image"].values()),
        rate: f"failed ({case.get('error')})",
    }
    if "images_per_s" not in case:
        return row
    speed = case["images_per_s"]
    row[rate] = spread(speed)
    group = [other for other in record["cases"] if group_of(other) == group_of(case)]
    for column, implementation, dtype in (
        (_RATIOS[0], "upstream", shipped_dtype(record)),
        (_RATIOS[1], "upstream", case["dtype"]),
        ("x reference", "reference", "fp32-ieee"),
    ):
        row[column] = _ratio(case, group, implementation, dtype)
    flop = row["GFLOP"] * 1e9
    row["first call s"] = case["first_call_s"]
    row["peak GiB"] = gib(case["peak_bytes"])
    measured_peak = case.get(RATES, record[RATES]).get(case["dtype"])
    if measured_peak:
        row["of matmul peak"] = f"{speed['median'] * flop / measured_peak:.0%}"
    for column, stage in zip(
        _STAGES, ("generator", "vit_decoder", "pixel_decoder", "transfer"), strict=True
    ):
        seconds = (case.get("stages_s") or {}).get(stage)
        row[column] = None if seconds is None else _milliseconds(seconds)
    return row | _agreement(case["agreement"])


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.{0 if seconds >= 0.1 else 2}f}"


def name_of(case: Case) -> str:
    """What a table calls the implementation of a case."""
    if case["implementation"] == "ours":
        return f"ours, {case['mode']}"
    if case["implementation"] == "upstream":
        return "upstream, autocast" if case["dtype"] == "bf16" else "upstream"
    return str(case["implementation"])


def group_of(case: Case) -> tuple[Any, ...]:
    """What cases have in common that are measured beside each other."""
    fields = ("model", "batch", "direction", "op", "stage")
    return *(case.get(name) for name in fields), str(case.get("sampling"))


def shipped_dtype(record: Record) -> str:
    """The dtype of upstream as shipped: its script turns TF32 on, which only CUDA has."""
    return "tf32" if "driver" in record["environment"] else "fp32-ieee"


def _ratio(case: Case, group: Sequence[Case], implementation: str, dtype: str) -> str | None:
    for other in group:
        if (other["implementation"], other["dtype"]) == (implementation, dtype):
            base = other.get("images_per_s")
            return f"{case['images_per_s']['median'] / base['median']:.2f}" if base else None
    return None


def _agreement(agreement: dict[str, float]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    if "ids_equal" in agreement:
        shown["ids equal"] = f"{agreement['ids_equal']:.1%}"
    if "pixel_rms" in agreement:
        rms = agreement["pixel_rms"]
        shown["PSNR dB"] = f"{-20 * log10(rms):.1f}" if rms > 0 else "identical"
    return shown
