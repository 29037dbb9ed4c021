"""Measure how long a fresh process waits for its first images, with empty and with filled caches.

    python bench/first_call.py [--model titok-l-32] [--batch-size 8] [--modes eager fast int8]
                               [--json FILE]

For each mode one process starts with an empty cache folder, and a second one with what the first
left there. Weights are random. Seconds of each:

    import_s      torch and titok_fast
    load_s        making the weights: not what loading a file takes
    compile_s     TiTokPipeline.compile: packing
    first_call_s  labels to images on the host, compiling on the way
    next_call_s   the same again
    extra_s       first_call_s - next_call_s: compiling, or loading what was compiled
    start_s       compile_s + extra_s: what the mode costs a process before it is fast
    process_s     from the start of the process to its end, as its parent sees it

The record has a case for each mode: `cold` and `warm` with the seconds above, and `warm_over_cold`,
the ratios of extra_s and start_s.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_STARTED = time.perf_counter()  # before torch is imported

import torch  # noqa: E402
from lib.harness import timed  # noqa: E402
from lib.options import COUNT, new_record, parser, save, techniques  # noqa: E402
from lib.tables import first_call_table  # noqa: E402

from titok_fast import PRESETS, GeneratorConfig, TiTokPipeline, TokenizerConfig  # noqa: E402
from titok_fast.presets import Preset  # noqa: E402

_IMPORTED = time.perf_counter()

MODES = {"cpu": ("eager", "fast", "int8", "compiled"), "cuda": ("eager", "compiled", "fast")}
TINY = Preset(
    TokenizerConfig(vit_enc_model_size=(64, 2, 2), vit_dec_model_size=(64, 2, 2), crop_size=64),
    GeneratorConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    ),
)


def draw_twice(args: argparse.Namespace) -> dict[str, float]:
    """What one fresh process does, in seconds."""
    device, labels = torch.device(args.device), list(range(args.batch_size))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    begin = time.perf_counter()
    pipe = TiTokPipeline.random(args.model, device=device, dtype=getattr(torch, args.dtype))
    seconds = {"import_s": _IMPORTED - _STARTED, "load_s": time.perf_counter() - begin}

    def draw() -> object:
        return pipe(labels, batch_size=len(labels), output="tensor", num_sample_steps=args.steps)

    names = techniques(args.modes[0], device.type, pipe.tokenizer.dtype)
    seconds["compile_s"] = timed(lambda: names and pipe.compile(names), device)
    for name in ("first_call_s", "next_call_s"):
        seconds[name] = timed(draw, device)
    return seconds


def start(args: argparse.Namespace, mode: str, folder: str) -> dict[str, float]:
    """Run `draw_twice` in a process of its own whose caches lie in `folder`."""
    own = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    own |= {"XDG_CACHE_HOME": folder, "TRITON_CACHE_DIR": str(Path(folder) / "triton")}
    command = [sys.executable, __file__, *args.words, "--child", "--modes", mode]
    begin = time.perf_counter()
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    process = time.perf_counter() - begin
    if done.returncode != 0:
        raise RuntimeError(f"the process for mode {mode!r} ended with:\n{done.stderr}")
    seconds = json.loads(done.stdout.splitlines()[-1])
    extra = seconds["first_call_s"] - seconds["next_call_s"]
    start_s = seconds["compile_s"] + extra
    return seconds | {"extra_s": extra, "start_s": start_s, "process_s": process}


def measure(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """One case: a cold process, then a warm one."""
    with TemporaryDirectory() as folder:
        cold, warm = start(args, mode, folder), start(args, mode, folder)
    return {
        "model": args.model,
        "batch": args.batch_size,
        "dtype": args.dtype,
        "mode": mode,
        "techniques": list(techniques(mode, args.device, getattr(torch, args.dtype))),
        "cold": cold,
        "warm": warm,
        "warm_over_cold": {name: warm[name] / cold[name] for name in ("extra_s", "start_s")},
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    p = parser(__doc__, "json", "threads")
    add = p.add_argument
    add("--model", choices=tuple(PRESETS), metavar="NAME", default="titok-l-32")
    add("--tiny", action="store_true", help="a network that runs in a moment, in place of --model")
    add("--batch-size", **COUNT, default=8, metavar="B", help="default: 8")
    add("--steps", **COUNT, metavar="T", help="default: those of the preset")
    add("--modes", nargs="+", choices=MODES["cpu"], help="default: all that the device has")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--device", choices=tuple(MODES))
    add("--child", action="store_true", help=argparse.SUPPRESS)
    words = sys.argv[1:] if argv is None else [*argv]
    args = p.parse_args(words, argparse.Namespace(words=words))
    args.modes = args.modes or list(MODES[args.device])
    wrong = sorted(set(args.modes) - set(MODES[args.device]))
    if wrong:
        p.error(f"--modes: {', '.join(wrong)} not on {args.device}")
    if args.tiny:
        args.model = "tiny"
        PRESETS["tiny"] = TINY
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = parse(argv)
    if args.child:
        print(json.dumps(draw_twice(args)))
        return 0
    record = new_record(
        "first_call",
        args.device,
        timing="wall clock of fresh processes, one after the other",
        cold="empty folders for the code that torch and Triton keep",
        warm="the folders that the cold process has left",
        weights="random",
    )
    for mode in args.modes:
        case = measure(args, mode)
        record["cases"].append(case)
        for name in ("cold", "warm"):
            shown = ", ".join(f"{field} {value:.2f}" for field, value in case[name].items())
            print(f"{mode} {name}: {shown}", file=sys.stderr)
        save(args.json, record)
    print(first_call_table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
