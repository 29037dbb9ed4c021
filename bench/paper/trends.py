"""Repeat the paper's curves in small: Fashion-MNIST, networks of 0.2 to 1.6 million parameters.

    python bench/paper/trends.py --json bench/results --plots bench/results
    python bench/paper/trends.py --only probe-tokens,speed

Every finished experiment is saved in --work, and an interrupted run resumes from there. Distances
are in the features of --classifier, not in the paper's, so orders are compared, not values.
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
from lib import plots
from lib.harness import environment, say, write_json
from lib.options import COUNT, RUN, check, names_of, new_record, parser, save, stem
from lib.quality_tables import trends_table
from paper import experiments
from paper.curves import comparisons
from paper.work import SIDE, Setup, StoppedError, measure, train_network

from titok_fast.data.sources import ArraySource, fashion_mnist
from titok_fast.evaluation.networks import FashionFeatures
from titok_fast.models.classifier import FashionClassifier


def open_setup(args: argparse.Namespace, settings: experiments.Settings, work: Path) -> Setup:
    """Data, classifier and folder of a run.

    Raises:
        FileNotFoundError: data or classifier are missing.
        ValueError: the folder holds experiments of other settings, or a file is damaged.
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
            f"{work} holds experiments of another budget, classifier or data: name another --work"
        )
    write_json(known, described)
    network = FashionFeatures(classifier).to(args.device)
    return Setup(settings, work, train, test, network, args.device)


def smoke_data(count: int) -> ArraySource:
    """Stripes whose slope is the class, with noise."""
    rng, labels = np.random.default_rng(count), np.arange(count) % experiments.CLASSES
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


def run_experiment(setup: Setup, e: experiments.Experiment, now: dict[str, Any]) -> dict[str, Any]:
    """The case of an experiment: read from its file, or trained, measured and written there."""
    path = setup.work / "experiments" / f"{e.name}.json"
    if path.exists():
        done: dict[str, Any] = json.loads(path.read_text())
        return done
    say(e.name)
    start = time.perf_counter()
    if e.trains():
        train_network(setup, e)
    trained = time.perf_counter()
    case = asdict(e) | {
        "experiment": e.name,
        "figures": measure(setup, e),
        "training_s": trained - start,
        "measuring_s": time.perf_counter() - trained,
        "commit": now["commit"],
        "dirty": now["dirty"],
    }
    write_json(path, case)
    return case


def run(args: argparse.Namespace, settings: experiments.Settings, work: Path) -> dict[str, Any]:
    """Do all experiments of the groups in --only and compare the curves; may raise StoppedError."""
    setup = open_setup(args, settings, work)
    now = environment(args.device)
    wanted = [e for group in args.only for e in experiments.experiments_of(group, settings)]
    cases = [run_experiment(setup, e, now) for e in experiments.with_needs(wanted)]
    figures = {case["experiment"]: case["figures"] for case in cases}
    return new_record("paper-trends", args.device, **_protocol(setup)) | {
        "cases": cases,
        "comparisons": [c for c in comparisons(figures, settings) if c["group"] in args.only],
    }


def _protocol(setup: Setup) -> dict[str, Any]:
    S, network = setup.settings, setup.network.name
    sizes = ", ".join(f"{name} {'/'.join(map(str, size))}" for name, size in S.sizes)
    return {
        "settings": asdict(S),
        "features": f"distance: Frechet's, in the features of {network} (figures call it fid)",
        "learning-rate": f"{experiments.RATE} / width in stage 1 and a single stage, "
        "else the recipes'",
        "reconstruction": "stage 1: likeliest proxy codes, decoded by the proxy tokenizer; "
        f"averaged weights, clamped, rounded; first {S.judged} evaluation images",
        "generation": f"{S.drawn} images, classes in turn, truncated, against the features of "
        "all training images; 8 steps, linear guidance 2.0, temperature 4.5",
        "probe": f"mean of the latents after the last norm, batch norm and LARS, {S.probed} "
        f"training images as they are, {S.probe_epochs} epochs; top-1 on all evaluation images",
        "proxy-codes": "squared error, no adversary; single stage and 2D have the updates of both "
        "stages",
        "speed": f"random weights; updates of batch {S.generator_batch}, sampling in batches of "
        f"{S.speed_batch} to bytes; all in turns, median of {S.repeats}",
        "summary": f"Small networks (width/layers/heads: {sizes}) on Fashion-MNIST at 32 px with "
        f"64 proxy codes: {S.budget} updates of batch {S.batch} for each tokenizer and stage, "
        f"{S.generator_budget} of batch {S.generator_batch} for each generator. In brackets the "
        f"paper's tokens for the same share of its 256 proxy codes. Distances are Frechet's "
        f"in the features of {network}, the paper's rFID and gFID in Inception's: orders are "
        "compared, not values. One seed each, except for the masking schedules: small differences "
        "may be chance.",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; status 130 when a signal ended a training."""
    p = parser(__doc__, "plots", *RUN)
    add = p.add_argument
    add("--only", **names_of(experiments.GROUPS))
    budget = f"of tokenizers and generators (default: {experiments.Settings().budget})"
    add("--budget", **COUNT, metavar="UPDATES", help=budget)
    work_help = "networks, finished experiments (default: runs/fashion/trends-BUDGET)"
    add("--work", type=Path, metavar="DIR", help=work_help)
    classifier = "trained by recipes/fashion/classifier.yaml; default: fashion-16's"
    add("--classifier", type=Path, default=CLASSIFIER, metavar="DIR", help=classifier)
    add("--data", type=Path, metavar="DIR", help="Fashion-MNIST's files; default: Debian's folder")
    add("--smoke", action="store_true", help="every kind of experiment, tiny, on synthetic images")
    args = p.parse_args(argv)
    check(p, args)
    settings = experiments.SMOKE if args.smoke else experiments.Settings()
    if args.budget is not None:
        settings = replace(settings, budget=args.budget, generator_budget=args.budget)
    temporary = tempfile.TemporaryDirectory() if args.smoke and args.work is None else nullcontext()
    with temporary as folder:
        work = args.work or Path(folder or f"runs/fashion/trends-{settings.budget}")
        try:
            record = run(args, settings, work)
        except StoppedError as stopped:
            print(f"{stopped}", file=sys.stderr)
            return 130
        except (FileNotFoundError, ValueError) as error:
            p.error(str(error))
    save(args.json, record)
    if args.plots is not None and record["comparisons"]:
        plots.write(plots.trends(record), args.plots / f"{stem(args.json, record)}.svg")
    print(trends_table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
