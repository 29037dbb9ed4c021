"""Options that commands share: which model, where it runs, how it samples, and progress bars."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from titok_fast.backends.techniques import check_techniques, resolve_fast
from titok_fast.config import FLOAT_DTYPES
from titok_fast.distributed import local_device
from titok_fast.loading import Sources, resolve
from titok_fast.models.attention import BACKENDS, backend_name
from titok_fast.pipeline import TiTokPipeline
from titok_fast.presets import PRESETS
from titok_fast.sampling_config import GUIDANCE_DECAYS, SCHEDULES


def add_weights(group: argparse._ActionsContainer, *, generator: bool = False) -> None:
    """`--model`, `--tokenizer`, and for commands that draw `--generator`."""
    add = group.add_argument
    add("--model", choices=tuple(PRESETS), metavar="NAME", help=f"one of {', '.join(PRESETS)}")
    for part in ("tokenizer", "generator") if generator else ("tokenizer",):
        what = (
            f"directory, weight file or hub repository of the {part}, in place of the published "
            "weights; together with --model, the settings are still that model's"
        )
        add(f"--{part}", metavar="WEIGHTS", help=what)


def add_model(parser: argparse.ArgumentParser, *, generator: bool = False) -> None:
    """Which weights, and where they run: what `sources_of` and `load_pipeline` read.

    Args:
        parser: of the command.
        generator: whether the command draws.
    """
    group = parser.add_argument_group("model")
    add_weights(group, generator=generator)
    add = group.add_argument
    what = "dry run of --model without weights: the images are noise"
    add("--random-weights", action="store_true", help=what)
    add_device(group)
    what = "number format of the weights (default: bfloat16 on cuda, float32 elsewhere)"
    add("--dtype", choices=FLOAT_DTYPES, help=what)
    what = "attention back end (default: TITOK_FAST_ATTENTION, or else sdpa)"
    add("--attention", choices=(*BACKENDS, "auto"), help=what)
    what = (
        "faster after a slower start: packed weights on the cpu, torch.compile and CUDA graphs on "
        "cuda; `--fast int8` is the fastest on the cpu, at a small loss of precision"
    )
    add("--fast", nargs="?", const=True, default=False, type=_fast, metavar="int8", help=what)
    what = "images at once (default: 8 on the cpu, 128 elsewhere)"
    add("--batch-size", type=positive, metavar="N", help=what)
    add_quiet(group)


def add_device(group: argparse._ActionsContainer) -> None:
    """`--device`."""
    group.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda or cuda:1 (default: cuda if there is one)"
    )


def add_quiet(group: argparse._ActionsContainer) -> None:
    """`--quiet`."""
    group.add_argument("--quiet", action="store_true", help="show no progress bar")


def add_force(group: argparse._ActionsContainer) -> None:
    """`--force`."""
    group.add_argument("--force", action="store_true", help="replace files that exist already")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """`--seed`, and the fields of SamplingConfig, which `sampling_changes` collects."""
    group = parser.add_argument_group(
        "sampling settings",
        "The default of each is the published one of --model. Without a known model: 8 steps, "
        "constant guidance 3, temperature 4.5, no annealing, which does not reach the paper's FID.",
    )
    add = group.add_argument
    add("--seed", type=int, default=0, help="seed of the run, any integer (default: 0)")
    add("--steps", type=int, help="number of unmasking steps, 1 to 1024")
    add("--guidance", type=float, help="guidance scale; 0 turns guidance off")
    add("--decay", choices=GUIDANCE_DECAYS, help="guidance over the steps")
    what = "share of the steps in which guidance acts, such as 0.25,0.75 (default: all)"
    add("--guidance-interval", type=interval, metavar="LOW,HIGH", help=what)
    add("--power", type=float, help="exponent of the decay power-cosine")
    add("--temperature", type=float, help="noise at the first step, 0 or more")
    what = "divide logits by a temperature that falls from 1.3 to 0.5"
    add("--annealing", action=argparse.BooleanOptionalAction, help=what)
    add("--schedule", choices=SCHEDULES, help="how fast tokens are unmasked")
    what = "what ranks tokens: TiTok's raw logit, or MaskGIT's probability"
    add("--confidence", choices=("logit", "probability"), help=what)


def sampling_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of SamplingConfig that the options set; None where an option is absent."""
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


def sources_of(args: argparse.Namespace, *, draws: bool = False) -> Sources:
    """Check the options of `add_model`, and find configurations and weights.

    Raises:
        ValueError: an option's value does not exist here, or two do not go together.
        FileNotFoundError: there are no such weights.
        BackendError: the attention back end cannot work here.
    """
    device, dtype = local_device(args.device), dtype_of(args)
    backend_name(args.attention)
    check_techniques(resolve_fast(args.fast, device.type, dtype), device.type, dtype)
    generator = getattr(args, "generator", None)
    return resolve(
        args.model, args.tokenizer, generator, draws=draws, random_weights=args.random_weights
    )


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    """The floating type of the weights that `--dtype` and `--device` stand for."""
    kind = (args.device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")[0]
    return getattr(torch, args.dtype or ("bfloat16" if kind == "cuda" else "float32"))


def load_pipeline(args: argparse.Namespace, sources: Sources) -> TiTokPipeline:
    """Load what `sources_of` found, and make it fast where `--fast` asks for it."""
    say_random_weights(args)
    return make_fast(args, load_plain(args, sources))


def say_random_weights(args: argparse.Namespace) -> None:
    """Say on standard error that images will be noise, where `--random-weights` is given."""
    if args.random_weights:
        sys.stderr.write("titok-fast: random weights, untrained: the images are noise\n")


def load_plain(args: argparse.Namespace, sources: Sources) -> TiTokPipeline:
    """Load what `sources_of` found, not yet compiled."""
    device, dtype = local_device(args.device), dtype_of(args)
    return TiTokPipeline.from_sources(sources, device=device, dtype=dtype, attention=args.attention)


def make_fast(args: argparse.Namespace, pipe: TiTokPipeline) -> TiTokPipeline:
    """Compile a pipeline where `--fast` asks for it, and say how."""
    if args.fast:
        pipe.compile(pipe.techniques_of(args.fast))
        if not args.quiet:
            sys.stderr.write(f"titok-fast: fast on {pipe.device}: {', '.join(pipe.techniques)}\n")
    return pipe


def progress_bar(
    args: argparse.Namespace, total: int, *, unit: str = "image", name: str = "", show: bool = True
) -> "tqdm[NoReturn]":
    """A bar on standard error; none with `--quiet`.

    Args:
        args: with `quiet` and `command`.
        total: units of the whole work.
        unit: of the work.
        name: beside the bar; by default the command's.
        show: False shows none, for ranks that are silent.
    """
    silent = args.quiet or not show or not total
    return tqdm(total=total, unit=unit, desc=name or args.command, disable=silent, file=sys.stderr)


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


def _fast(text: str) -> str:
    if text != "int8":
        raise argparse.ArgumentTypeError(
            f"wants int8, or no value; got {text!r}: does it belong before --fast?"
        )
    return text


def check_outputs(files: Sequence[Any], *, force: bool) -> None:
    """Raise FileExistsError if a file would be replaced without `--force`."""
    existing = [path for path in files if path.exists()]
    folders = [path for path in existing if path.is_dir()]
    if folders:
        raise IsADirectoryError(f"{folders[0]} is a folder; a file is to be written there")
    if existing and not force:
        count = f"{len(existing)} outputs exist" if len(existing) > 1 else "the output exists"
        raise FileExistsError(f"{count} already: {existing[0]}; pass --force to overwrite")
