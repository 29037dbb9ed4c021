"""`titok-fast eval`: what each measure reads and how its figures come out.

    titok-fast eval reconstruction fashion-mnist:eval --tokenizer DIR --network efficientnet_lite0
    titok-fast eval generation samples.npz --reference VIRTUAL_imagenet256_labeled.npz
        --network inception=pt_inception-2015-12-05-6726825d.pth
    titok-fast eval probe --tokenizer DIR --train fashion-mnist:train --test fashion-mnist:eval

Under `torchrun` the ranks share one evaluation.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from titok_fast.cli.options import (
    add_device,
    add_force,
    add_quiet,
    add_weights,
    check_outputs,
    progress_bar,
)
from titok_fast.config import FLOAT_DTYPES
from titok_fast.distributed import Ranks, join
from titok_fast.evaluation.generation import evaluate_generation, measure_pictures, read_reference
from titok_fast.evaluation.measure import Figures
from titok_fast.evaluation.networks import NETWORKS, FeatureNetwork, open_network
from titok_fast.evaluation.pictures import (
    LOCATIONS,
    DrawnPictures,
    Pictures,
    find_source,
    open_pictures,
)
from titok_fast.evaluation.probe import LAYERS, ProbeConfig, linear_probe
from titok_fast.evaluation.reconstruction import evaluate_reconstruction, reconstructor
from titok_fast.evaluation.statistics import write_statistics
from titok_fast.io.files import write_atomic
from titok_fast.loading import load_tokenizer
from titok_fast.models.perceptual import perceptual
from titok_fast.models.tokenizer import TiTok
from titok_fast.models.vqgan import MaskGitVQGAN
from titok_fast.pipeline import TiTokPipeline
from titok_fast.settings import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments on its parser."""
    parser.description = (
        f"Measure images. Their location is {LOCATIONS}. Every figure names the network it comes "
        "from; only `inception` gives what papers call FID. Run it by torchrun to share the work "
        "among devices."
    )
    measures = parser.add_subparsers(dest="measure", required=True, metavar="MEASURE")
    for name, (add_options, _, help_text) in _MEASURES.items():
        add_options(measures.add_parser(name, help=help_text))


def _add_reconstruction(parser: argparse.ArgumentParser) -> None:
    parser.description = "Encode and decode images: PSNR, SSIM, use of codes, features, classes."
    add = parser.add_argument
    add("pictures", metavar="IMAGES", help="location of the originals")
    add("--vqgan", metavar="WEIGHTS", help="measure a MaskGIT-VQGAN, not a TiTok")
    add("--size", type=int, help="side in pixels, with --vqgan (default: 256)")
    what = "also a perceptual distance: lpips, convnext_s or efficientnet_lite0"
    add("--perceptual", action="append", default=[], metavar="NAME[=FILE]", help=what)
    add("--floor", action="store_true", help="also two halves of the originals")
    _add_common(parser, network_required=False, tokenizer=True)


def _add_generation(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare drawn images with real ones: Frechet distance, class scores over one split and "
        "ten, precision and recall (k = 3), agreement with the labels."
    )
    add = parser.add_argument
    where = "location of the samples, classes interleaved; without it, they are drawn"
    add("samples", nargs="?", metavar="IMAGES", help=where)
    what = "real images, or an .npz file with their mu and sigma"
    add("--reference", required=True, metavar="LOCATION", help=what)
    add("--no-neighbours", action="store_true", help="no precision and recall")
    add("--floor", action="store_true", help="also two halves of the real images")
    add("--size", type=int, help="side in pixels, where samples are of any size")
    add = parser.add_argument_group("drawing the samples").add_argument
    add("--count", type=int, default=50_000, help="default: 50000")
    add("--seed", type=int, default=0, help="seed of the run (default: 0)")
    add("--steps", type=int, dest="num_sample_steps", help="unmasking steps")
    add("--guidance", type=float, dest="guidance_scale", help="guidance scale")
    add("--temperature", type=float, dest="randomize_temperature", help="noise at the first step")
    add("--generator", metavar="WEIGHTS", help="of the generator, as --tokenizer")
    _add_common(parser, network_required=True, tokenizer=True)


def _add_statistics(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write mean and covariance of features: a --reference for later."
    add = parser.add_argument
    add("pictures", metavar="IMAGES", help="location of the images")
    add("--out", type=Path, required=True, metavar="FILE", help=".npz to write")
    add("--size", type=int, help="side in pixels, where images are of any size")
    _add_common(parser, network_required=True, tokenizer=False)


def _add_probe(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a linear classifier on the latents of a frozen encoder, by MAE's recipe. The paper "
        "does not say which features it used: see --layer."
    )
    add, defaults = parser.add_argument, ProbeConfig()
    for option in ("--train", "--test"):
        add(option, required=True, metavar="LOCATION", help="images with classes")
    add("--classes", type=int, help="default: those of the data, else 1000")
    what = (
        "D-wide latents after the last norm, or C-wide ones before quantisation; their mean over "
        "tokens (default: %(default)s)"
    )
    add("--layer", choices=LAYERS, default=defaults.layer, help=what)
    for option, kind, what in (
        ("--epochs", int, "passes over the images"),
        ("--warmup-epochs", int, "epochs of linear warm-up"),
        ("--base-learning-rate", float, "per 256 images"),
        ("--probe-batch-size", int, "images per step"),
        ("--seed", int, "of order, crops and head"),
    ):
        field = option.strip("-").removeprefix("probe-").replace("-", "_")
        value = getattr(defaults, field)
        add(option, type=kind, default=value, help=f"{what} (default: {value})")
    add("--no-augment", action="store_true", help="encode each image once, not cropped or mirrored")
    _add_common(parser, network_required=None, tokenizer=True)


def _add_common(
    parser: argparse.ArgumentParser, *, network_required: bool | None, tokenizer: bool
) -> None:
    group = parser.add_argument_group("networks and models")
    add = group.add_argument
    if network_required is not None:
        what = f"feature network: {', '.join(NETWORKS)}; may be given several times"
        name, required = "NAME[=WEIGHTS]", network_required
        add("--network", action="append", default=[], required=required, metavar=name, help=what)
    if tokenizer:
        add_weights(group)
    group = parser.add_argument_group("running")
    add = group.add_argument
    add_device(group)
    what = "number format of the model's weights (default: float32, as published figures)"
    add("--dtype", choices=FLOAT_DTYPES, default="float32", help=what)
    add("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    add("--json", type=Path, metavar="FILE", help="also write the figures here")
    add_force(group)
    add_quiet(group)


def run(args: argparse.Namespace) -> Iterator[str]:
    """Measure, and yield a line for each figure.

    Raises:
        ValueError: arguments, files or images that cannot be used.
        OSError: a file is missing, exists already, or cannot be written.
        ImportError: a package of the extra `eval` is missing.
    """
    if args.batch_size < 1:
        raise ValueError(f"--batch-size wants at least 1; got {args.batch_size}")
    outputs = [path for path in (args.json, getattr(args, "out", None)) if path is not None]
    for path in outputs:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"no folder {path.parent} for {path.name}: create it first")
    check_outputs(outputs, force=args.force)
    with join(args.device) as ranks:
        figures = _MEASURES[args.measure][1](args, ranks)
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
    # JSON has no infinity, which is the PSNR of equal images
    finite = {key: value if math.isfinite(value) else None for key, value in figures.items()}
    record = {"figures": finite, "settings": settings, "versions": versions}
    return json.dumps(record, indent=2, allow_nan=False) + "\n"


def _reconstruction(args: argparse.Namespace, ranks: Ranks) -> Figures:
    networks = _networks(args, ranks)
    pairs = [text.partition("=") for text in args.perceptual]
    distances = [(name, perceptual(name, file or None).to(ranks.device)) for name, _, file in pairs]
    model: TiTok | MaskGitVQGAN
    codes: int | None
    if args.vqgan:
        model = MaskGitVQGAN.from_pretrained(args.vqgan, **_where(args, ranks)).eval()
        size, codes = args.size or 256, model.config.codebook_size
    else:
        model = load_tokenizer(args.model, args.tokenizer, _where(args, ranks))
        size = model.config.crop_size
        codes = model.config.codebook_size if model.config.quantize_mode == "vq" else None
    pictures = open_pictures(args.pictures, size)
    with _bar(args, ranks, len(pictures)) as bar:
        return evaluate_reconstruction(
            reconstructor(model),
            pictures,
            codebook_size=codes,
            networks=networks,
            distances=distances,
            floor=args.floor,
            **_running(args, bar),
        )


def _generation(args: argparse.Namespace, ranks: Ranks) -> Figures:
    if (args.samples is None) == (args.model is None and args.generator is None):
        raise ValueError("generation wants the location of samples, or a --model that draws them")
    networks = _networks(args, ranks)
    samples: Pictures
    if args.samples is None:
        names = ("num_sample_steps", "guidance_scale", "randomize_temperature")
        pipe = TiTokPipeline.from_pretrained(
            args.model, tokenizer=args.tokenizer, generator=args.generator, **_where(args, ranks)
        )
        settings = {name: getattr(args, name) for name in names}
        samples = DrawnPictures(pipe, args.count, args.seed, **settings)
        size = pipe.tokenizer.config.crop_size
    else:
        samples = open_pictures(args.samples, args.size)
        size = samples.read(range(1))[0].shape[1]
    reference = read_reference(args.reference, size)
    real = len(reference.pictures) if reference.pictures is not None else 0
    with _bar(args, ranks, len(samples) + real) as bar:
        return evaluate_generation(
            samples,
            reference,
            networks,
            neighbours=not args.no_neighbours,
            floor=args.floor,
            **_running(args, bar),
        )


def _statistics(args: argparse.Namespace, ranks: Ranks) -> Figures:
    if len(args.network) != 1:
        raise ValueError(f"statistics are of one network; got {len(args.network)}")
    (network,) = _networks(args, ranks)
    pictures = open_pictures(args.pictures, args.size)
    with _bar(args, ranks, len(pictures)) as bar:
        (measured,) = measure_pictures(pictures, [network], **_running(args, bar))
    if not ranks.rank:
        write_statistics(args.out, measured.sums.gaussian(), network.name)
    return {"images": float(len(pictures)), "features": float(network.dim)}


def _probe(args: argparse.Namespace, ranks: Ranks) -> Figures:
    names = ("layer", "epochs", "warmup_epochs", "base_learning_rate", "seed")
    config = ProbeConfig(
        batch_size=args.probe_batch_size,
        augment=not args.no_augment,
        encode_batch_size=args.batch_size,
        **{name: getattr(args, name) for name in names},
    )
    found = find_source(args.train)
    if found is None:
        raise ValueError(f"--train wants images with classes; {args.train} has none")
    tokenizer = load_tokenizer(args.model, args.tokenizer, _where(args, ranks))
    test = open_pictures(args.test, tokenizer.config.crop_size)
    classes = args.classes or found[1] or 1000
    with _bar(args, ranks, config.epochs) as bar:
        return linear_probe(tokenizer, found[0], test, classes, config, progress=bar.update)


_MEASURES = {
    "reconstruction": (_add_reconstruction, _reconstruction, "a tokenizer's images"),
    "generation": (_add_generation, _generation, "drawn images against real ones"),
    "statistics": (_add_statistics, _statistics, "write mu and sigma of images"),
    "probe": (_add_probe, _probe, "a linear classifier on a frozen encoder"),
}


def _networks(args: argparse.Namespace, ranks: Ranks) -> list[FeatureNetwork]:
    pairs = [text.partition("=") for text in args.network]
    return [open_network(name, weights or None, ranks.device) for name, _, weights in pairs]


def _where(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    return {"device": ranks.device, "dtype": getattr(torch, args.dtype)}


def _running(args: argparse.Namespace, bar: "tqdm[NoReturn]") -> dict[str, Any]:
    return {"batch_size": args.batch_size, "progress": bar.update}


def _bar(args: argparse.Namespace, ranks: Ranks, total: int) -> "tqdm[NoReturn]":
    """Rank 0's share of the images stands for all."""
    total = -(-total // ranks.size) if args.measure != "probe" else total
    return progress_bar(args, total, name=f"eval {args.measure}", show=not ranks.rank)
