"""How long paper_trends.py will take: a few updates of each network, a part of each measuring."""

import time
from dataclasses import replace
from typing import Any

import torch
from paper.cells import CLASSES, Cell, recipe
from paper.work import Bench, figures_of, pixels, tokens

from titok_fast.data.sources import ArraySource
from titok_fast.training.loop import FINAL
from titok_fast.training.trainer import Trainer

_UPDATES = 5
_PART = 20  # one in so many pictures is measured
_LEAST = 4  # two in each half that the floor is of


def plan(bench: Bench, cells: list[Cell]) -> list[dict[str, Any]]:
    """Predicted minutes of each cell, timed on networks that are not trained.

    Args:
        bench: with an empty folder, which is filled with those networks.
        cells: each after those it needs.

    Returns:
        Rows of `cell`, `updates`, `s per update` and `minutes`.
    """
    small = _small(bench)
    return [_row(small, bench, cell) for cell in cells]


def _small(bench: Bench) -> Bench:
    S, train, test = bench.settings, bench.train, bench.test
    counts = {name: _part(getattr(S, name)) for name in ("judged", "drawn", "probed")}
    parts = [
        ArraySource(full.images[: _part(len(full))], full.labels[: _part(len(full))])
        for full in (train, test)
    ]
    return Bench(
        replace(S, **counts, repeats=1), bench.work, *parts, bench.network, bench.device
    )  # fmt: skip


def _part(count: int) -> int:
    return max(count // _PART, _LEAST)


def _row(small: Bench, bench: Bench, cell: Cell) -> dict[str, Any]:
    updates, each = 0, None
    if cell.trains():
        made = recipe(cell, bench.settings, bench.work)
        updates, each = made.training.max_train_steps, _time_updates(bench, cell)
    start = time.perf_counter()
    if cell.kind == "generator":
        tokens(small, cell)
    figures_of(small, cell)
    scale = bench.settings.repeats if cell.kind == "speed" else _PART
    seconds = updates * (each or 0.0) + scale * (time.perf_counter() - start)
    return {
        "cell": cell.name,
        "updates": updates,
        "s per update": "-" if each is None else each,
        "minutes": seconds / 60,
    }


def _time_updates(bench: Bench, cell: Cell) -> float:
    """Seconds of an update, the median; leaves the network where later cells look for it."""
    learner = Trainer(recipe(cell, bench.settings, bench.work), bench.ranks)
    B = bench.settings.generator_batch if cell.kind == "generator" else bench.settings.batch
    labels = torch.arange(B) % CLASSES
    batch = {"labels": labels, "images": pixels(bench.train.images[:B])}
    if cell.kind == "generator":
        batch = {"labels": labels, "tokens": torch.arange(B * cell.tokens).view(B, -1) % 256}
    times = []
    for _ in range(1 + _UPDATES):
        start = time.perf_counter()
        learner.gradients(batch)
        learner.apply()
        times.append(time.perf_counter() - start)
    learner.task.export(learner.task.model.state_dict(), bench.work / cell.name / FINAL)
    return sorted(times[1:])[_UPDATES // 2]
