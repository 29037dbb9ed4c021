"""Result files to tables: bench/results/*.json -> README.md, between the markers.

    python bench/report.py           rewrite the tables
    python bench/report.py --check   exit status 1 when README.md says something else than the files

Per device the newest commit measured counts, with all its files: numbers of two commits never meet
in one table. Of waterfalls, scaling, cost models and peers it is the newest file of each device,
model and batch. What was not measured says so. The paper's numbers are labelled as the paper's.
Long tables are folded, behind a summary where there is one.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lib.cost_model import comparison_table
from lib.harness import NOT_YET, RATES, table
from lib.peers.systems import PAPER_A100
from lib.report_summaries import SUMMARIES, fold_tables
from lib.report_tables import (
    IN_PACKAGE,
    PAPER,
    Files,
    Record,
    first_call_table,
    group_of,
    kernels_table,
    read,
    reconstruction_table,
    sampling_table,
)
from lib.report_trends import trends_table
from peers import peers_table
from recipe_times import recipe_times_table
from report_fashion import fashion_table
from scaling import scaling_table
from training import training_table
from waterfall import waterfall_table

from titok_fast import PRESETS
from titok_fast.io.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent


def merged(files: Files, benchmark: str) -> list[Record]:
    """One record per device: the files of its newest commit, the newest of equal cases."""
    records = [record for _, record in files if record["benchmark"] == benchmark]
    records.sort(key=lambda r: r["environment"]["date_utc"], reverse=True)
    devices: dict[str, Record] = {}
    for record in records:
        device = record["environment"]["device"]
        newest = devices.setdefault(device, record | {"cases": []})
        if record["environment"]["commit"] != newest["environment"]["commit"]:
            continue
        done = {group_of(case) for case in newest["cases"]}
        own = {RATES: record[RATES]} if RATES in record else {}
        newest["cases"] += [case | own for case in record["cases"] if group_of(case) not in done]
    order = list(PRESETS)
    for newest in devices.values():
        newest["cases"].sort(key=lambda c: order.index(c["model"]) if c["model"] in order else -1)
    return [devices[name] for name in sorted(devices)]


def whole(files: Files, benchmark: str) -> Files:
    """The newest file of each device, model and batch, for benchmarks whose files stand alone."""
    mine = [(path, record) for path, record in files if record["benchmark"] == benchmark]
    newest: dict[tuple[Any, ...], tuple[Path, Record]] = {}
    for path, record in sorted(mine, key=lambda pair: pair[1]["environment"]["date_utc"]):
        key = record["environment"]["device"], record.get("model", ""), record.get("batch", 0)
        newest[key] = path, record
    return [newest[key] for key in sorted(newest)]


def cost_model_table(record: Record) -> str:
    """How far the cost model is from each measured total."""
    lines = record["cost_model"]["lines"]
    return comparison_table([line for line in lines if line["stage"] == "total"])


# benchmark: the table of its section, which stands between markers of that name in the README.
# Of these a section has one table per device
_MERGED: dict[str, Callable[[Record], str]] = {
    "sampling": sampling_table,
    "reconstruction": reconstruction_table,
    "kernels": kernels_table,
    "training": training_table,
}
# of these one per file
_WHOLE: dict[str, Callable[[Record], str]] = {
    "waterfall": waterfall_table,
    "scaling": scaling_table,
    "cost-model": cost_model_table,
    "peers": peers_table,
    "first_call": first_call_table,
    "fashion": fashion_table,
    "recipe-times": recipe_times_table,
    "paper-trends": trends_table,
}


def section(files: Files, benchmark: str) -> str:
    """What stands between a pair of markers."""
    if benchmark in _WHOLE:
        return _section_of_files(files, benchmark)
    records = merged(files, benchmark)
    make = _MERGED[benchmark]
    parts = [_with_summary(benchmark, record, make(record)) for record in records]
    if benchmark == "sampling":
        parts.append(_beside_the_paper(records))
    return "\n\n".join(parts) or NOT_YET


def _with_summary(benchmark: str, record: Record, lines: str) -> str:
    summary = SUMMARIES[benchmark](record) if benchmark in SUMMARIES else ""
    return "\n\n".join(part for part in (_caption(record), summary, fold_tables(lines)) if part)


def _section_of_files(files: Files, benchmark: str) -> str:
    parts = []
    for path, record in whole(files, benchmark):
        parts.append(_with_summary(benchmark, record, _WHOLE[benchmark](record)))
        if "model" in record:
            parts[-1] = f"{record['model']}, batch {record['batch']}. {parts[-1]}"
        if path.with_suffix(".svg").exists():
            parts.append(f"![{benchmark}](bench/results/{path.stem}.svg)")
    return "\n\n".join(parts) or NOT_YET


def _caption(record: Record) -> str:
    e, protocol = record["environment"], record["protocol"]
    commit = (e["commit"] or "unknown")[:10] + (" with local changes" if e["dirty"] else "")
    threads = "" if "driver" in e else f", {e['threads']} threads"
    run = f"{e['device']}{threads}: torch {e['torch']}, commit {commit}, {e['date_utc'][:10]}"
    if "weights" not in protocol:
        return f"{run}."
    inputs = f"; input: {protocol['inputs']}" if "inputs" in protocol else ""
    shipped = [c["model"] for c in record["cases"] if c.get("weights") == IN_PACKAGE]
    whose, comma, rest = protocol["weights"].partition(",")
    weights = f"{whose} weights{comma}{rest}"
    if shipped:
        weights += f", of {', '.join(dict.fromkeys(shipped))} those in the package"
    text = f"{run}; {weights}{inputs}."
    if any(case.get("implementation") == "upstream" for case in record["cases"]):
        text += f" Upstream as shipped is its float32{' with TF32' if 'driver' in e else ''}."
    return text


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
        rows.append({"model": model, "steps": steps, PAPER: figure, "ours: A100, best": best})
    lines = table(rows, ("model", "steps", PAPER, "ours: A100, best"))
    return (
        f"Samples/s beside the paper's (arXiv 2406.07550, one A100, batch not stated):\n\n{lines}"
    )


def fill(readme: str, files: Files) -> str:
    """The README with its tables rewritten.

    Raises:
        ValueError: a pair of markers is missing.
    """
    for benchmark in (*_MERGED, *_WHOLE):
        begin, end = f"<!-- results:{benchmark} -->", f"<!-- /results:{benchmark} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(readme):
            raise ValueError(f"README wants the markers {begin} and {end}")
        text = f"{begin}\n\n{section(files, benchmark)}\n\n{end}"
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
        after = fill(before, read(args.results))
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
