"""Arguments of `titok-fast eval`.

    titok-fast eval reconstruction fashion-mnist:eval --tokenizer DIR --network efficientnet_lite0
    titok-fast eval generation samples.npz --reference VIRTUAL_imagenet256_labeled.npz
        --network inception=pt_inception-2015-12-05-6726825d.pth
    titok-fast eval probe --tokenizer DIR --train fashion-mnist:train --test fashion-mnist:eval

Under `torchrun` the ranks share one evaluation.
"""

import argparse
from pathlib import Path

from titok_fast.evaluation.networks import NETWORKS
from titok_fast.evaluation.places import PLACES
from titok_fast.evaluation.probe import LAYERS, ProbeConfig
from titok_fast.presets import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments on its parser."""
    parser.description = (
        f"Measure pictures. A place of pictures is {PLACES}. Every figure names the "
        "network it comes from; only `inception` gives what papers call FID. Run it by torchrun "
        "to share the work among devices."
    )
    measures = parser.add_subparsers(dest="measure", required=True, metavar="MEASURE")
    _add_reconstruction(measures.add_parser("reconstruction", help="a tokenizer's pictures"))
    _add_generation(measures.add_parser("generation", help="drawn pictures against real ones"))
    _add_statistics(measures.add_parser("statistics", help="write mu and sigma of pictures"))
    _add_probe(measures.add_parser("probe", help="a linear classifier on a frozen encoder"))


def _add_reconstruction(parser: argparse.ArgumentParser) -> None:
    parser.description = "Encode and decode pictures: PSNR, SSIM, use of codes, features, classes."
    parser.add_argument("pictures", metavar="PICTURES", help="place of the originals")
    parser.add_argument(
        "--vqgan", metavar="WEIGHTS", help="measure a MaskGIT-VQGAN in place of a TiTok"
    )
    parser.add_argument("--size", type=int, help="side in pixels, with --vqgan (default: 256)")
    parser.add_argument(
        "--perceptual", action="append", default=[], metavar="NAME[=FILE]",
        help="perceptual distance as well: lpips, convnext_s or efficientnet_lite0",
    )  # fmt: skip
    _add_networks(parser, required=False)
    parser.add_argument("--floor", action="store_true", help="also halves of the originals")
    _add_tokenizer(parser)
    _add_common(parser)


def _add_generation(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare drawn pictures with real ones: Frechet distance, class scores over one split and "
        "ten, precision and recall (k = 3), agreement with the labels."
    )
    parser.add_argument(
        "samples", nargs="?", metavar="PICTURES",
        help="place of the samples, classes interleaved; without it, they are drawn",
    )  # fmt: skip
    parser.add_argument(
        "--reference", required=True, metavar="PLACE",
        help="real pictures, or an .npz file with their mu and sigma",
    )  # fmt: skip
    _add_networks(parser, required=True)
    parser.add_argument("--no-neighbours", action="store_true", help="no precision and recall")
    parser.add_argument("--floor", action="store_true", help="also halves of the real pictures")
    parser.add_argument("--size", type=int, help="side in pixels, where samples are of any size")
    drawing = parser.add_argument_group("drawing the samples")
    drawing.add_argument("--count", type=int, default=50_000, help="default: 50000")
    drawing.add_argument("--seed", type=int, default=0, help="seed of the run (default: 0)")
    drawing.add_argument("--steps", type=int, dest="num_sample_steps", help="unmasking steps")
    drawing.add_argument("--guidance", type=float, dest="guidance_scale", help="guidance scale")
    drawing.add_argument(
        "--temperature", type=float, dest="randomize_temperature", help="noise at the first step"
    )
    drawing.add_argument("--generator", metavar="WEIGHTS", help="of the generator, as --tokenizer")
    _add_tokenizer(parser)
    _add_common(parser)


def _add_statistics(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write mean and covariance of features: a --reference for later."
    parser.add_argument("pictures", metavar="PICTURES", help="place of the pictures")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".npz to write")
    parser.add_argument("--size", type=int, help="side in pixels, where pictures are of any size")
    _add_networks(parser, required=True)
    _add_common(parser)


def _add_probe(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a linear classifier on the latents of a frozen encoder, by MAE's recipe. The paper "
        "does not say which features it used: see --layer."
    )
    defaults = ProbeConfig()
    parser.add_argument("--train", required=True, metavar="PLACE", help="with classes")
    parser.add_argument("--test", required=True, metavar="PLACE", help="with classes")
    parser.add_argument("--classes", type=int, help="default: those of the place, else 1000")
    parser.add_argument("--layer", choices=LAYERS, default=defaults.layer,
                        help="D-wide latents after the last norm, or C-wide ones before "
                        "quantisation; their mean over tokens (default: %(default)s)")  # fmt: skip
    for name, kind, what in (
        ("epochs", int, "passes over the pictures"),
        ("warmup_epochs", int, "epochs of linear warm-up"),
        ("base_learning_rate", float, "per 256 pictures"),
        ("probe_batch_size", int, "pictures per step"),
        ("seed", int, "of order, crops and head"),
    ):
        value = getattr(defaults, name.removeprefix("probe_"))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value,
                            help=f"{what} (default: {value})")  # fmt: skip
    parser.add_argument(
        "--no-augment", action="store_true", help="encode each picture once, uncut and unflipped"
    )
    _add_tokenizer(parser)
    _add_common(parser)


def _add_networks(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--network", action="append", default=[], required=required, metavar="NAME[=WEIGHTS]",
        help=f"feature network: {', '.join(NETWORKS)}; may be given several times",
    )  # fmt: skip


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=tuple(PRESETS), metavar="NAME", help="published model")
    group.add_argument(
        "--tokenizer", metavar="WEIGHTS", help="directory, weight file or hub repository"
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="number format of the model's weights (default: float32, as published figures)",
    )  # fmt: skip
    group.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    group.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    group.add_argument("--force", action="store_true", help="replace files that exist already")
    group.add_argument("--quiet", action="store_true", help="show no progress bar")
