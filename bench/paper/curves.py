"""Set our curves beside the paper's, and count the pairs of points in the paper's order."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from paper import published
from paper.experiments import MIDDLE, TRAININGS, Experiment, Settings, by_schedule, generator

from titok_fast.sampling_config import SCHEDULES

Figures = Mapping[str, Any]
_MOSTLY = 0.8  # share of pairs; chance is a half
# our name of each metric: a distance in other features than Inception's is no FID
_HERE = {"rFID": "distance", "gFID": "distance", "probe %": "top-1 %", "samples/s": "samples/s"}


def compare(ours: Sequence[float], paper: Sequence[float], noise: float = 0.0) -> dict[str, Any]:
    """Count the pairs of points in the paper's order, and judge the curve.

    Differences of ours up to `noise` are not significant: `untold`. `rank_correlation` is
    Spearman's, None where one series is constant. `verdict`: "agrees" (every pair alike), "mostly
    agrees" (80 % and more), "not told apart" (that only without the untold), or "does not agree".
    """
    pairs = alike = untold = 0
    for i, j in combinations(range(len(ours)), 2):
        theirs, own = paper[j] - paper[i], ours[j] - ours[i]
        if theirs == 0:
            continue
        pairs += 1
        told = abs(own) > noise
        untold += not told
        alike += told and (own > 0) == (theirs > 0)
    if alike == pairs:
        verdict = "agrees"
    elif alike >= _MOSTLY * pairs:
        verdict = "mostly agrees"
    elif untold and alike >= _MOSTLY * (pairs - untold):
        verdict = "not told apart"
    else:
        verdict = "does not agree"
    return {
        "pairs": pairs,
        "alike": alike,
        "untold": untold,
        "rank_correlation": _spearman(ours, paper),
        "verdict": verdict,
    }


def _spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    from scipy.stats import spearmanr

    return None if 1 in (len(set(a)), len(set(b))) else float(spearmanr(a, b).statistic)


def comparisons(figures: Mapping[str, Figures], settings: Settings) -> list[dict[str, Any]]:
    """Every curve whose experiments are in `figures`, with the paper's and `compare`'s result."""
    K, sizes = settings.tokens, tuple(name for name, _ in settings.sizes)
    paper_K = tuple(published.PAPER_TOKENS[k] for k in K)
    found: list[dict[str, Any]] = []

    def add(group: str, line: str, metric: str, x: Any, there: Any, paper: Any, ours: Any) -> None:
        """Add a curve if it is whole; `ours` has the values of all seeds for each point."""
        values = [[v for v in seeds if v is not None] for seeds in ours]
        if [len(v) for v in values] != [len(seeds) for seeds in ours]:
            return
        means = [sum(v) / len(v) for v in values]
        noise = max(max(v) - min(v) for v in values)
        curve: dict[str, Any] = {"group": group, "line": line, "metric": metric}
        curve |= {"metric_here": _HERE[metric], "x": x, "paper_x": there, "noise": noise}
        curve |= {"ours": means, "paper": paper}
        found.append(curve | compare(means, paper, noise))

    def value(e: Experiment) -> float | None:
        its = figures.get(e.name)
        if its is None:
            return None
        return float(100 * its["probe_top1"] if e.kind == "probe" else its["fid"])

    for group, metric, kind in (
        ("reconstruction-tokens", "rFID", "tokenizer"),
        ("generation-tokens", "gFID", "generator"),
        ("probe-tokens", "probe %", "probe"),
    ):
        of_group = ("B",) if kind == "generator" else sizes
        ours = {
            (size, k): [
                value(generator(k, settings) if kind == "generator" else Experiment(kind, size, k))
            ]
            for size in of_group
            for k in K
        }
        for size in of_group:
            theirs = [published.table_4(metric, size, k) for k in K]
            add(group, size, metric, K, paper_K, theirs, [ours[size, k] for k in K])
        for k in K if len(of_group) > 1 else ():
            theirs = [published.table_4(metric, size, k) for size in sizes]
            add(group, f"{k} tokens", metric, sizes, sizes, theirs, [ours[s, k] for s in sizes])

    theirs = [published.TRAINING_RFID[variant] for variant in TRAININGS]
    trained = [[value(Experiment("training", "B", MIDDLE, variant))] for variant in TRAININGS]
    add("proxy-codes", "B", "rFID", TRAININGS, TRAININGS, theirs, trained)

    theirs = [published.SCHEDULES_GFID[schedule] for schedule in SCHEDULES]
    drawn = [[value(e) for e in by_schedule(schedule, settings)] for schedule in SCHEDULES]
    add("schedules", "B", "gFID", SCHEDULES, SCHEDULES, theirs, drawn)

    for line, rates in published.SAMPLES_PER_S.items():
        measured = figures.get("speed", {}).get(f"{line}_per_s", {})
        speeds = [[measured[str(k)]["median"] if measured else None] for k in K]
        add("speed", line, "samples/s", K, paper_K, [rates[k] for k in paper_K], speeds)
    return found
