"""Time of each stage from its FLOPs and bytes: fitted on some points, checked on others.

    python bench/cost_model.py
    python bench/cost_model.py --from bench/results/FILE_scaling.json
    python bench/cost_model.py --floors

A stage costs the sum of its work, each kind at a rate of its own: products and convolutions by
FLOPs, attention by FLOPs and query rows, weights and activations by bytes, the draw by logits, the
rest by layer calls. The rates are the only free numbers, the same for all models, batches and
stages, and come from a fit of relative errors on few points of the same run. The work counted is
that of the published networks (titok_fast/costs.py), so a rate may pass the machine's own where an
exact rewrite saves work. --floors needs no measurement: what an A100 and an H100 cannot go below.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lib.cases import say
from lib.harness import NOT_MEASURED, table
from lib.options import add_single, check, chosen_mode, save, start_record
from lib.points import Point, measure
from lib.stage_work import KINDS, Work, work

from titok_fast import PRESETS
from titok_fast.costs import DEVICES, speed_of_light

STAGES = ("generator", "vit_decoder", "pixel_decoder", "head")
GOAL = 0.15

# few and small on purpose: each stage at two batches, two widths, short and long sequences
FIT = (
    Point("titok-l-32", 1),
    Point("titok-l-32", 4, steps=4),
    Point("titok-b-64", 2, tokens=256, steps=2),
    Point("titok-s-128", 1, steps=2),
)
CHECK = (
    Point("titok-l-32", 2),
    Point("titok-b-64", 1),
    Point("titok-b-64", 4, steps=4),
    Point("titok-b-64", 1, tokens=128, steps=4),
    Point("titok-s-128", 2, steps=4),
    Point("titok-l-64-512", 1),
)


@dataclass(frozen=True)
class Machine:
    """Seconds per unit of each kind of work; 0 where the fit found no cost of its own."""

    seconds_per: dict[str, float]

    def predict(self, stage: Mapping[str, float]) -> float:
        """Seconds of a stage."""
        return sum(amount * self.seconds_per[kind] for kind, amount in stage.items())

    def rates(self) -> dict[str, str]:
        """The constants as rates, to print."""
        shown = {}
        for kind, (unit, scale) in KINDS.items():
            seconds = self.seconds_per[kind]
            shown[kind] = f"{1 / (seconds * scale):,.3g} {unit}" if seconds else "no cost seen"
        return shown


def fit(stages: Sequence[Work], seconds: Sequence[float]) -> Machine:
    """The constants, none negative, that make the squares of the relative errors smallest.

    Args:
        stages: work of each measured stage, as many as there are kinds or more.
        seconds: its time, positive.

    Raises:
        ValueError: fewer stages than constants, or a time that is not positive.
    """
    try:
        from scipy.optimize import nnls
    except ImportError as error:
        raise ImportError("the cost model needs scipy: pip install 'titok_fast[bench]'") from error

    times = np.asarray(seconds, dtype=float)
    if len(stages) < len(KINDS) or len(times) != len(stages) or not (times > 0).all():
        raise ValueError(
            f"fit wants {len(KINDS)} or more stages, each with a positive time; "
            f"got {len(stages)} and {list(seconds)}"
        )
    A = np.array([[stage.get(kind, 0.0) for kind in KINDS] for stage in stages]) / times[:, None]
    scale = A.max(axis=0)
    scale[scale == 0] = 1.0  # a kind that occurs nowhere
    found, _ = nnls(A / scale, np.ones(len(times)))
    return Machine(dict(zip(KINDS, (found / scale).tolist(), strict=True)))


def _point(row: Mapping[str, Any]) -> Point:
    fields = ("model", "batch", "tokens", "steps", "threads", "ranks")
    return Point(**{name: row[name] for name in fields})


def usable(row: Mapping[str, Any]) -> bool:
    """A measured row on the whole machine: other threads or ranks have rates of their own."""
    return "stages_s" in row and row["threads"] is None and row["ranks"] == 1


def fit_rows(rows: Sequence[Mapping[str, Any]], points: Sequence[Point] = FIT) -> Machine:
    """The constants from those rows that are among `points`."""
    stages, seconds = [], []
    for row in rows:
        if not usable(row) or not _is_among(row, points):
            continue
        works = work(_point(row).system, row["batch"], row["dtype"])
        for stage in works:
            stages.append(works[stage])
            seconds.append(row["stages_s"][stage])
    return fit(stages, seconds)


def _is_among(row: Mapping[str, Any], points: Sequence[Point]) -> bool:
    return any(p.row().items() <= dict(row).items() for p in points)


def predicted(machine: Machine, row: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each stage of a row's point; "total" is without the head, a part of the others."""
    works = work(_point(row).system, row["batch"], row["dtype"])
    found = {stage: machine.predict(amounts) for stage, amounts in works.items()}
    return found | {"total": sum(s for stage, s in found.items() if stage != "head")}


def compare(
    machine: Machine, rows: Sequence[Mapping[str, Any]], points: Sequence[Point] = FIT
) -> list[dict[str, Any]]:
    """A line per row and stage: measured, predicted, relative error, and whether it was fitted."""
    lines = []
    for row in filter(usable, rows):
        guess = predicted(machine, row)
        measured = dict(row["stages_s"])
        measured["total"] = sum(s for stage, s in measured.items() if stage != "head")
        for stage, seconds in guess.items():
            lines.append(
                {name: row[name] for name in ("model", "batch", "tokens", "side", "steps")}
                | {
                    "stage": stage,
                    "measured_s": measured[stage],
                    "predicted_s": seconds,
                    "error": seconds / measured[stage] - 1,
                    "fitted": _is_among(row, points),
                }
            )
    return lines


def comparison_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; an error over GOAL on a point that was not fitted is marked."""
    shown = []
    for line in lines:
        over = abs(line["error"]) > GOAL and not line["fitted"]
        percent = f"{line['error']:+.1%}{' (over)' if over else ''}"
        shown.append(dict(line) | {"error": percent, "fitted": "yes" if line["fitted"] else "no"})
    columns = ("model", "batch", "tokens", "steps", "stage", "measured_s", "predicted_s")
    return table(shown, (*columns, "error", "fitted"))


def worst(lines: Sequence[Mapping[str, Any]], *, fitted: bool = False) -> dict[str, float | None]:
    """Largest error of each stage among the points that were not fitted, or those that were."""
    chosen = [line for line in lines if line["fitted"] == fitted]
    return {
        stage: max((abs(line["error"]) for line in chosen if line["stage"] == stage), default=None)
        for stage in (*STAGES, "total")
    }


def floors(batch: int = 128) -> list[dict[str, Any]]:
    """Rows of the least ms per picture on each A100 and H100, per stage, in bfloat16.

    The batch streams the weights once; a stage is bound by its FLOPs or by its bytes.
    """
    rows = []
    for card in (name for name in DEVICES if name.startswith(("a100", "h100"))):
        for name, known in PRESETS.items():
            if known.generator is None:
                continue
            stages = speed_of_light(known, card, "bfloat16", batch)
            ms = {
                s: 1000 * stages[s] / batch for s in stages if s not in ("encoder", "code_search")
            }
            whole = sum(ms.values())
            rows.append({"card": card, "model": name, "batch": batch} | ms
                        | {"total": whole, "images_per_s": 1000 / whole})  # fmt: skip
    return rows


def floors_table(batch: int = 128) -> str:
    """Markdown of `floors`, in ms per picture."""
    stages = ("generator", "vit_decoder", "pixel_codebook", "pixel_decoder", "total")
    return table(floors(batch), ("card", "model", *stages, "images_per_s"))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure FIT and CHECK, fit on the former, compare all."""
    record = start_record("cost-model", args)
    record["protocol"]["warmup"] = "one call of each"
    rows = measure(
        (*FIT, *CHECK),
        device=args.device,
        dtype=args.dtype,
        repeats=args.repeats,
        mode=args.mode,
        memory=False,
    )
    record["cases"] = rows
    record["cost_model"] = analysis(rows, FIT)
    return record


def analysis(rows: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> dict[str, Any]:
    """The cost model of a run, for its record.

    Args:
        rows: the run's cases.
        points: those to fit on.

    Raises:
        ValueError: too few of them were measured.
        ImportError: there is no scipy.
    """
    machine = fit_rows(rows, points)
    lines = compare(machine, rows, points)
    return {
        "seconds_per": machine.seconds_per,
        "rates": machine.rates(),
        "fitted_on": [asdict(p) for p in points],
        "lines": lines,
        "worst_error_of_unfitted": worst(lines),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; status 1 when a point that was not fitted is off by more than GOAL."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--from", dest="source", metavar="FILE", help="a record of scaling.py, in place of a run")
    add("--floors", action="store_true", help="only the floors of A100 and H100")
    add_single(p, "all points")
    args = p.parse_args(argv)
    print("Floors, ms per picture, bfloat16, batch 128:\n\n" + floors_table())
    if args.floors:
        return 0
    if args.source is not None:
        record = json.loads(Path(args.source).read_text())
        if "cost_model" not in record:
            p.error(f"--from {args.source}: this run measured too few points to fit on")
        record["benchmark"] = "cost-model"  # so that its own file does not take the other's name
        fitted_on = [Point(**point) for point in record["cost_model"]["fitted_on"]]
        record["cost_model"] = analysis(record["cases"], fitted_on)
    else:
        check(p, args, "repeats", "threads")
        args.mode = chosen_mode(p, args)
        record = run(args)
    found = record["cost_model"]
    save(args.json, record)
    print("\nRates: " + "; ".join(f"{k} {v}" for k, v in found["rates"].items()))
    print("\n" + comparison_table(found["lines"]))
    errors = found["worst_error_of_unfitted"]
    shown = ", ".join(f"{k} {NOT_MEASURED if v is None else f'{v:.1%}'}" for k, v in errors.items())
    say(f"largest error of points that were not fitted: {shown}")
    return int(any(v is not None and v > GOAL for v in errors.values()))


if __name__ == "__main__":
    sys.exit(main())
