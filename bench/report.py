"""Write the tables of result files into the documents, between their markers.

    python bench/report.py           rewrite README.md, docs/ and the card of the model
    python bench/report.py --check   exit status 1 when a document differs from the results

Each section stands once, between <!-- results:NAME --> and <!-- /results:NAME -->. Per device the
newest commit measured counts, with all its files: numbers of two commits never meet in one table.
Benchmarks that write one whole file per run show the newest file of each device, model and batch.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.cost_model import comparison_table
from lib.harness import NOT_YET, RATES, table
from lib.options import parser
from lib.peers.systems import PAPER_A100
from lib.quality_tables import figures_table, newest_quality, trends_table
from lib.summaries import SUMMARIES, device_of, fast_modes, fold_tables, headline, training_minutes
from lib.tables import (
    IN_PACKAGE,
    PAPER,
    Files,
    Record,
    first_call_table,
    group_of,
    kernels_table,
    read,
    recipe_times_table,
    reconstruction_table,
    sampling_table,
    scaling_table,
    waterfall_table,
)
from peers import peers_table
from training import training_table

from titok_fast import PRESETS
from titok_fast.io.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
CARD = Path("titok_fast") / "weights" / "README.md"
CARD_MODEL = "fashion-16"
_SECTION = re.compile(r"(<!-- results:([\w-]+) -->).*?(<!-- /results:\2 -->)", re.DOTALL)


def by_device(files: Files, benchmark: str) -> list[Record]:
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


def by_run(files: Files, benchmark: str) -> Files:
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


# section: its table, one per device
_PER_DEVICE: dict[str, Callable[[Record], str]] = {
    "sampling": sampling_table,
    "reconstruction": reconstruction_table,
    "kernels": kernels_table,
    "training": training_table,
}
# section: its table, one per run
_PER_RUN: dict[str, Callable[[Record], str]] = {
    "waterfall": waterfall_table,
    "scaling": scaling_table,
    "cost-model": cost_model_table,
    "peers": peers_table,
    "first_call": first_call_table,
    "fashion": figures_table,
    "recipe-times": recipe_times_table,
    "paper-trends": trends_table,
}


def _training_minutes(files: Files) -> str:
    runs = [record for _, record in by_run(files, "recipe-times")]
    return training_minutes(max(runs, key=lambda r: r["environment"]["date_utc"], default=None))


def _card(files: Files) -> str:
    """For the card of the model, which is installed without bench/: no pictures."""
    record = newest_quality(CARD_MODEL, files)
    if record is None:
        return NOT_YET
    e = record["environment"]
    measured = f"Measured at commit {(e['commit'] or 'unknown')[:10]}, {e['date_utc'][:10]}."
    return f"{measured}\n\n{figures_table(record)}"


# section: its text, whatever the device
_SHORT: dict[str, Callable[[Files], str]] = {
    "headline": lambda files: headline(by_device(files, "sampling")),
    "fast-modes": lambda files: fast_modes(by_device(files, "sampling")),
    "training-minutes": _training_minutes,
    "fashion-card": _card,
}
SECTIONS = (*_PER_DEVICE, *_PER_RUN, *_SHORT)


def section(files: Files, name: str, folder: str = "bench/results") -> str:
    """What stands between a pair of markers; `folder` is where pictures lie for the document."""
    if name in _SHORT:
        return _SHORT[name](files)
    parts = []
    if name in _PER_DEVICE:
        records = by_device(files, name)
        parts = [_with_summary(name, record, _PER_DEVICE[name](record)) for record in records]
        if name == "sampling":
            parts.append(_beside_the_paper(records))
    else:
        for path, record in by_run(files, name):
            parts.append(_with_summary(name, record, _PER_RUN[name](record)))
            if "model" in record:
                parts[-1] = f"{record['model']}, batch {record['batch']}. {parts[-1]}"
            pictures = dict(record.get("sheets", {}))
            if path.with_suffix(".svg").exists():
                pictures[name] = f"{path.stem}.svg"
            parts += [f"![{title}]({folder}/{file})" for title, file in pictures.items()]
    return "\n\n".join(parts) or NOT_YET


def _with_summary(name: str, record: Record, lines: str) -> str:
    summary = SUMMARIES[name](record) if name in SUMMARIES else ""
    return "\n\n".join(part for part in (_caption(record), summary, fold_tables(lines)) if part)


def _caption(record: Record) -> str:
    e, protocol = record["environment"], record["protocol"]
    commit = (e["commit"] or "unknown")[:10] + (" with local changes" if e["dirty"] else "")
    run = f"{device_of(record)}: torch {e['torch']}, commit {commit}, {e['date_utc'][:10]}"
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


def documents(root: Path) -> list[Path]:
    """README.md, everything in docs/ and the card of the model, as far as they exist."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md")), root / CARD]
    return [path for path in found if path.is_file()]


def fill(texts: Mapping[Path, str], files: Files, results: Path) -> dict[Path, str]:
    """The documents, texts by path, with their sections rewritten; `results` is the files' folder.

    Raises:
        ValueError: a section is missing, stands twice, or is unknown.
    """
    names = [found[2] for text in texts.values() for found in _SECTION.finditer(text)]
    for name in dict.fromkeys((*SECTIONS, *names)):
        if name not in SECTIONS:
            raise ValueError(f"no results are called {name!r}; known: {', '.join(SECTIONS)}")
        if names.count(name) != 1:
            markers = f"<!-- results:{name} --> and <!-- /results:{name} -->"
            raise ValueError(f"one document wants {markers} once; found {names.count(name)} times")
    filled = {}
    for path, text in texts.items():
        folder = Path(os.path.relpath(results, path.parent)).as_posix()

        def written(found: re.Match[str], folder: str = folder) -> str:
            return f"{found[1]}\n\n{section(files, found[2], folder)}\n\n{found[3]}"

        filled[path] = _SECTION.sub(written, text)
    return filled


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = parser(__doc__)
    p.add_argument("--check", action="store_true", help="compare, write nothing")
    p.add_argument("--results", type=Path, metavar="FOLDER", help="default: ROOT/bench/results")
    p.add_argument("--root", type=Path, default=ROOT, metavar="FOLDER", help="of the documents")
    args = p.parse_args(argv)
    results = args.results or args.root / "bench" / "results"
    before = {path: path.read_text() for path in documents(args.root)}
    try:
        after = fill(before, read(results), results)
    except ValueError as error:
        p.error(str(error))
    changed = [path for path in before if after[path] != before[path]]
    for path in changed:
        if args.check:
            print(f"{path.relative_to(args.root)} differs from the results: run bench/report.py")
        else:
            write_atomic(path, after[path].encode())
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
