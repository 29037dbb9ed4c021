"""Define the options that benchmarks share, check them, load models, begin and save records."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lib import upstream as official
from lib.candidates import MAX_ROUNDS, MIN_ROUNDS, ROUND_BUDGET_S, shared
from lib.harness import RATES, environment, matmul_peak, precision, say, write_json

from titok_fast import PRESETS, TiTokPipeline
from titok_fast.backends.techniques import check_techniques, resolve_fast

PRECISIONS = ("fp32-ieee", "tf32", "bf16")
# what TiTokPipeline.compile is asked for in each mode
MODES: dict[str, bool | str | tuple[str, ...]] = {
    "eager": False,
    "fast": True,
    "int8": "int8",
    "compiled": ("inductor",),
}


def plain_parser(description: str | None) -> argparse.ArgumentParser:
    """Without options; the description, a module's docstring, keeps its lines."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parser(description: str | None, default_models: Sequence[str]) -> argparse.ArgumentParser:
    """The options of sampling.py and reconstruction.py."""
    p = plain_parser(description)
    add = p.add_argument
    add("--models", nargs="+", metavar="NAME", help=f"presets: {', '.join(PRESETS)}")
    add("--batch", nargs="+", type=int, metavar="B", help="CPU: 2; CUDA: 1 32 128")
    add("--dtype", nargs="+", choices=PRECISIONS, help="default: all that the device has")
    modes = (
        "eager; fast: TiTokPipeline.compile(); int8 (CPU, bf16); compiled: torch.compile alone. "
        "Default: all that the device has, compiled on CUDA only"
    )
    add("--modes", nargs="+", choices=MODES, help=modes)
    add_repeats(p)
    add_weights(p)
    add_upstream(p)
    add_run(p)
    p.set_defaults(default_models=tuple(default_models))
    return p


def add_repeats(p: argparse.ArgumentParser) -> None:
    """The option --repeats, for `candidates.measure`."""
    rounds = f"{MIN_ROUNDS} to {MAX_ROUNDS}, as many as fit {ROUND_BUDGET_S} s"
    p.add_argument("--repeats", type=int, metavar="N", help=f"timed rounds; default: {rounds}")


def add_weights(p: argparse.ArgumentParser) -> None:
    """The option --weights, for `load`."""
    sources = "directories or hub names for one model; `published`; default: random"
    p.add_argument("--weights", metavar="TOKENIZER[,GENERATOR]", help=sources)


def add_upstream(p: argparse.ArgumentParser) -> None:
    """The option --upstream, for `find_upstream`."""
    clone = "clone of bytedance/1d-tokenizer to measure as well"
    p.add_argument("--upstream", metavar="PATH", help=clone)


def add_json(p: argparse.ArgumentParser) -> None:
    """The option --json, for `save`."""
    target = "write the record there; a folder: name it after the run"
    p.add_argument("--json", metavar="FILE", help=target)


def add_threads(p: argparse.ArgumentParser) -> None:
    """The option --threads, for `check`."""
    threads = "CPU threads; default: torch's own choice"
    p.add_argument("--threads", type=int, metavar="N", help=threads)


def add_run(p: argparse.ArgumentParser) -> None:
    """The options --json, --device and --threads."""
    add_json(p)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_threads(p)


def add_single(p: argparse.ArgumentParser, what: str) -> None:
    """One precision, one mode, --repeats and `add_run`; `what` runs in that mode, says the help."""
    add = p.add_argument
    add("--dtype", choices=PRECISIONS, default="bf16")
    how = f"{what} in the fast mode, with these techniques, or in int8"
    add("--compile", nargs="?", const="fast", metavar="A,B", help=how)
    add("--repeats", type=int, default=3, metavar="N", help="timed rounds (default: 3)")
    add_run(p)


def parse(p: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options of `parser`, set the defaults of the device, refuse what does not fit."""
    args = p.parse_args(argv)
    on_cuda = check(p, args, "batch", "repeats", "threads")
    args.models = args.models or args.default_models[: None if on_cuda else 1]
    args.batch = args.batch or ([1, 32, 128] if on_cuda else [2])
    args.dtype = args.dtype or [d for d in PRECISIONS if on_cuda or d != "tf32"]
    args.modes = args.modes or (["eager", "fast"] + (["compiled"] if on_cuda else ["int8"]))
    if on_cuda and "int8" in args.modes:
        p.error("--modes int8 is for the CPU")
    unknown = [name for name in args.models if name not in PRESETS]
    if unknown:
        p.error(f"--models: unknown {', '.join(unknown)}; known: {', '.join(PRESETS)}")
    if args.weights not in (None, "published") and len(args.models) != 1:
        p.error("--weights of one model wants one name in --models")
    return args


def check(p: argparse.ArgumentParser, args: argparse.Namespace, *counts: str) -> bool:
    """Refuse what cannot run here; set the device, the checkout and the CPU threads.

    Args:
        p: makes the usage errors.
        args: device, and where the benchmark has them dtype, upstream and threads; changed.
        counts: options that want at least 1: numbers, lists of them, or None.

    Returns:
        Whether the device is CUDA.
    """
    args.device = torch.device(args.device)
    on_cuda, given = args.device.type == "cuda", vars(args)
    if on_cuda and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no CUDA device here")
    if "tf32" in (given.get("dtype") or ()) and not on_cuda:
        p.error("--dtype tf32 exists on CUDA devices only")
    check_counts(p, args, *counts)
    if "upstream" in given:
        find_upstream(p, args)
    if given.get("threads") is not None:
        torch.set_num_threads(args.threads)
    return on_cuda


def find_upstream(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Make the checkout of --upstream an absolute path; a usage error where it holds none."""
    if args.upstream is not None:
        try:
            args.upstream = official.find(args.upstream)
        except FileNotFoundError as error:
            p.error(str(error))


def check_counts(p: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """A usage error for a number below 1, alone or in a list; None passes."""
    for name in names:
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [1 if value is None else value]) < 1:
            p.error(f"--{name.replace('_', '-')} wants at least 1; got {value}")


def chosen_mode(p: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """Of --compile: a key of MODES, or techniques joined by "+"; a usage error if they misfit."""
    if args.compile is None:
        return "eager"
    mode, kind = args.compile.replace(",", "+"), args.device.type
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    try:
        check_techniques(techniques(mode, kind), kind, dtype)
    except ValueError as error:
        p.error(f"--compile: {error}")
    return mode


def techniques(mode: str, device_type: str) -> tuple[str, ...]:
    """Techniques of TiTokPipeline.compile in a mode: a key of MODES, or some joined by "+"."""
    known = MODES.get(mode, tuple(mode.split("+")))
    return known if isinstance(known, tuple) else resolve_fast(known, device_type)


def in_mode(pipe: TiTokPipeline, mode: str) -> TiTokPipeline:
    """A pipeline of its own on the same weights, made as fast as the mode (`techniques`) says."""
    own = shared(pipe)
    names = techniques(mode, own.device.type)
    return own.compile(names) if names else own


def load(name: str, weights: str | None, device: torch.device, *, generate: bool) -> TiTokPipeline:
    """A preset in float32: random weights, published ones, or those of "TOKENIZER[,GENERATOR]"."""
    if weights is None:
        pipe = TiTokPipeline.random(name, seed=0, device=device)
    elif weights == "published":
        pipe = TiTokPipeline.from_pretrained(name, device=device)
    else:
        tokenizer, _, generator = weights.partition(",")
        pipe = TiTokPipeline.from_pretrained(
            name if generate else None,
            tokenizer=tokenizer,
            generator=(generator or None) if generate else None,
            device=device,
        )
    if not generate:
        pipe.generator = None
    return pipe


def start_record(benchmark: str, args: argparse.Namespace) -> dict[str, Any]:
    """The JSON before its first case: device, versions, protocol, matmul rates.

    Args:
        benchmark: its name.
        args: device, dtype (one or several), and weights and upstream where there are such options.
    """
    say("measuring the device's matmul rates")
    rates, given = {}, vars(args)
    for name in [args.dtype] if isinstance(args.dtype, str) else args.dtype:
        with precision(name) as dtype:
            rates[name] = matmul_peak(args.device, dtype)
    return {
        "benchmark": benchmark,
        "environment": environment(args.device),
        "protocol": {
            "timing": "wall clock between device synchronisations, candidates taking turns",
            "warmup": "three calls of each: first-call time, memory, agreement",
            "memory": "weights of the candidate, and what its second call adds at most",
            "weights": _describe_weights(given.get("weights")),
        },
        "upstream_commit": official.commit(args.upstream) if given.get("upstream") else None,
        RATES: rates,
        "cases": [],
    }


def _describe_weights(weights: str | None) -> str:
    """For the record: what the weights were, without local paths."""
    if weights is None:
        return "random"
    names = weights.split(",")
    return ", ".join("local files" if Path(name).exists() else name for name in names)


def save(target: str | None, record: dict[str, Any]) -> Path | None:
    """Write the record, or what there is of it, where --json says; None where it says nothing."""
    if not target:
        return None
    path = result_path(target, record)
    write_json(path, record)
    return path


def result_path(target: str, record: dict[str, Any]) -> Path:
    """The file to write: `target`, or <device>_<date>_<commit>_<benchmark>.json in that folder."""
    if not Path(target).is_dir():
        return Path(target)
    environment = record["environment"]
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    date, commit = environment["date_utc"][:10], (environment["commit"] or "nocommit")[:10]
    return Path(target) / f"{device}_{date}_{commit}_{record['benchmark']}.json"
