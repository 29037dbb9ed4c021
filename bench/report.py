"""Result files to tables: bench/results/*.json -> README.md, between the markers.

    python bench/report.py           rewrite the tables
    python bench/report.py --check   exit status 1 when README.md says something else than the files

Per device the newest commit measured counts, with all its files: numbers of two commits never meet
in one table. Of waterfalls, scaling, cost models and peers it is the newest file of each device,
model and batch. What was not measured says so. The paper's numbers are labelled as the paper's.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from math import log10
from pathlib import Path
from typing import Any

from cost_model import comparison_table
from harness import NOT_MEASURED, table
from peer_systems import PAPER_A100
from peers import peers_table
from scaling import scaling_table
from waterfall import waterfall_table

from titok_fast import PRESETS
from titok_fast.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
Record = dict[str, Any]
Case = dict[str, Any]

_COMMON = ("model", "batch", "implementation", "dtype")
_RATIOS = ("x upstream as shipped", "x upstream, same dtype")
_DETAILS = ("first call s", "GFLOP")
_COST_AND_QUALITY = ("of matmul peak", "peak GiB", "ids equal", "PSNR dB")
_STAGES = ("generator ms", "ViT decoder ms", "pixel decoder ms", "transfer ms")
_PAPER = "paper's figure: A100"
_KERNEL_KEYS = ("op", "shape", "batch", "dtype", "pass")


def sampling_table(record: Record, *, details: bool = False) -> str:
    """The Markdown table of one sampling record; with details as the terminal shows it."""
    more = ("x reference", *_STAGES, *_DETAILS, _PAPER) if details else ()
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
    """The Markdown table of one kernel record: a row per op, shape and pass, a column per rival."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for case in record["cases"]:
        key = case["op"], case["model"], case["batch"], case["dtype"], case["work"]
        row = rows.setdefault(key, dict(zip(_KERNEL_KEYS, key, strict=True)))
        if case.get("seconds"):
            row[f"{case['by']} ms"] = f"{1000 * case['seconds']['median']:.3g}"
        if case["by"] == "ours":
            ratio = case.get("x_upstream")
            row["x upstream"] = ratio and f"{ratio:.2f}"
    return table(list(rows.values()), (*_KERNEL_KEYS, "ours ms", "upstream ms", "x upstream"))


def _row(case: Case, record: Record, rate: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": case["model"],
        "batch": case["batch"],
        "direction": case.get("direction"),
        "implementation": _implementation(case),
        "dtype": case["dtype"],
        "steps": case.get("sampling", {}).get("num_sample_steps"),
        _PAPER: case.get("paper_a100_images_per_s"),
        "GFLOP": sum(case["gflop_per_image"].values()),
        rate: f"failed ({case.get('error')})",
    }
    if "images_per_s" not in case:
        return row
    speed = case["images_per_s"]
    row[rate] = f"{speed['median']:.3g} ({speed['p20']:.3g}-{speed['p80']:.3g})"
    group = [other for other in record["cases"] if _group(other) == _group(case)]
    # upstream's sampling script turns TF32 on, which only CUDA has
    shipped = "tf32" if "driver" in record["environment"] else "fp32-ieee"
    for column, implementation, dtype in (
        (_RATIOS[0], "upstream", shipped),
        (_RATIOS[1], "upstream", case["dtype"]),
        ("x reference", "reference", "fp32-ieee"),
    ):
        row[column] = _ratio(case, group, implementation, dtype)
    peak, flop = case["peak_bytes"], row["GFLOP"] * 1e9
    row["first call s"] = case["first_call_s"]
    row["peak GiB"] = None if peak is None else f"{peak / 2**30:.2f}"
    measured_peak = record["matmul_flop_per_s"].get(case["dtype"])
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


def _implementation(case: Case) -> str:
    if case["implementation"] == "ours":
        return f"ours, {case['mode']}"
    if case["implementation"] == "upstream":
        return "upstream, autocast" if case["dtype"] == "bf16" else "upstream"
    return str(case["implementation"])


def _group(case: Case) -> tuple[Any, ...]:
    sampling = str(case.get("sampling"))
    return case["model"], case["batch"], case.get("direction"), sampling, case.get("op")


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


def load(folder: Path, benchmark: str) -> list[Record]:
    """One merged record per device: the files of its newest commit, the newest of equal cases."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    records = [r for r in found if isinstance(r, dict) and r.get("benchmark") == benchmark]
    records.sort(key=lambda r: r["environment"]["date_utc"], reverse=True)
    devices: dict[str, Record] = {}
    for record in records:
        device = record["environment"]["device"]
        newest = devices.setdefault(device, record | {"cases": []})
        if record["environment"]["commit"] != newest["environment"]["commit"]:
            continue
        done = {_group(case) for case in newest["cases"]}
        newest["cases"] += [case for case in record["cases"] if _group(case) not in done]
    order = list(PRESETS)
    for newest in devices.values():
        newest["cases"].sort(key=lambda c: order.index(c["model"]) if c["model"] in order else -1)
    return [devices[name] for name in sorted(devices)]


def whole(folder: Path, benchmark: str) -> list[tuple[Path, Record]]:
    """The newest file of each device, model and batch, for benchmarks whose files stand alone."""
    found = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    mine = [(path, r) for path, r in found if r.get("benchmark") == benchmark]
    newest: dict[tuple[Any, ...], tuple[Path, Record]] = {}
    for path, record in sorted(mine, key=lambda pair: pair[1]["environment"]["date_utc"]):
        key = record["environment"]["device"], record.get("model", ""), record.get("batch", 0)
        newest[key] = path, record
    return [newest[key] for key in sorted(newest)]


def cost_model_table(record: Record) -> str:
    """How far the cost model is from each measured total."""
    lines = record["cost_model"]["lines"]
    return comparison_table([line for line in lines if line["stage"] == "total"])


_MERGED = {
    "sampling": sampling_table,
    "reconstruction": reconstruction_table,
    "kernels": kernels_table,
}
_WHOLE: dict[str, Callable[[Record], str]] = {
    "waterfall": waterfall_table,
    "scaling": scaling_table,
    "cost-model": cost_model_table,
    "peers": peers_table,
}


def section(folder: Path, benchmark: str) -> str:
    """What stands between a pair of markers."""
    if benchmark in _WHOLE:
        return _section_of_files(folder, benchmark)
    records = load(folder, benchmark)
    make = _MERGED[benchmark]
    parts = [f"{_caption(record)}\n\n{make(record)}" for record in records]
    if benchmark == "sampling":
        parts.append(_beside_the_paper(records))
    return "\n\n".join(parts) or _nothing()


def _section_of_files(folder: Path, benchmark: str) -> str:
    parts = []
    for path, record in whole(folder, benchmark):
        parts.append(f"{_caption(record)}\n\n{_WHOLE[benchmark](record)}")
        if "model" in record:
            parts[-1] = f"{record['model']}, batch {record['batch']}. {parts[-1]}"
        if path.with_suffix(".svg").exists():
            parts.append(f"![{benchmark}](bench/results/{path.stem}.svg)")
    return "\n\n".join(parts) or _nothing()


def _nothing() -> str:
    return f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]} yet."


def _caption(record: Record) -> str:
    e, protocol = record["environment"], record["protocol"]
    commit = (e["commit"] or "unknown")[:10] + (" with local changes" if e["dirty"] else "")
    threads = "" if "driver" in e else f", {e['threads']} threads"
    run = f"{e['device']}{threads}: torch {e['torch']}, commit {commit}, {e['date_utc'][:10]}"
    if "weights" not in protocol:
        return f"{run}."
    inputs = f"; input: {protocol['inputs']}" if "inputs" in protocol else ""
    return (
        f"{run}; {protocol['weights']} weights{inputs}. Upstream as shipped is its float32"
        f"{' with TF32' if 'driver' in e else ''}."
    )


def _beside_the_paper(records: Sequence[Record]) -> str:
    """The paper's A100 figures, and ours on an A100 where there is one."""
    rows = []
    for (model, steps), figure in PAPER_A100.items():
        rates = [
            case["images_per_s"]["median"]
            for record in records
            for case in record["cases"]
            if "A100" in record["environment"]["device"]
            and (case["model"], case["sampling"]["num_sample_steps"]) == (model, steps)
            and case["implementation"] == "ours"
            and "images_per_s" in case
        ]
        best = max(rates, default=None)
        rows.append({"model": model, "steps": steps, _PAPER: figure, "ours: A100, best": best})
    lines = table(rows, ("model", "steps", _PAPER, "ours: A100, best"))
    return (
        f"Samples/s beside the paper's (arXiv 2406.07550, one A100, batch not stated):\n\n{lines}"
    )


def fill(readme: str, folder: Path) -> str:
    """The README with its tables rewritten.

    Raises:
        ValueError: a pair of markers is missing.
    """
    for benchmark in (*_MERGED, *_WHOLE):
        begin, end = f"<!-- results:{benchmark} -->", f"<!-- /results:{benchmark} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(readme):
            raise ValueError(f"README wants the markers {begin} and {end}")
        text = f"{begin}\n\n{section(folder, benchmark)}\n\n{end}"
        readme = pattern.sub(lambda _, text=text: text, readme)  # type: ignore[misc]
    return readme


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--check", action="store_true", help="compare, write nothing")
    p.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    p.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    args = p.parse_args(argv)
    before = args.readme.read_text()
    try:
        after = fill(before, args.results)
    except ValueError as error:
        p.error(str(error))
    if args.check and after != before:
        print(f"{args.readme.name} differs from the results: run python bench/report.py")
        return 1
    if not args.check and after != before:
        write_atomic(args.readme, after.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
