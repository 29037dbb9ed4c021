"""Write the Markdown table of each kind of result file: record in, table out."""

import json
from collections.abc import Sequence
from math import log10
from pathlib import Path
from typing import Any

from lib.harness import NOT_MEASURED, RATES, gib, spread, table

Record = dict[str, Any]
Case = dict[str, Any]
Files = Sequence[tuple[Path, Record]]

IN_PACKAGE = "in the package"  # a case's `weights` where they are not those of its record
RATE = "samples/s (p20-p80)"
PAPER = "paper's figure: A100"
_COMMON = ("model", "batch", "implementation", "dtype")
_RATIOS = ("x upstream as shipped", "x upstream, same dtype")
_DETAILS = ("first call s", "GFLOP")
_COST_AND_QUALITY = ("of matmul peak", "peak GiB", "ids equal", "PSNR dB")
_STAGES = ("generator ms", "ViT decoder ms", "pixel decoder ms", "transfer ms")
_KERNEL_KEYS = ("op", "shape", "batch", "dtype", "pass")
RESULTS = Path(__file__).resolve().parents[1] / "results"


def read(folder: Path = RESULTS) -> Files:
    """All records of a folder, with their files, by name."""
    found = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    return [(path, r) for path, r in found if isinstance(r, dict) and "benchmark" in r]


def sampling_table(record: Record, *, details: bool = False) -> str:
    """A row per case; `details` adds the columns that only the terminal shows."""
    more = ("x reference", *_STAGES, *_DETAILS, PAPER) if details else ()
    return _rates_table(record, (*_COMMON, "steps"), RATE, more)


def reconstruction_table(record: Record, *, details: bool = False) -> str:
    """A row per case; `details` adds the columns that only the terminal shows."""
    more = _DETAILS if details else ()
    return _rates_table(record, ("direction", *_COMMON), "images/s (p20-p80)", more)


def _rates_table(record: Record, keys: tuple[str, ...], rate: str, more: tuple[str, ...]) -> str:
    rows = [_row(case, record, rate) for case in record["cases"]]
    return table(rows, (*keys, rate, *_RATIOS, *_COST_AND_QUALITY, *more))


def kernels_table(record: Record) -> str:
    """A row per op, shape and pass: ours, upstream, the others; "-": there is no such rival."""
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
    """Per mode: seconds of a process with empty caches, with filled ones, and their ratio."""
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
    bases = {(c["implementation"], c["dtype"]): c.get("images_per_s") for c in reversed(group)}
    for column, key in (
        (_RATIOS[0], ("upstream", shipped_dtype(record))),
        (_RATIOS[1], ("upstream", case["dtype"])),
        ("x reference", ("reference", "fp32-ieee")),
    ):
        base = bases.get(key)
        row[column] = base and f"{speed['median'] / base['median']:.2f}"
    flop = row["GFLOP"] * 1e9
    row["first call s"] = case["first_call_s"]
    row["peak GiB"] = gib(case["peak_bytes"])
    measured_peak = case.get(RATES, record[RATES]).get(case["dtype"])
    if measured_peak:
        row["of matmul peak"] = f"{speed['median'] * flop / measured_peak:.0%}"
    for column in _STAGES:
        stage = column.removesuffix(" ms").lower().replace(" ", "_")
        seconds = (case.get("stages_s") or {}).get(stage)
        row[column] = seconds and f"{seconds * 1000:,.{0 if seconds >= 0.1 else 2}f}"
    return row | agreement(case)


def name_of(case: Case) -> str:
    """What a table calls the implementation of a case."""
    if case["implementation"] == "ours":
        return f"ours, {case['mode']}"
    if case["implementation"] == "upstream":
        return "upstream, autocast" if case["dtype"] == "bf16" else "upstream"
    return str(case["implementation"])


def group_of(case: Case) -> tuple[Any, ...]:
    """Key of the cases that were measured side by side."""
    fields = ("model", "batch", "direction", "op", "stage")
    return *(case.get(name) for name in fields), str(case.get("sampling"))


def shipped_dtype(record: Record) -> str:
    """The dtype of upstream as shipped: its script turns TF32 on, which only CUDA has."""
    return "tf32" if "driver" in record["environment"] else "fp32-ieee"


def agreement(case: Case) -> dict[str, Any]:
    """Table columns: share of ids equal to those of float32, and PSNR of the pixels."""
    shown: dict[str, Any] = {}
    if "ids_equal" in case["agreement"]:
        shown["ids equal"] = f"{case['agreement']['ids_equal']:.1%}"
    if "pixel_rms" in case["agreement"]:
        rms = case["agreement"]["pixel_rms"]
        shown["PSNR dB"] = f"{-20 * log10(rms):.1f}" if rms > 0 else "identical"
    return shown


def scaling_table(record: Record) -> str:
    """A row per workload; those left out say why."""
    keys = ("axis", "model", "batch", "tokens", "side", "steps", "threads", "ranks")
    rows = []
    for case in record["cases"]:
        speed, missing = case.get("images_per_s"), case.get("not_measured") or case.get("error")
        shown = f"{NOT_MEASURED}: {missing}" if speed is None else spread(speed)
        row = {key: case[key] for key in keys} | {"threads": case["threads"] or "all"}
        rows.append(row | {RATE: shown, "peak GiB": gib(case.get("peak_bytes"))})
    return table(rows, (*keys, RATE, "peak GiB"))


def waterfall_table(record: Record) -> str:
    """A row per technique; "+" marks those that were tried and not kept."""
    lines = []
    for case in record["cases"]:
        name = ("+ " if case.get("aside") else "") + case["row"]
        line = {"row": name, "technique": case["text"]}
        lines.append(line)
        if "images_per_s" not in case:
            why = case.get("not_measured") or f"failed ({case.get('error')})"
            line[RATE] = f"{NOT_MEASURED}: {why}"
            continue
        quality = case["quality"]
        same = quality["pixel_rms"] == 0
        line |= {
            RATE: spread(case["images_per_s"]),
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
            "PSNR dB": "identical" if same else f"{quality['psnr_db']:.1f}",
        }
    return table(lines)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def recipe_times_table(record: Record) -> str:
    """A row per training run, and one for all."""
    runs = record["cases"]
    total = {key: sum(run[key] for run in runs) for key in ("updates", "minutes")}
    rows = [run | {"minutes": f"{run['minutes']:.1f}"} for run in (*runs, {"run": "all"} | total)]
    return table(rows, ("run", "updates", "minutes"))
