"""`titok-fast eval`: what each measure does; the arguments are in options.py."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from tqdm import tqdm

from titok_fast.cli.evaluate_options import add_arguments
from titok_fast.cli.options import check_outputs as refuse_existing
from titok_fast.distributed import Ranks, join
from titok_fast.evaluation import places
from titok_fast.evaluation.generation import evaluate_generation, measure_pictures
from titok_fast.evaluation.measure import Figures
from titok_fast.evaluation.networks import FeatureNetwork, open_network
from titok_fast.evaluation.npz import write_statistics
from titok_fast.evaluation.pictures import DrawnPictures, Pictures
from titok_fast.evaluation.probe import ProbeConfig, linear_probe
from titok_fast.evaluation.reconstruction import evaluate_reconstruction, reconstructor
from titok_fast.io.files import write_atomic
from titok_fast.loading import load_tokenizer
from titok_fast.models.perceptual import perceptual
from titok_fast.models.tokenizer import TiTok
from titok_fast.models.vqgan import MaskGitVQGAN
from titok_fast.pipeline import TiTokPipeline
from titok_fast.settings import __version__

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> Iterator[str]:
    """Measure, and yield a line for each figure.

    Raises:
        ValueError: arguments, files or pictures that cannot be used.
        OSError: a file is missing, exists already, or cannot be written.
        ImportError: a package of the extra `eval` is missing.
    """
    if args.batch_size < 1:
        raise ValueError(f"--batch-size wants at least 1; got {args.batch_size}")
    outputs = [path for path in (args.json, getattr(args, "out", None)) if path is not None]
    for path in outputs:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"no folder {path.parent} for {path.name}: create it first")
    refuse_existing(outputs, force=args.force)
    with join(args.device) as ranks:
        figures = _MEASURES[args.measure](args, ranks)
        if ranks.rank:
            return
        if args.json is not None:
            write_atomic(args.json, _record(args, figures).encode())
        width = max(map(len, figures))
        for name, value in figures.items():
            yield f"{name:{width}}  {value:,.6g}"


def _record(args: argparse.Namespace, figures: Figures) -> str:
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in ("command", "json", "force", "quiet")
    }
    versions = {"titok_fast": __version__, "torch": torch.__version__}
    # JSON has no infinity, which is the PSNR of equal pictures
    finite = {key: value if math.isfinite(value) else None for key, value in figures.items()}
    record = {"figures": finite, "settings": settings, "versions": versions}
    return json.dumps(record, indent=2, allow_nan=False) + "\n"


def _reconstruction(args: argparse.Namespace, ranks: Ranks) -> Figures:
    networks, distances = _networks(args, ranks), _distances(args, ranks)
    model: TiTok | MaskGitVQGAN
    if args.vqgan:
        model = MaskGitVQGAN.from_pretrained(args.vqgan, **_where(args, ranks)).eval()
        size, codes = args.size or 256, model.config.codebook_size
    else:
        model = _tokenizer(args, ranks)
        size, codes = model.config.crop_size, model.config.codebook_size
        codes = codes if model.config.quantize_mode == "vq" else 0
    pictures = places.open_pictures(args.pictures, size)
    with _bar(args, ranks, len(pictures)) as bar:
        return evaluate_reconstruction(
            reconstructor(model),
            pictures,
            codebook_size=codes or None,
            networks=networks,
            distances=distances,
            floor=args.floor,
            batch_size=args.batch_size,
            progress=bar.update,
        )


def _generation(args: argparse.Namespace, ranks: Ranks) -> Figures:
    if (args.samples is None) == (args.model is None and args.generator is None):
        raise ValueError("generation wants a place of samples, or a --model that draws them")
    networks = _networks(args, ranks)
    samples: Pictures
    if args.samples is None:
        names = ("num_sample_steps", "guidance_scale", "randomize_temperature")
        pipe = _pipeline(args, ranks)
        settings = {name: getattr(args, name) for name in names}
        samples = DrawnPictures(pipe, args.count, args.seed, **settings)
        size = pipe.tokenizer.config.crop_size
    else:
        samples = places.open_pictures(args.samples, args.size)
        size = samples.read(range(1))[0].shape[1]
    reference = places.read_reference(args.reference, size)
    real = len(reference.pictures) if reference.pictures is not None else 0
    with _bar(args, ranks, len(samples) + real) as bar:
        return evaluate_generation(
            samples,
            reference,
            networks,
            neighbours=not args.no_neighbours,
            floor=args.floor,
            batch_size=args.batch_size,
            progress=bar.update,
        )


def _statistics(args: argparse.Namespace, ranks: Ranks) -> Figures:
    if len(args.network) != 1:
        raise ValueError(f"statistics are of one network; got {len(args.network)}")
    (network,) = _networks(args, ranks)
    pictures = places.open_pictures(args.pictures, args.size)
    with _bar(args, ranks, len(pictures)) as bar:
        (measured,) = measure_pictures(
            pictures, [network], batch_size=args.batch_size, progress=bar.update
        )
    if not ranks.rank:
        write_statistics(args.out, measured.sums.gaussian(), network.name)
    return {"images": float(len(pictures)), "features": float(network.dim)}


def _probe(args: argparse.Namespace, ranks: Ranks) -> Figures:
    config = ProbeConfig(
        layer=args.layer,
        epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        base_learning_rate=args.base_learning_rate,
        batch_size=args.probe_batch_size,
        augment=not args.no_augment,
        encode_batch_size=args.batch_size,
        seed=args.seed,
    )
    found = places.find_source(args.train)
    if found is None:
        raise ValueError(f"--train wants pictures with classes; {args.train} has none")
    tokenizer = _tokenizer(args, ranks)
    test = places.open_pictures(args.test, tokenizer.config.crop_size)
    classes = args.classes or found[1] or 1000
    with _bar(args, ranks, config.epochs) as bar:
        return linear_probe(tokenizer, found[0], test, classes, config, progress=bar.update)


_MEASURES = {
    "reconstruction": _reconstruction,
    "generation": _generation,
    "statistics": _statistics,
    "probe": _probe,
}


def _networks(args: argparse.Namespace, ranks: Ranks) -> list[FeatureNetwork]:
    pairs = [text.partition("=") for text in args.network]
    return [open_network(name, weights or None, ranks.device) for name, _, weights in pairs]


def _distances(args: argparse.Namespace, ranks: Ranks) -> list[tuple[str, nn.Module]]:
    pairs = [text.partition("=") for text in args.perceptual]
    return [(name, perceptual(name, file or None).to(ranks.device)) for name, _, file in pairs]


def _where(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    return {"device": ranks.device, "dtype": getattr(torch, args.dtype)}


def _tokenizer(args: argparse.Namespace, ranks: Ranks) -> TiTok:
    return load_tokenizer(args.model, args.tokenizer, _where(args, ranks))


def _pipeline(args: argparse.Namespace, ranks: Ranks) -> TiTokPipeline:
    return TiTokPipeline.from_pretrained(
        args.model, tokenizer=args.tokenizer, generator=args.generator, **_where(args, ranks)
    )


def _bar(args: argparse.Namespace, ranks: Ranks, total: int) -> "tqdm[NoReturn]":
    silent = args.quiet or ranks.rank > 0
    # this rank's share stands for all
    total = -(-total // ranks.size) if args.measure != "probe" else total
    return tqdm(total=total, desc=f"eval {args.measure}", disable=silent, file=sys.stderr)
