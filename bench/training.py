"""Measure seconds and memory of a training update in every stage, beside upstream's.

    python bench/training.py --models titok-l-32 --stages stage1 generator --batch 8 --upstream PATH

docs/results/training.md says what an update is; the generator reads tokens. Ours is the update of
`titok-fast train` with the committed recipe. Upstream's is made of its models and losses
(--upstream) under bfloat16 autocast. On CUDA ours also runs with training.compile, and float32 is
TF32, as both set it. Weights are random, and in the first update the same for both.

Every round starts a fresh process for each system in turn, which builds it, does two updates that
are not timed, then --steps timed ones. Its memory is the most it ever held: on a CPU resident
memory (VmHWM), on CUDA what tensors took in the updates. On a CPU the second update still takes
fresh memory from the system, which later ones do not.
"""

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from lib.harness import RATES, gib, resident, say, spread, summary, table, timed
from lib.options import COUNT, RUN, check, parser, save, start_record
from lib.training_ours import RECIPES, OurLearner, batch_of, random_task, recipe_of
from lib.training_upstream import UpstreamLearner

from titok_fast import preset
from titok_fast.costs import generator_cost, pixel_encoder_cost, tokenizer_costs
from titok_fast.training.recipe.recipe import Recipe

STAGES = ("stage1", "stage2", "generator")
BASE, COMPILED = "upstream autocast", "ours bf16, compiled"  # ratios are over the first
SYSTEMS = {  # whether it runs in bfloat16
    BASE: True,
    "ours bf16": True,
    COMPILED: True,
    "upstream fp32": False,
    "ours fp32": False,
}
WARMUPS = 2  # updates that are not timed
_JOB = "--job"  # a child's first argument


def system_of(name: str, recipe: Recipe, checkout: Path | None, device: torch.device) -> Any:
    """The system of SYSTEMS, built."""
    if name.startswith("ours"):
        return OurLearner(recipe, device)
    assert checkout is not None
    return UpstreamLearner(checkout, recipe, random_task(recipe, device), SYSTEMS[name])


def measure_here(job: dict[str, Any]) -> dict[str, Any]:
    """Build one system in this process and time its updates: what a child does."""
    torch.set_num_threads(job["threads"])
    name, device = job["system"], torch.device(job["device"])
    recipe = recipe_of(
        job["model"], job["stage"], job["batch"], SYSTEMS[name], compiled=name == COMPILED
    )
    checkout = Path(job["upstream"]) if job["upstream"] else None
    system, batch = system_of(name, recipe, checkout, device), batch_of(recipe)
    gc.collect()  # what only the construction needed
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    loss, *_ = [system.update(batch) for _ in range(WARMUPS)]
    seconds = [timed(lambda: system.update(batch), device) for _ in range(job["steps"])]
    return {"loss": loss, "seconds": seconds, "peak_bytes": high_water(device)}


def high_water(device: torch.device) -> int | None:
    """Most bytes this process held, or None where the system cannot tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident("VmHWM") or None


def child(job: dict[str, Any]) -> dict[str, Any]:
    """`measure_here` in a process of its own; where it failed {"error": its last line}."""
    command = [sys.executable, str(Path(__file__).resolve()), _JOB, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        # a process that is killed, as for want of memory, says nothing
        return {"error": lines[-1] if lines else f"ended with status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(job: dict[str, Any], systems: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """One row for each system; the systems take turns."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    for i in range(rounds):
        first = i % len(systems)
        for name in [*systems[first:], *systems[:first]]:
            if any("error" in run for run in found[name]):
                continue
            say(f"{job['model']} {job['stage']} batch {job['batch']}, round {i + 1}: {name}")
            found[name].append(child(job | {"system": name}))
    return [_row(job, name, runs) for name, runs in found.items()]


def _row(job: dict[str, Any], name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    row = {key: job[key] for key in ("model", "stage", "batch")} | {"system": name}
    failed = [run for run in runs if "error" in run]
    if failed:
        return row | failed[0]
    seconds = [s for run in runs for s in run["seconds"]]
    step = summary(seconds)
    peaks = [run["peak_bytes"] for run in runs]
    return row | {
        "seconds": seconds,
        "step_s": step,
        "samples_per_s": job["batch"] / step["median"],
        "peak_bytes": None if None in peaks else max(peaks),
        "first_loss": runs[0]["loss"],
    }


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Add each row's rate and memory over those of upstream under autocast, None if unknown."""
    base = next((r for r in rows if r["system"] == BASE and "step_s" in r), None)
    for row in rows:
        known = base is not None and "step_s" in row
        row["x_upstream"] = row["samples_per_s"] / base["samples_per_s"] if known else None
        peaks = known and row["peak_bytes"] and base["peak_bytes"]
        row["x_upstream_memory"] = row["peak_bytes"] / base["peak_bytes"] if peaks else None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure models and stages; the JSON, where asked for, is rewritten after each."""
    record, on_cuda = start_record("training", args), args.device.type == "cuda"
    record["protocol"] = {
        "timing": f"{args.rounds} rounds; in each a fresh process for every system in turn, "
        f"{WARMUPS} updates not timed, then {args.steps}",
        "update": "proxy codes, forward, backward, clipping, optimizer, discriminator; data, logs "
        "and averaged weights left out; the generator reads tokens",
        "memory": "most that tensors took in the updates"
        if on_cuda
        else "most that a process ever held (VmHWM)",
        "weights": "random, the same for all systems",
    }
    systems = [
        name
        for name, bf16 in SYSTEMS.items()
        if (bf16 or args.float32)
        and (args.upstream or name.startswith("ours"))
        and (name != COMPILED or on_cuda)
    ]
    common = {"batch": args.batch, "steps": args.steps, "threads": torch.get_num_threads()}
    common |= {"upstream": str(args.upstream or ""), "device": str(args.device)}
    for model in args.models:
        for stage in args.stages:
            rows = measure({"model": model, "stage": stage} | common, systems, args.rounds)
            compare(rows)
            record["cases"] += rows
            save(args.json, record)
    return record


def floor_seconds(case: dict[str, Any], rates: dict[str, float]) -> float | None:
    """Seconds that the matmuls of a row's update take at the matmul rates of its run.

    Those of the forward count three times, as the backward computes two gradients, those of the
    proxy codes once, in float32 (TF32 on CUDA). None for stage 2, whose losses costs.py does not
    count.
    """
    found = preset(case["model"])
    single = "tf32" if "tf32" in rates else "fp32-ieee"
    rate = rates["bf16" if SYSTEMS[case["system"]] else single]
    if case["stage"] == "generator":
        assert found.generator is not None
        return case["batch"] * 3 * generator_cost(found.generator).flops / rate
    if case["stage"] == "stage2":
        return None
    config, costs = found.tokenizer, tokenizer_costs(found.tokenizer)
    trained = sum(costs[part].flops for part in ("encoder", "code_search", "vit_decoder"))
    proxies = pixel_encoder_cost(config.pixel, config.crop_size) + costs["pixel_codebook"]
    return case["batch"] * (3 * trained / rate + proxies.flops / rates[single])


def training_table(record: dict[str, Any]) -> str:
    """Markdown, a line per row."""
    lines = []
    for case in record["cases"]:
        line = {key: case[key] for key in ("model", "stage", "batch", "system")}
        lines.append(line)
        if "error" in case:
            line["s/step (p20-p80)"] = f"failed: {case['error']}"
            continue
        floor = floor_seconds(case, case.get(RATES, record[RATES]))
        line |= {
            "s/step (p20-p80)": spread(case["step_s"]),
            "samples/s": case["samples_per_s"],
            "x upstream": case["x_upstream"],
            "of matmul peak": f"{floor / case['step_s']['median']:.0%}" if floor else "not counted",
            "peak GiB": gib(case["peak_bytes"]),
            "x memory": case["x_upstream_memory"],
            "first loss": case["first_loss"],
        }
    return table(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, refused before any work where they do not fit."""
    p = parser(__doc__, "upstream", *RUN)
    add = p.add_argument
    models = f"{', '.join(RECIPES)}; default: all of them on CUDA, else the first"
    add("--models", nargs="+", choices=RECIPES, metavar="NAME", help=models)
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    add("--batch", **COUNT, metavar="B", help="default: 32 on CUDA, else 8")
    add("--rounds", **COUNT, default=3, metavar="N", help="processes of each system; default: 3")
    steps = "timed updates of each; default: 20 on CUDA, else 2"
    add("--steps", **COUNT, metavar="N", help=steps)
    add("--float32", action="store_true", help="also in float32")
    add("--smoke", action="store_true", help="titok-s-128 at batch 1, one update: does it run?")
    args = p.parse_args(argv)
    if args.smoke:
        args.models, args.batch, args.rounds, args.steps = ["titok-s-128"], 1, 1, 1
    models = list(RECIPES)
    dtypes = ["fp32-ieee", "bf16"], ["tf32", "bf16"]  # whose rates start_record measures
    check(p, args, models=(models[:1], models), batch=(8, 32), steps=(2, 20), dtype=dtypes)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; status 1 when a system failed."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [_JOB]:
        with redirect_stdout(sys.stderr):  # upstream prints
            found = measure_here(json.loads(argv[1]))
        print(json.dumps(found))
        return 0
    record = run(parse(argv))
    print(training_table(record))
    return int(any("error" in case for case in record["cases"]))


if __name__ == "__main__":
    sys.exit(main())
