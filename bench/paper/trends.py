"""The paper's curves, small: Fashion-MNIST, networks of 0.2 to 1.6 million parameters.

    python bench/paper_trends.py --plan
    python bench/paper_trends.py --json bench/results --plots bench/results
    python bench/paper_trends.py --only probe-tokens,speed

Groups: reconstruction, generation and linear probing against tokens (and model size); proxy codes
against a single stage against the 2D variant; four masking schedules; speed against tokens. Every
finished cell is kept in --work, and a run that was ended goes on where it was. Pictures are judged
by the classifier of recipes/fashion/classifier.yaml: its distances are not those of the paper, so
orders are compared, not values.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the library of bench/

import numpy as np
import torch
from fashion import CLASSIFIER
from lib.cases import say
from lib.harness import environment, table, write_json
from lib.options import add_run, check, save
from lib.report_trends import trends_table
from paper import plot
from paper.cells import CLASSES, GROUPS, RATE, SMOKE, Cell, Settings, cells_of, in_order
from paper.plan import plan
from paper.shape import comparisons
from paper.work import SIDE, Bench, StoppedError, figures_of, train_cell

from titok_fast.data.sources import ArraySource, fashion_mnist
from titok_fast.evaluation.networks import FashionFeatures
from titok_fast.models.classifier import FashionClassifier

_NOISE = "One seed each, but for the masking schedules: small differences may be chance"


def open_bench(args: argparse.Namespace, settings: Settings, work: Path) -> Bench:
    """Data, classifier and folder of a run.

    Raises:
        FileNotFoundError: data or classifier are not there.
        ValueError: the folder holds cells of other settings, or a file is damaged.
    """
    if args.smoke:
        torch.manual_seed(0)
        classifier, train, test = FashionClassifier(), smoke_data(64), smoke_data(48)
    else:
        classifier = _classifier(args.classifier)
        train, test = (fashion_mnist(split, args.data) for split in ("train", "eval"))
    described = {
        "settings": asdict(settings),
        "data": [train.describe(), test.describe()],
        "classifier_sha256": _digest(classifier),
    }
    described = json.loads(json.dumps(described))  # tuples become the lists they are in the file
    known = work / "settings.json"
    if known.exists() and json.loads(known.read_text()) != described:
        raise ValueError(
            f"{work} holds cells of another budget, classifier or data: choose another --work"
        )
    write_json(known, described)
    network = FashionFeatures(classifier).to(args.device)
    return Bench(settings, work, train, test, network, args.device)


def smoke_data(count: int) -> ArraySource:
    """Stripes whose slope is the class, with noise."""
    rng, labels = np.random.default_rng(count), np.arange(count) % CLASSES
    y, x = np.mgrid[:SIDE, :SIDE]
    waves = np.sin((x + y * labels[:, None, None] / 3) / 2)
    noise = rng.integers(0, 40, waves.shape)
    return ArraySource((100 + 80 * waves + noise).astype(np.uint8), labels, "stripes")


def _classifier(folder: Path) -> FashionClassifier:
    try:
        return FashionClassifier.from_pretrained(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no classifier at {folder}: run titok-fast train recipes/fashion/classifier.yaml, or "
            "name its folder with --classifier"
        ) from error


def _digest(model: FashionClassifier) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def run_cell(bench: Bench, cell: Cell, now: dict[str, Any]) -> dict[str, Any]:
    """The case of a cell: from its file, or trained, measured and kept there.

    Args:
        bench: what cells share.
        cell: whose needs are done.
        now: `environment()`; a case keeps the commit that measured it.
    """
    path = bench.work / "cells" / f"{cell.name}.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    say(cell.name)
    start = time.perf_counter()
    if cell.trains():
        train_cell(bench, cell)
    trained = time.perf_counter()
    case = asdict(cell) | {
        "cell": cell.name,
        "figures": figures_of(bench, cell),
        "training_s": trained - start,
        "measuring_s": time.perf_counter() - trained,
        "commit": now["commit"],
        "dirty": now["dirty"],
    }
    write_json(path, case)
    return case


def run(args: argparse.Namespace, settings: Settings, work: Path) -> dict[str, Any]:
    """All cells of the groups that were asked for, and what the curves say; see StoppedError."""
    bench = open_bench(args, settings, work)
    now = environment(args.device)
    wanted = [cell for group in args.only for cell in cells_of(group, settings)]
    cases = [run_cell(bench, cell, now) for cell in in_order(wanted)]
    figures = {case["cell"]: case["figures"] for case in cases}
    shown = [c for c in comparisons(figures, settings) if c["group"] in args.only]
    return {
        "benchmark": "paper-trends",
        "environment": now,
        "protocol": _protocol(bench),
        "cases": cases,
        "comparisons": shown,
    }


def _protocol(bench: Bench) -> dict[str, Any]:
    S, network = bench.settings, bench.network.name
    sizes = ", ".join(f"{name} {'/'.join(map(str, size))}" for name, size in S.sizes)
    return {
        "settings": asdict(S),
        "features": f"distance: Frechet's, in the features of {network} (figures call it fid)",
        "learning-rate": f"{RATE} / width in stage 1 and a single stage, else the recipes'",
        "reconstruction": "stage 1: likeliest proxy codes drawn by the proxy tokenizer, averaged "
        f"weights, clamped, rounded; first {S.judged} evaluation pictures against themselves",
        "generation": f"{S.drawn} pictures, classes in turn, truncated, against the features of "
        "all training pictures; 8 steps, linear guidance 2.0, temperature 4.5",
        "probe": f"mean of the latents after the last norm, batch norm and LARS, {S.probed} "
        f"training pictures as they are, {S.probe_epochs} passes; top-1 on all evaluation pictures",
        "proxy-codes": "squared error, no adversary; single stage and 2D have the updates of both "
        "stages",
        "speed": f"random weights; updates of batch {S.generator_batch}, drawing in batches of "
        f"{S.speed_batch} to bytes; all in turns, median of {S.repeats}",
        "summary": f"Small networks (width/layers/heads: {sizes}) on Fashion-MNIST at 32 px with "
        f"64 proxy codes: {S.budget} updates of batch {S.batch} for each tokenizer and stage, "
        f"{S.generator_budget} of batch {S.generator_batch} for each generator. In brackets the "
        f"paper's tokens for the same share of its 256 proxy codes. Distances are Frechet's "
        f"in the features of {network}, the paper's rFID and gFID in Inception's: orders are "
        f"compared, not values. {_NOISE}.",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; status 130 when a signal ended a training."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--only", metavar="A,B", default=",".join(GROUPS), help=f"default: {','.join(GROUPS)}")
    add("--budget", type=int, metavar="UPDATES",
        help=f"of tokenizers and generators (default: {Settings().budget})")  # fmt: skip
    add("--work", type=Path, metavar="DIR",
        help="networks, finished cells (default: runs/fashion/trends-BUDGET)")  # fmt: skip
    add("--classifier", type=Path, default=CLASSIFIER, metavar="DIR",
        help="trained by recipes/fashion/classifier.yaml; default: fashion-16's")  # fmt: skip
    add("--data", type=Path, metavar="DIR", help="Fashion-MNIST's files; default: Debian's place")
    add("--plan", action="store_true", help="print cells and predicted minutes, and end")
    add("--smoke", action="store_true", help="every kind of cell, tiny, on made-up pictures")
    add_run(p)
    add("--plots", type=Path, metavar="DIR", help="also an SVG there, named like the record")
    args = p.parse_args(argv)
    settings = _check(p, args)
    passing = tempfile.TemporaryDirectory() if args.smoke and args.work is None else nullcontext()
    with passing as folder:
        work = args.work or (
            Path(folder) if folder else Path(f"runs/fashion/trends-{settings.budget}")
        )
        try:
            return _do(args, settings, work)
        except StoppedError as stopped:
            print(f"{stopped}", file=sys.stderr)
            return 130
        except (FileNotFoundError, ValueError) as error:
            p.error(str(error))


def _do(args: argparse.Namespace, settings: Settings, work: Path) -> int:
    if args.plan:
        cells = in_order([cell for group in args.only for cell in cells_of(group, settings)])
        with tempfile.TemporaryDirectory() as folder:
            rows = plan(open_bench(args, settings, Path(folder)), cells)
        print(table(rows, list(rows[0])))
        print(f"all: {sum(row['minutes'] for row in rows):.0f} minutes")
        return 0
    record = run(args, settings, work)
    path = save(args.json, record)
    if args.plots is not None and record["comparisons"]:
        name = path.stem if path is not None else record["benchmark"]
        plot.write(plot.trends(record), args.plots / f"{name}.svg")
    print(trends_table(record))
    return 0


def _check(p: argparse.ArgumentParser, args: argparse.Namespace) -> Settings:
    """Refuse before any work, and settle the settings."""
    args.only = args.only.split(",")
    unknown = [group for group in args.only if group not in GROUPS]
    if unknown:
        p.error(f"--only: unknown {', '.join(unknown)}; known: {', '.join(GROUPS)}")
    check(p, args, "budget", "threads")
    if args.plots is not None and not args.plots.is_dir():
        p.error(f"--plots wants an existing folder; got {args.plots}")
    settings = SMOKE if args.smoke else Settings()
    if args.budget is not None:
        settings = replace(settings, budget=args.budget, generator_budget=args.budget)
    return settings


if __name__ == "__main__":
    sys.exit(main())
