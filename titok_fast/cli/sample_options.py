"""Options of `python -m titok_fast.cli.sample`: the parser, what it cannot say, and the models."""

import argparse
import os
from pathlib import Path

import torch

from titok_fast.backends.techniques import check_techniques, resolve_fast
from titok_fast.cli.options import (
    add_running,
    add_sampling,
    add_weights,
    place,
    positive,
    seconds,
    settings,
)
from titok_fast.config import SamplingConfig
from titok_fast.io.sample_folder import make_writable
from titok_fast.pipeline import TiTokPipeline

__all__ = ["build_parser", "check", "load", "settings"]


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="sample_many",
        description="Draw many class-balanced pictures, on every process that torchrun starts. "
        "Run the same command again to draw what is missing.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR",
        help="folder for {index}.png and manifest.json: empty, or of an earlier run",
    )  # fmt: skip
    parser.add_argument(
        "--npz", type=Path, metavar="FILE", help="also write one archive for the ADM evaluation"
    )
    parser.add_argument(
        "--no-png", action="store_true",
        help="only the archive; DIR holds raw pixels until it is written",
    )  # fmt: skip
    # torchrun on Python 3.11 stops at a script's --num: "ambiguous", it has --numa-binding
    parser.add_argument(
        "--count", "--num", dest="num", type=positive, default=50_000, metavar="N",
        help="pictures, a multiple of the classes (default: 50000); under torchrun write --count",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=seconds, default=60.0, metavar="SECONDS",
        help="a process that is silent for so long is taken for dead (default: 60)",
    )  # fmt: skip
    models = parser.add_argument_group("model")
    add_weights(models, generator=True)
    add_running(models, devices=("cpu", "cuda"), each=" on each process")
    add_sampling(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before weights are read, and make the folders.

    Raises:
        ValueError: options that do not exist or do not go together.
        OSError: a folder cannot be had, or not be written to.
    """
    SamplingConfig().updated(**settings(args))
    device, dtype = place(args)
    check_techniques(resolve_fast(args.fast, device.type), device.type, dtype)
    if args.random_weights and (args.model is None or args.tokenizer or args.generator):
        raise ValueError("--random-weights wants --model, and no other place of weights")
    if args.model is None and not (args.tokenizer and args.generator):
        raise ValueError("name a published model with --model, or --tokenizer and --generator")
    if args.no_png and args.npz is None:
        raise ValueError("--no-png wants --npz FILE: where do the pictures go?")
    if args.npz is not None:
        if args.npz.suffix != ".npz":
            raise ValueError(f"--npz wants a name ending in .npz; got {args.npz}")
        make_writable(args.npz.parent)
    make_writable(args.out)


def load(args: argparse.Namespace, rank: int) -> TiTokPipeline:
    """The models on this process's own device, not yet compiled for `--fast`.

    Raises:
        ValueError: more processes than CUDA devices; see also `TiTokPipeline.from_pretrained`.
        FileNotFoundError: there are no such weights.
        BackendError: the attention back end cannot work here.
    """
    device, dtype = place(args)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        local = int(os.environ.get("LOCAL_RANK", rank % max(count, 1)))
        if local >= count:
            raise ValueError(
                f"process {local + 1} on this machine has no CUDA device of its own: torch sees "
                f"{count}; start one process per device, or pass --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    options = {"device": device, "dtype": dtype, "attention": args.attention}
    if args.random_weights:
        return TiTokPipeline.random(args.model, **options)
    sources = {"tokenizer": args.tokenizer, "generator": args.generator}
    return TiTokPipeline.from_pretrained(args.model, **sources, **options)
