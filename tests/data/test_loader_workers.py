"""Workers that load batches: they change nothing, and survive what the parent survives."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from support.batches import SMALL, Batch, assert_equal, loader, steps
from support.records import write_shards

from titok_fast.data import loader as data_module
from titok_fast.data.sources import Source
from titok_fast.data.webdataset import WebDatasetSource


def test_workers_change_nothing(shards: Source) -> None:
    wanted = steps(shards, 9)
    for workers in (1, 2):
        assert_equal(steps(shards, 9, replace(SMALL, workers=workers)), wanted)
    evaluated = steps(shards, 9, train=False)
    assert_equal(steps(shards, 9, replace(SMALL, workers=2), train=False), evaluated)
    late = steps(shards, 2, replace(SMALL, workers=2), rank=1, world=2, start_step=7)
    assert torch.equal(late[0]["images"], wanted[7]["images"][4:])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_left_alone(shards: Source, workers: int) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1]
    steps(shards, 3, replace(SMALL, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # type: ignore[index]


Running = tuple[Iterator[Batch], list[int]]


@pytest.fixture
def running(tmp_path: Path) -> Running:
    """An endless run, one batch in, and its two workers."""
    source = WebDatasetSource(write_shards(tmp_path, [20]))
    before = set(multiprocessing.active_children())
    batches = iter(loader(source, 4, workers=2))
    next(batches)
    return batches, [p.pid or 0 for p in set(multiprocessing.active_children()) - before]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_leaves_the_workers_at_work(
    running: Running, number: int
) -> None:
    batches, workers = running
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, number)
    assert len(list(islice(batches, 20))) == 20
    assert {p.pid for p in multiprocessing.active_children()} >= set(workers)


def test_a_signal_to_workers_that_still_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = data_module._survive_signals

    def slowly(worker: int) -> None:
        time.sleep(1)
        ready(worker)

    monkeypatch.setattr(data_module, "_survive_signals", slowly)
    source = WebDatasetSource(write_shards(tmp_path, [20]))
    before = set(multiprocessing.active_children())
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    parts = loader(source, 4, workers=2)._raw_batches()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == held
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for process in workers:
        os.kill(process.pid or 0, signal.SIGTERM)
    assert len(list(islice(parts, 8))) == 8
    assert all(process.is_alive() for process in workers)


@pytest.mark.parametrize("numbers", [[signal.SIGTERM] * 2, [signal.SIGKILL]])
def test_a_killed_worker_ends_the_run(running: Running, numbers: list[int]) -> None:
    batches, workers = running

    def go_on() -> None:
        for number in numbers:
            os.kill(workers[0], number)
            list(islice(batches, 20))
        list(islice(batches, 2000))

    with pytest.raises(RuntimeError, match=r"DataLoader worker .*(killed|exited)"):
        go_on()
