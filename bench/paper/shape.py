"""Is the paper's order found again? Curves of both, and what rank statistics say about them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from paper import published as paper
from paper.cells import MIDDLE, TRAININGS, Cell, Settings

from titok_fast.config import SCHEDULES

Figures = Mapping[str, Any]
_MOSTLY = 0.8  # share of pairs; chance is a half
# what stands for the paper's metrics here: a distance in other features than Inception's is no FID
_HERE = {"rFID": "distance", "gFID": "distance", "probe %": "top-1 %", "samples/s": "samples/s"}


@dataclass(frozen=True)
class Curve:
    """A series of the paper's and ours at the matching places.

    Attributes:
        group: that shows it.
        line: which one of the group's.
        metric: of the paper's.
        better: "low", "high".
        x: places, ours.
        paper_x: places, the paper's.
        ours, paper: values.
        noise: differences of ours up to this say nothing; 0 where it is not known.
    """

    group: str
    line: str
    metric: str
    better: str
    x: tuple[int | str, ...]
    paper_x: tuple[int | str, ...]
    ours: tuple[float, ...]
    paper: tuple[float, ...]
    noise: float = 0.0


def compare(curve: Curve) -> dict[str, Any]:
    """Pairs of places in the paper's order, Spearman's rank correlation, and a verdict.

    Returns:
        `pairs` that the paper orders, `alike` of them in its order, `untold` closer than the noise,
        `rank_correlation` (None where one series is constant) and `verdict`: "agrees" (every pair
        alike), "mostly agrees" (80 % and more), "not told apart" (that only without the untold),
        or "does not agree".
    """
    pairs = alike = untold = 0
    for i, j in combinations(range(len(curve.x)), 2):
        theirs = curve.paper[j] - curve.paper[i]
        if theirs == 0:
            continue
        own = curve.ours[j] - curve.ours[i]
        pairs += 1
        told = abs(own) > curve.noise
        untold += not told
        alike += told and (own > 0) == (theirs > 0)
    if alike == pairs:
        verdict = "agrees"
    elif alike >= _MOSTLY * pairs:
        verdict = "mostly agrees"
    else:
        rest = pairs - untold
        told_alike = alike >= _MOSTLY * rest
        verdict = "not told apart" if untold and told_alike else "does not agree"
    return {
        "pairs": pairs,
        "alike": alike,
        "untold": untold,
        "rank_correlation": _spearman(curve.ours, curve.paper),
        "verdict": verdict,
    }


def _spearman(a: tuple[float, ...], b: tuple[float, ...]) -> float | None:
    from scipy.stats import spearmanr

    if len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return float(spearmanr(a, b).statistic)


def comparisons(figures: Mapping[str, Figures], settings: Settings) -> list[dict[str, Any]]:
    """Every curve whose cells are measured, `metric_here`, and what `compare` says.

    Args:
        figures: of cells, by their names.
        settings: of the run.
    """
    curves = [
        *_token_curves(figures, settings),
        *_proxy_codes(figures),
        *_schedules(figures, settings),
        *_speeds(figures, settings),
    ]
    return [
        asdict(curve) | {"metric_here": _HERE[curve.metric]} | compare(curve) for curve in curves
    ]


def _token_curves(figures: Mapping[str, Figures], settings: Settings) -> list[Curve]:
    sizes = tuple(name for name, _ in settings.sizes)
    fid: Callable[[Figures], float] = lambda f: f["fid"]  # noqa: E731
    top1: Callable[[Figures], float] = lambda f: 100 * f["probe_top1"]  # noqa: E731
    seed, curves = settings.seeds[0], []
    for group, metric, better, kind, its, value in (
        ("reconstruction-tokens", "rFID", "low", "tokenizer", sizes, fid),
        ("generation-tokens", "gFID", "low", "generator", ("B",), fid),
        ("probe-tokens", "probe %", "high", "probe", sizes, top1),
    ):
        found = {}
        for size in its:
            for K in settings.tokens:
                cell = Cell(kind, size, K)
                if kind == "generator":
                    cell = Cell(kind, size, K, "arccos", seed)
                if cell.name in figures:
                    found[size, K] = value(figures[cell.name])
        for size in its:
            curves += _along(found, group, metric, better, settings.tokens, size)
        for K in settings.tokens if len(its) > 1 else ():
            curves += _across(found, group, metric, better, its, K)
    return curves


_Found = Mapping[tuple[str, int], float]


def _along(
    found: _Found, group: str, metric: str, better: str, tokens: tuple[int, ...], size: str
) -> list[Curve]:
    """The curve of one size over tokens, if it is whole."""
    if any((size, K) not in found for K in tokens):
        return []
    ours = tuple(found[size, K] for K in tokens)
    theirs = tuple(paper.table_4(metric, size, K) for K in tokens)
    places = tuple(paper.PAPER_TOKENS[K] for K in tokens)
    return [Curve(group, size, metric, better, tokens, places, ours, theirs)]


def _across(
    found: _Found, group: str, metric: str, better: str, sizes: tuple[str, ...], K: int
) -> list[Curve]:
    """The curve of one number of tokens over sizes, if it is whole."""
    if any((size, K) not in found for size in sizes):
        return []
    ours = tuple(found[size, K] for size in sizes)
    theirs = tuple(paper.table_4(metric, size, K) for size in sizes)
    return [Curve(group, f"{K} tokens", metric, better, sizes, sizes, ours, theirs)]


def _proxy_codes(figures: Mapping[str, Figures]) -> list[Curve]:
    cells = [Cell("training", "B", MIDDLE, variant) for variant in TRAININGS]
    if any(cell.name not in figures for cell in cells):
        return []
    ours = tuple(figures[cell.name]["fid"] for cell in cells)
    theirs = tuple(paper.TRAINING_RFID[variant] for variant in TRAININGS)
    return [Curve("proxy-codes", "B", "rFID", "low", TRAININGS, TRAININGS, ours, theirs)]


def _schedules(figures: Mapping[str, Figures], settings: Settings) -> list[Curve]:
    """Means over the seeds; the noise is the largest difference between two seeds of one."""
    values: dict[str, list[float]] = {}
    for schedule in SCHEDULES:
        cells = [Cell("generator", "B", MIDDLE, schedule, seed) for seed in settings.seeds]
        if any(cell.name not in figures for cell in cells):
            return []
        values[schedule] = [figures[cell.name]["fid"] for cell in cells]
    ours = tuple(sum(v) / len(v) for v in values.values())
    noise = max(max(v) - min(v) for v in values.values())
    theirs = tuple(paper.SCHEDULES_GFID[schedule] for schedule in SCHEDULES)
    return [Curve("schedules", "B", "gFID", "low", SCHEDULES, SCHEDULES, ours, theirs, noise)]


def _speeds(figures: Mapping[str, Figures], settings: Settings) -> list[Curve]:
    measured, K = figures.get(Cell("speed").name), settings.tokens
    if measured is None:
        return []
    places = tuple(paper.PAPER_TOKENS[k] for k in K)
    curves = []
    for line, known in (("training", paper.TRAINING_PER_S), ("sampling", paper.SAMPLING_PER_S)):
        ours = tuple(measured[f"{line}_per_s"][str(k)]["median"] for k in K)
        theirs = tuple(known[place] for place in places)
        curves.append(Curve("speed", line, "samples/s", "high", K, places, ours, theirs))
    return curves
