"""Define the options that benchmarks share, check them, load models, begin and save records."""

import argparse
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lib import upstream as official
from lib.candidates import MAX_ROUNDS, MIN_ROUNDS, ROUND_BUDGET_S, Candidate, measure, shared
from lib.harness import PRECISIONS, RATES, environment, matmul_peak, precision, say, write_json

from titok_fast import PRESETS, TiTokPipeline
from titok_fast.backends.techniques import check_techniques, resolve_fast

# what TiTokPipeline.compile is asked for in each mode
MODES: dict[str, bool | str | tuple[str, ...]] = {
    "eager": False,
    "fast": True,
    "int8": "int8",
    "compiled": ("inductor",),
}


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"wants at least 1; got {number}")
    return number


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"wants an existing folder; got {text}")
    return Path(text)


def _checkout(text: str) -> Path:
    try:
        return official.find(text)
    except FileNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


COUNT: dict[str, Any] = {"type": _count}
_ROUNDS = f"{MIN_ROUNDS} to {MAX_ROUNDS}, as many as fit {ROUND_BUDGET_S} s"
_WEIGHTS = "directories or hub names for one model; `published`; default: random"
SHARED: dict[str, dict[str, Any]] = {  # options of several benchmarks
    "device": {},
    "json": {"metavar": "FILE", "help": "write the record there; a folder: name it after the run"},
    "plots": {"type": _folder, "metavar": "DIR", "help": "also a plot there, named after the run"},
    "repeats": COUNT | {"metavar": "N", "help": f"timed rounds; default: {_ROUNDS}"},
    "threads": COUNT | {"metavar": "N", "help": "CPU threads; default: torch's own choice"},
    "upstream": {
        "type": _checkout,
        "metavar": "PATH",
        "help": "clone of bytedance/1d-tokenizer to measure as well",
    },
    "weights": {"metavar": "TOKENIZER[,GENERATOR]", "help": _WEIGHTS},
}
RUN = ("json", "device", "threads")


def parser(description: str | None, *shared: str) -> argparse.ArgumentParser:
    """With these options of SHARED; the description, a module's docstring, keeps its lines."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in shared:
        p.add_argument(f"--{name}", **SHARED[name])
    p.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    return p


def names_of(known: Collection[str]) -> dict[str, Any]:
    """Of an option that takes some of these names, with commas between them; default: all."""

    def names(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            said = f"unknown {', '.join(unknown)}; known: {', '.join(known)}"
            raise argparse.ArgumentTypeError(said)
        return text.split(",")

    all_names = ",".join(known)
    return {"type": names, "metavar": "A,B", "default": all_names, "help": f"default: {all_names}"}


def matrix_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of sampling.py and reconstruction.py, for `parse_matrix`."""
    p = parser(description, "repeats", "weights", "upstream", *RUN)
    add = p.add_argument
    add("--models", nargs="+", choices=PRESETS, metavar="NAME", help=f"of {', '.join(PRESETS)}")
    add("--batch", nargs="+", **COUNT, metavar="B", help="CPU: 2; CUDA: 1 32 128")
    add("--dtype", nargs="+", choices=PRECISIONS, help="default: all that the device has")
    modes = (
        "eager; fast: TiTokPipeline.compile(); int8 (CPU, bf16); compiled: torch.compile alone. "
        "Default: all that the device has, compiled on CUDA only"
    )
    add("--modes", nargs="+", choices=MODES, help=modes)
    return p


def single_parser(description: str | None, what: str, *shared: str) -> argparse.ArgumentParser:
    """One precision and one mode; `what` runs in that mode, says the help."""
    p = parser(description, *RUN, *shared)
    add = p.add_argument
    add("--dtype", choices=PRECISIONS, default="bf16")
    how = f"{what} in the fast mode, with these techniques, or in int8"
    add("--compile", nargs="?", const="fast", metavar="A,B", help=how)
    add("--repeats", **COUNT, default=3, metavar="N", help="timed rounds (default: 3)")
    return p


def parse_matrix(
    p: argparse.ArgumentParser, argv: Sequence[str] | None, models: tuple[str, ...]
) -> argparse.Namespace:
    """Parse the options of `matrix_parser`; without --models a CPU has the first of `models`."""
    args = p.parse_args(argv)
    on_cuda = check(
        p,
        args,
        models=(models[:1], models),
        batch=([2], [1, 32, 128]),
        dtype=(["fp32-ieee", "bf16"], list(PRECISIONS)),
        modes=(["eager", "fast", "int8"], ["eager", "fast", "compiled"]),
    )
    if on_cuda and "int8" in args.modes:
        p.error("--modes int8 is for the CPU")
    if args.weights not in (None, "published") and len(args.models) != 1:
        p.error("--weights of one model wants one name in --models")
    return args


def check(
    p: argparse.ArgumentParser, args: argparse.Namespace, **defaults: tuple[Any, Any]
) -> bool:
    """Refuse what cannot run here, set the device and the CPU threads; whether it is CUDA.

    `defaults`, on a CPU and on CUDA, are for options that are None or that do not exist.
    """
    args.device = torch.device(args.device)
    on_cuda, given = args.device.type == "cuda", vars(args)
    if on_cuda and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no CUDA device here")
    if "tf32" in (given.get("dtype") or ()) and not on_cuda:
        p.error("--dtype tf32 exists on CUDA devices only")
    if given.get("threads") is not None:
        torch.set_num_threads(args.threads)
    for name, values in defaults.items():
        if given.get(name) is None:
            setattr(args, name, values[on_cuda])
    return on_cuda


def chosen_mode(p: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """Of --compile: a key of MODES, or techniques joined by "+"; a usage error if they misfit."""
    if args.compile is None:
        return "eager"
    mode, kind = args.compile.replace(",", "+"), args.device.type
    try:
        dtype = PRECISIONS[args.dtype]
        check_techniques(techniques(mode, kind, dtype), kind, dtype)
    except ValueError as error:
        p.error(f"--compile: {error}")
    return mode


def techniques(mode: str, device_type: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Techniques of TiTokPipeline.compile in a mode: a key of MODES, or some joined by "+"."""
    known = MODES.get(mode, tuple(mode.split("+")))
    return known if isinstance(known, tuple) else resolve_fast(known, device_type, dtype)


def in_mode(pipe: TiTokPipeline, mode: str) -> TiTokPipeline:
    """A pipeline of its own on the same weights, made as fast as the mode (`techniques`) says."""
    own = shared(pipe)
    names = techniques(mode, own.device.type, own.tokenizer.dtype)
    return own.compile(names) if names else own


def contenders(
    by_dtype: Mapping[str, TiTokPipeline], rival: Any, modes: Sequence[str]
) -> Iterator[tuple[str, str, str, Any]]:
    """(implementation, dtype, mode, model): ours in each mode, and upstream where there is one."""
    for dtype, ours in by_dtype.items():
        for mode in modes:
            if mode != "int8" or dtype == "bf16":
                yield "ours", dtype, mode, in_mode(ours, mode)
        if rival is not None:
            yield "upstream", dtype, "eager", shared(rival)


def measure_case(
    record: dict[str, Any],
    args: argparse.Namespace,
    case: dict[str, Any],
    made: Sequence[Candidate],
) -> None:
    """Add a row for each candidate to the record, and write it; `case` says what they do."""
    words = (case["model"], case.get("direction"), f"batch {case['batch']}: ")
    rows = measure(
        made,
        images=case["batch"],
        device=args.device,
        repeats=args.repeats,
        prefix=" ".join(filter(None, words)),
    )
    record["cases"] += [case | row for row in rows]
    save(args.json, record)
    torch.compiler.reset()


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


def new_record(benchmark: str, device: torch.device | str, **protocol: Any) -> dict[str, Any]:
    """The JSON before its first case."""
    start = {"benchmark": benchmark, "environment": environment(device)}
    return start | {"protocol": protocol, "cases": []}


def start_record(benchmark: str, args: argparse.Namespace) -> dict[str, Any]:
    """`new_record` with the protocol of `candidates.measure` and the matmul rates of --dtype."""
    say("measuring the device's matmul rates")
    rates, given = {}, vars(args)
    for name in [args.dtype] if isinstance(args.dtype, str) else args.dtype:
        with precision(name) as dtype:
            rates[name] = matmul_peak(args.device, dtype)
    record = new_record(
        benchmark,
        args.device,
        timing="wall clock between device synchronisations, candidates taking turns",
        warmup="three calls of each: first-call time, memory, agreement",
        memory="weights of the candidate, and what its second call adds at most",
        weights=_describe_weights(given.get("weights")),
    )
    commit = official.commit(args.upstream) if given.get("upstream") else None
    return record | {"upstream_commit": commit, RATES: rates}


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


def stem(target: str | None, record: dict[str, Any]) -> str:
    """The name of a record's file without its ending, also where --json names none."""
    return result_path(target or ".", record).stem


def result_path(target: str, record: dict[str, Any]) -> Path:
    """The file to write: `target`, or <device>_<date>_<commit>_<benchmark>.json in that folder."""
    if not Path(target).is_dir():
        return Path(target)
    environment = record["environment"]
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    date, commit = environment["date_utc"][:10], (environment["commit"] or "nocommit")[:10]
    return Path(target) / f"{device}_{date}_{commit}_{record['benchmark']}.json"
