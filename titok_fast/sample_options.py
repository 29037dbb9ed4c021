"""Options of `python -m titok_fast.sample_many`: the parser, what it cannot say, and the models."""

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from titok_fast.attention import BACKENDS
from titok_fast.config import GUIDANCE_DECAYS, SCHEDULES, SamplingConfig
from titok_fast.fast import MODES, check_techniques, chosen
from titok_fast.pipeline import TiTokPipeline
from titok_fast.presets import PRESETS
from titok_fast.sample_files import check_place


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
        "--count", "--num", dest="num", type=_positive, default=50_000, metavar="N",
        help="pictures, a multiple of the classes (default: 50000); under torchrun write --count",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the run, any integer (default: 0)"
    )
    parser.add_argument(
        "--batch-size", type=_positive, metavar="N",
        help="pictures at once on each process (default: 8 on the cpu, 128 on cuda)",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=_seconds, default=60.0, metavar="SECONDS",
        help="a process that is silent for so long is taken for dead (default: 60)",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    _add_models(parser)
    _add_sampling(parser)
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", choices=tuple(PRESETS), metavar="NAME",
        help=f"published model: {', '.join(PRESETS)}",
    )  # fmt: skip
    for part in ("tokenizer", "generator"):
        group.add_argument(
            f"--{part}", metavar="WEIGHTS",
            help="directory, weight file or hub repository, in place of the published one",
        )  # fmt: skip
    group.add_argument(
        "--random-weights", action="store_true",
        help="dry run of --model without weights: the pictures are noise",
    )  # fmt: skip
    group.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda if there is one; one per process"
    )
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="number format of the weights (default: bfloat16 on cuda, float32 on the cpu)",
    )  # fmt: skip
    group.add_argument(
        "--attention", choices=(*BACKENDS, "auto"),
        help="attention back end (default: TITOK_FAST_ATTENTION, or else sdpa)",
    )  # fmt: skip
    add_fast(group)


def add_fast(group: argparse._ArgumentGroup) -> None:
    """The option `--fast [MODE]`: `args.fast` is False, or what TiTokPipeline.compile takes."""
    group.add_argument(
        "--fast", nargs="?", const="default", default=False, type=_mode, metavar="MODE",
        help="faster after a slower start: packed weights on the cpu, torch.compile and CUDA "
        "graphs on cuda; `--fast int8` is the fastest on the cpu, at a small loss of precision",
    )  # fmt: skip


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sampling settings",
        "The default of each is the published one of --model. Without --model: 8 steps, constant "
        "guidance 3, temperature 4.5, no annealing, which is not how the paper's FID is reached.",
    )
    group.add_argument("--steps", type=int, help="number of unmasking steps, 1 to 1024")
    group.add_argument("--guidance", type=float, help="guidance scale; 0 turns guidance off")
    group.add_argument("--decay", choices=GUIDANCE_DECAYS, help="guidance over the steps")
    group.add_argument(
        "--guidance-interval", type=interval, metavar="LOW,HIGH",
        help="share of the steps in which guidance acts, such as 0.25,0.75 (default: all)",
    )  # fmt: skip
    group.add_argument("--power", type=float, help="exponent of the decay power-cosine")
    group.add_argument("--temperature", type=float, help="noise at the first step, 0 or more")
    group.add_argument(
        "--annealing", action=argparse.BooleanOptionalAction,
        help="divide logits by a temperature that falls from 1.3 to 0.5",
    )  # fmt: skip
    group.add_argument("--schedule", choices=SCHEDULES, help="how fast tokens are unmasked")
    group.add_argument(
        "--confidence", choices=("logit", "probability"),
        help="what ranks tokens: TiTok's raw logit, or MaskGIT's probability",
    )  # fmt: skip


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of SamplingConfig as given, None where an option is absent."""
    return {
        "num_sample_steps": args.steps,
        "guidance_scale": args.guidance,
        "guidance_decay": args.decay,
        "guidance_interval": args.guidance_interval,
        "guidance_scale_pow": args.power,
        "randomize_temperature": args.temperature,
        "softmax_temperature_annealing": args.annealing,
        "schedule": args.schedule,
        "confidence": args.confidence,
    }


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before weights are read, and make the folders.

    Raises:
        ValueError: options that do not exist or do not go together.
        OSError: a folder cannot be had, or not be written to.
    """
    SamplingConfig().but(**settings(args))
    device, dtype = place(args)
    check_techniques(chosen(args.fast, device.type), device.type, dtype)
    if args.random_weights and (args.model is None or args.tokenizer or args.generator):
        raise ValueError("--random-weights wants --model, and no other place of weights")
    if args.model is None and not (args.tokenizer and args.generator):
        raise ValueError("name a published model with --model, or --tokenizer and --generator")
    if args.no_png and args.npz is None:
        raise ValueError("--no-png wants --npz FILE: where do the pictures go?")
    if args.npz is not None:
        if args.npz.suffix != ".npz":
            raise ValueError(f"--npz wants a name ending in .npz; got {args.npz}")
        check_place(args.npz.parent)
    check_place(args.out)


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


def place(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Where the models are to be and in what type, by the options or by what there is."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return device, getattr(torch, name)


def interval(text: str) -> tuple[float, float]:
    """The type of `--guidance-interval`: "0.25,0.75"; SamplingConfig checks the range."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        message = f"wants two numbers such as 0.25,0.75; got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
    return low, high


def _mode(text: str) -> str:
    if text not in MODES:
        raise argparse.ArgumentTypeError(
            f"wants {', '.join(MODES)}, or no value; got {text!r}: does it belong before --fast?"
        )
    return text


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"wants a whole number of 1 or more; got {text!r}")
    return number


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"wants a number of seconds above 0; got {text!r}")
    return number
