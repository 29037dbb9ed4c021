"""Options of the benchmarks of whole models, the weights they name, and the record they begin."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import upstream as official
from cases import MAX_ROUNDS, MIN_ROUNDS, ROUND_BUDGET_S, say, shared
from harness import environment, matmul_peak, precision

from titok_fast import PRESETS, TiTokPipeline

PRECISIONS = ("fp32-ieee", "tf32", "bf16")
# how ours runs, and the techniques of TiTokPipeline.compile behind it; None: its defaults
MODES = {"eager": (), "fast": None, "int8": ("products", "int8"), "compiled": ("inductor",)}


def parser(description: str, default_models: Sequence[str]) -> argparse.ArgumentParser:
    """The options that both benchmarks take."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--models", nargs="+", metavar="NAME", help=f"presets: {', '.join(PRESETS)}")
    add("--batch", nargs="+", type=int, metavar="B", help="CPU: 2; CUDA: 1 32 128")
    add("--dtype", nargs="+", choices=PRECISIONS, help="default: all that the device has")
    add("--modes", nargs="+", choices=MODES,
        help="eager; fast: TiTokPipeline.compile(); int8 (CPU, bf16); compiled: torch.compile "
        "alone. Default: all that the device has, compiled on CUDA only")  # fmt: skip
    rounds = f"{MIN_ROUNDS} to {MAX_ROUNDS}, what fits {ROUND_BUDGET_S} s"
    add("--repeats", type=int, metavar="N", help=f"timed rounds; default: {rounds}")
    sources = "directories or hub names for one model; `published`; default: random"
    add("--weights", metavar="TOKENIZER[,GENERATOR]", help=sources)
    add("--upstream", metavar="PATH", help="clone of bytedance/1d-tokenizer to measure as well")
    add("--json", metavar="FILE", help="write the record there; a folder: name it after the run")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, metavar="N", help="CPU threads; default: torch's own choice")
    p.set_defaults(default_models=tuple(default_models))
    return p


def parse(p: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, fill in what depends on the device, and refuse before any work."""
    args = p.parse_args(argv)
    args.device = torch.device(args.device)
    on_cuda = args.device.type == "cuda"
    if on_cuda and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no CUDA device here")
    args.models = args.models or args.default_models[: None if on_cuda else 1]
    args.batch = args.batch or ([1, 32, 128] if on_cuda else [2])
    args.dtype = args.dtype or [d for d in PRECISIONS if on_cuda or d != "tf32"]
    args.modes = args.modes or (["eager", "fast"] + (["compiled"] if on_cuda else ["int8"]))
    if on_cuda and "int8" in args.modes:
        p.error("--modes int8 is for the CPU")
    unknown = [name for name in args.models if name not in PRESETS]
    if unknown:
        p.error(f"--models: unknown {', '.join(unknown)}; known: {', '.join(PRESETS)}")
    if "tf32" in args.dtype and not on_cuda:
        p.error("--dtype tf32 exists on CUDA devices only")
    for name in ("batch", "repeats", "threads"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [1 if value is None else value]) < 1:
            p.error(f"--{name} wants at least 1; got {value}")
    if args.weights not in (None, "published") and len(args.models) != 1:
        p.error("--weights of one model wants one name in --models")
    if args.upstream is not None:
        try:
            args.upstream = official.find(args.upstream)
        except FileNotFoundError as error:
            p.error(str(error))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args


def in_mode(pipe: TiTokPipeline, mode: str) -> TiTokPipeline:
    """A pipeline of its own on the same weights, made as fast as the mode says."""
    own = shared(pipe)
    return own if mode == "eager" else own.compile(MODES[mode])


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
    """The JSON before its first case: device, versions, protocol, matrix-product rates."""
    say("measuring the device's matrix products")
    rates = {}
    for name in args.dtype:
        with precision(name) as dtype:
            rates[name] = matmul_peak(args.device, dtype)
    return {
        "benchmark": benchmark,
        "environment": environment(args.device),
        "protocol": {
            "timing": "wall clock between device synchronisations, candidates taking turns",
            "warmup": "three calls of each: first-call time, memory, agreement",
            "memory": "weights of the candidate, and what its second call adds at most",
            "weights": _describe_weights(args.weights),
        },
        "upstream_commit": official.commit(args.upstream) if args.upstream else None,
        "matmul_flop_per_s": rates,
        "cases": [],
    }


def _describe_weights(weights: str | None) -> str:
    """For the record: what the weights were, without local paths."""
    if weights is None:
        return "random"
    names = weights.split(",")
    return ", ".join("local files" if Path(name).exists() else name for name in names)


def result_path(target: str, record: dict[str, Any]) -> Path:
    """The file to write: `target`, or <device>_<date>_<commit>_<benchmark>.json in that folder."""
    if not Path(target).is_dir():
        return Path(target)
    environment = record["environment"]
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    date, commit = environment["date_utc"][:10], (environment["commit"] or "nocommit")[:10]
    return Path(target) / f"{device}_{date}_{commit}_{record['benchmark']}.json"
