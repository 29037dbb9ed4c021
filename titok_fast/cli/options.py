"""Options that several commands share: which model, where it runs, how it samples."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from titok_fast.backends.techniques import MODES
from titok_fast.config import GUIDANCE_DECAYS, SCHEDULES
from titok_fast.models.attention import BACKENDS
from titok_fast.presets import PRESETS

DTYPES = ("float32", "bfloat16", "float16")


def add_weights(group: argparse._ArgumentGroup, *, generator: bool) -> None:
    """`--model`, `--tokenizer`, `--random-weights`, and where pictures are drawn `--generator`."""
    group.add_argument(
        "--model", choices=tuple(PRESETS), metavar="NAME",
        help=f"known model: {', '.join(PRESETS)}",
    )  # fmt: skip
    for part in ("tokenizer", "generator") if generator else ("tokenizer",):
        group.add_argument(
            f"--{part}", metavar="WEIGHTS",
            help=f"directory, weight file or hub repository of the {part}, in place of the "
            "published weights; together with --model, the settings are still that model's",
        )  # fmt: skip
    group.add_argument(
        "--random-weights", action="store_true",
        help="dry run of --model without weights: the pictures are noise",
    )  # fmt: skip


def add_running(
    group: argparse._ArgumentGroup, *, devices: Sequence[str] | None = None, each: str = ""
) -> None:
    """`--device`, `--dtype`, `--attention`, `--fast`, `--batch-size`, `--quiet`.

    Args:
        group: that takes them.
        devices: the only ones to choose from; None takes any that torch knows.
        each: words after "pictures at once", where several processes run.
    """
    names = "cpu, cuda or cuda:1" if devices is None else " or ".join(devices)
    group.add_argument(
        "--device", choices=devices, metavar="DEVICE",
        help=f"{names} (default: cuda if there is one)",
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=DTYPES,
        help="number format of the weights (default: bfloat16 on cuda, float32 elsewhere)",
    )  # fmt: skip
    group.add_argument(
        "--attention", choices=(*BACKENDS, "auto"),
        help="attention back end (default: TITOK_FAST_ATTENTION, or else sdpa)",
    )  # fmt: skip
    group.add_argument(
        "--fast", nargs="?", const="default", default=False, type=_mode, metavar="MODE",
        help="faster after a slower start: packed weights on the cpu, torch.compile and CUDA "
        "graphs on cuda; `--fast int8` is the fastest on the cpu, at a small loss of precision",
    )  # fmt: skip
    group.add_argument(
        "--batch-size", type=positive, metavar="N",
        help=f"pictures at once{each} (default: 8 on the cpu, 128 elsewhere)",
    )  # fmt: skip
    group.add_argument("--quiet", action="store_true", help="show no progress bar")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """`--seed`, and the fields of SamplingConfig, which `settings` collects."""
    group = parser.add_argument_group(
        "sampling settings",
        "The default of each is the published one of --model. Without --model: 8 steps, constant "
        "guidance 3, temperature 4.5, no annealing, which is not how the paper's FID is reached.",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="seed of the run, any integer (default: 0)"
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


def place(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Where the models are to be and in what type, by the options or by what there is."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return device, getattr(torch, name)


def positive(text: str) -> int:
    """Type of an option: a whole number of 1 or more."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"wants a whole number of 1 or more; got {text!r}")
    return number


def seconds(text: str) -> float:
    """Type of an option: a finite number of seconds above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"wants a number of seconds above 0; got {text!r}")
    return number


def interval(text: str) -> tuple[float, float]:
    """Type of `--guidance-interval`: "0.25,0.75"; SamplingConfig checks the range."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        message = f"wants two numbers such as 0.25,0.75; got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
    return low, high


def labels(text: str) -> list[int]:
    """Type of `--labels`: "1,7,282"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        message = f"wants classes separated by commas, such as 1,7,282; got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _mode(text: str) -> str:
    if text not in MODES:
        raise argparse.ArgumentTypeError(
            f"wants {', '.join(MODES)}, or no value; got {text!r}: does it belong before --fast?"
        )
    return text
