"""Time other image generators beside ours, in the same process, taking turns.

    python bench/peers.py
    python bench/peers.py --peers maskgit,dit-xl-2 --batch-size 4 --json bench/results

What is "extrapolated" and what the paper's ratio is stands in docs/results/peers.md. With a
key-value cache three steps are timed: the first, the middle and the last. Peers run eagerly, as
their libraries ship them, on channels-last weights; so do ours without --compile.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from lib import options
from lib.candidates import arithmetic, say
from lib.harness import NOT_MEASURED, PRECISIONS, summary, table, time_interleaved
from lib.peers.systems import PAPER_A100, SYSTEMS, System
from lib.weights import build, draw_only

from titok_fast import PRESETS

# by resolution, and at the number of steps whose speed the paper gives
OURS = {256: ("titok-l-32", "titok-b-64"), 512: ("titok-l-64-512", "titok-b-128-512")}
OUR_STEPS = 8
# activations and workspaces: the largest is a 512 px decoder's in float32
ROOM_BYTES = 3 << 30

Rivals = Mapping[str, Callable[[], object]]


def interpolated_sum(points: Mapping[int, float], steps: int) -> float:
    """Seconds of steps 0 .. steps-1 from those of some: linear between them, constant outside."""
    if not points or min(points) < 0 or max(points) >= steps:
        raise ValueError(f"interpolated_sum wants points in 0..{steps - 1}; got {sorted(points)}")
    known = sorted(points)
    return float(np.interp(range(steps), known, [points[i] for i in known]).sum())


def available_bytes(device: torch.device) -> int:
    """Memory a new model can take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # memory that torch still holds counts as free
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        found = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return found["MemAvailable"] * 1024


def ours(args: argparse.Namespace, side: int) -> dict[str, Callable[[], object]]:
    """Calls that generate a batch of images from labels, by "model mode"."""
    calls: dict[str, Callable[[], object]] = {}
    for name in args.ours or OURS[side]:
        pipe = draw_only(PRESETS[name], args.device, args.weights_dtype)
        for mode in args.modes:
            own = options.in_mode(pipe, mode)
            settings = asdict(own.sampling.updated(num_sample_steps=OUR_STEPS))
            labels = torch.arange(args.batch_size) % 1000
            draw = partial(own, labels, batch_size=args.batch_size, output="tensor", **settings)
            calls[f"{name} {mode}"] = draw
    return calls


def measure(system: System, rivals: Rivals, args: Any) -> dict[str, Any]:
    """The row of one system, with ours timed in the same rounds."""
    row: dict[str, Any] = asdict(system) | {"batch": args.batch_size, "dtype": args.dtype}
    del row["build"]
    if system.build is None:
        return row | {"not_measured": "the paper gives no speed to set beside it"}
    make = partial(system.build, args.tiny)
    try:
        counts = build(make, torch.device("meta"), args.weights_dtype).counts()
        row["parameters"] = counts
        wanted = sum(counts.values()) * args.weights_dtype.itemsize + (not args.tiny) * ROOM_BYTES
        free = available_bytes(args.device)
        if wanted > free:
            gib = f"{wanted / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            return row | {"not_measured": f"wants {gib}"}
        peer = build(make, args.device, args.weights_dtype)
        calls = peer.calls(args.batch_size, system.steps)
        steps = {f"step {i}": call for i, call in calls.steps.items()}
        timed = {**rivals, **steps, "decode": calls.decode}
        with arithmetic(args.dtype):
            times = time_interleaved(timed, repeats=args.repeats, warmup=1, device=args.device)
    except ImportError as error:
        extra = "pip install 'titok_fast[bench]'"
        return row | {"not_measured": f"needs {error.name}: {extra}"}
    except (MemoryError, RuntimeError) as error:  # torch's out-of-memory is a RuntimeError
        say(f"{system.name} failed: {error}")
        return row | {"not_measured": f"failed: {type(error).__name__}"}
    return row | estimate(system, times, calls.steps_per_call, args.batch_size)


def estimate(
    system: System, times: Mapping[str, list[float]], steps_per_call: int, batch: int
) -> dict[str, Any]:
    """Samples/s of a peer from the times of its parts, and how much faster ours are.

    `times` has seconds of "step <index>", of "decode", and of "<model> <mode>" for ours. Those of
    steps come back per step, in ms.
    """
    step_ms, compared = {}, []
    decode = summary([1000 * s for s in times["decode"]])
    for name, seconds in times.items():
        if name.startswith("step "):
            step_ms[int(name[5:])] = summary([1000 * s / steps_per_call for s in seconds])
    generator_ms = interpolated_sum({i: ms["median"] for i, ms in step_ms.items()}, system.steps)
    rate = 1000 * batch / (generator_ms + decode["median"])
    for name, seconds in times.items():
        if name == "decode" or name.startswith("step "):
            continue
        model, mode = name.split()
        speed, paper = summary([batch / s for s in seconds]), PAPER_A100.get((model, OUR_STEPS))
        ratio = paper / system.paper_rate if paper and system.paper_rate else None
        row = {"model": model, "mode": mode, "images_per_s": speed}
        compared.append(row | {"speed_up": speed["median"] / rate, "paper_ratio": ratio})
    return {
        "extrapolated": steps_per_call < system.steps,
        "step_ms": {str(i): ms for i, ms in step_ms.items()},
        "ms_per_step": generator_ms / system.steps,
        "decode_ms": decode,
        "images_per_s": rate,
        "ours": compared,
    }


def peers_table(record: Mapping[str, Any]) -> str:
    """Markdown, a line per system and model of ours."""
    rows = []
    for case in record["cases"]:
        parts = case.get("parameters")
        line = {
            "system": case["generator"] + ("" if case["side"] == 256 else f", {case['side']} px"),
            "parameters": parts and f"{parts['generator'] / 1e6:,.0f}M",
            "ms/step": case.get("ms_per_step"),
            "steps": case["steps"],
            "decode ms": case.get("decode_ms", {}).get("median"),
            "samples/s": case.get("images_per_s") or f"{NOT_MEASURED}: {case['not_measured']}",
            "how": {True: "extrapolated", False: "whole run"}.get(case.get("extrapolated", None)),
        }
        for own in case.get("ours", [{}]):
            line["ours"] = f"{own['model']}, {own['mode']}" if own else None
            line["times faster"] = own.get("speed_up")
            line["paper's A100"] = own.get("paper_ratio")
            rows.append(dict(line))
    columns = ("system", "parameters", "ms/step", "steps", "decode ms", "samples/s", "how")
    return table(rows, (*columns, "ours", "times faster", "paper's A100"))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure system after system; the JSON, where asked for, is rewritten after each."""
    record = options.start_record("peers", args)
    record["protocol"] |= {
        "warmup": "one round",
        "memory": "one peer at a time beside ours",
        "peers": "eager, a step times the published steps; ours whole",
    }
    side, rivals = 0, {}
    for system in args.systems:
        say(f"{system.name}: {system.classes or NOT_MEASURED}")
        if system.build is not None and system.side != side:
            rivals.clear()  # frees them before the next are loaded
            side, rivals = system.side, ours(args, system.side)
        record["cases"].append(measure(system, rivals, args))
        options.save(args.json, record)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; status 1 when a system failed."""
    p = options.single_parser(__doc__, "ours also")
    add = p.add_argument
    add("--peers", **options.names_of([s.name for s in SYSTEMS]))
    add("--batch-size", **options.COUNT, metavar="B", help="images at once; CPU: 1; CUDA: 32")
    add("--ours", nargs="+", choices=tuple(PRESETS), metavar="NAME", help=argparse.SUPPRESS)
    add("--tiny", action="store_true", help=argparse.SUPPRESS)  # small networks, for tests
    args = p.parse_args(argv)
    args.systems = [s for s in SYSTEMS if s.name in args.peers]
    options.check(p, args, batch_size=(1, 32))
    args.weights_dtype = PRECISIONS[args.dtype]
    args.modes = list(dict.fromkeys(("eager", options.chosen_mode(p, args))))
    record = run(args)
    print(peers_table(record))
    return int(any("failed" in str(c.get("not_measured")) for c in record["cases"]))


if __name__ == "__main__":
    sys.exit(main())
