"""Batches as a function of source, seed and step, whatever ranks, workers and damaged records."""

import json
import logging
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.records import encoded, pixels, write_fashion, write_shards, write_tar
from torch import Tensor

from titok_fast.data import loader as data_module
from titok_fast.data.config import DataConfig
from titok_fast.data.loader import Batches, open_source
from titok_fast.data.reader import BadRecords, Order
from titok_fast.data.sources import ArraySource, BadRecord, FolderSource, Record, Source
from titok_fast.data.token_shards import TokenSource, shard_path, write_shard
from titok_fast.data.webdataset import WebDatasetSource

SMALL = DataConfig(kind="webdataset", crop_size=32, resize_shorter_edge=36)
Batch = dict[str, Tensor]


def array_source(count: int = 50, side: int = 36) -> ArraySource:
    """Pictures in memory, each with a label of its own."""
    return ArraySource(np.stack([pixels(i, side, side) for i in range(count)]), np.arange(count))


class Slow:
    """An array source that Batches does not know: read record by record."""

    def __init__(self, source: ArraySource, damaged: tuple[int, ...] = ()) -> None:
        self.source, self.damaged = source, damaged

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Record:
        if index in self.damaged:
            raise BadRecord("scratched")
        return self.source.read(index)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def describe(self) -> dict[str, Any]:
        return self.source.describe()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """30 records in 3 shards, of which 4, 17 and 18 are damaged."""
    folder = tmp_path_factory.mktemp("shards")
    return WebDatasetSource(write_shards(folder, [11, 8, 11], damaged=(4, 17, 18)))


def loader(source: Source, batch_size: int = 8, **data: Any) -> Batches:
    """Endless batches of a training run with some settings of the data."""
    return Batches(source, replace(SMALL, **data), batch_size=batch_size, seed=1, train=True)


def steps(source: Source, count: int, data: DataConfig = SMALL, **options: Any) -> list[Batch]:
    arguments = {"batch_size": 8, "seed": 1, "train": True} | options
    return list(islice(Batches(source, replace(data, max_bad_share=0.5), **arguments), count))


def assert_equal(got: list[Batch], wanted: list[Batch]) -> None:
    assert len(got) == len(wanted) > 0
    for a, b in zip(got, wanted, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def joined(parts: list[list[Batch]]) -> list[Batch]:
    """The global batches that the ranks' shares make up."""
    return [
        {key: torch.cat([share[key] for share in shares]) for key in shares[0]}
        for shares in zip(*parts, strict=True)
    ]


def test_batches_have_the_promised_form(shards: Source) -> None:
    for source in (shards, array_source(), token_source()):
        (batch,) = steps(source, 1)
        assert batch["labels"].dtype == torch.int64
        assert batch["labels"].shape == (8,)
        if "tokens" in batch:
            assert batch["tokens"].dtype == torch.int64
            assert batch["tokens"].shape == (8, 4)
            continue
        images = batch["images"]
        assert images.shape == (8, 3, 32, 32)
        assert images.dtype == torch.float32
        assert images.is_contiguous()
        assert images.min() >= 0
        assert 0.5 < images.max() <= 1


def token_source(count: int = 50) -> TokenSource:
    source = object.__new__(TokenSource)
    rng = np.random.default_rng(0)
    source.tokens = rng.integers(0, 64, (count, 4)).astype(np.uint16)
    source.labels, source.about = np.arange(count, dtype=np.int32), {}
    return source


def test_every_epoch_takes_each_record_at_most_once_in_another_order() -> None:
    source = array_source(50)  # 6 batches of 8; two records are left out, others each time
    labels = [batch["labels"].tolist() for batch in steps(source, 24)]
    epochs = [list(chain(*labels[i : i + 6])) for i in range(0, 24, 6)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({tuple(set(range(50)) - set(epoch)) for epoch in epochs}) > 1
    other = [batch["labels"].tolist() for batch in steps(source, 24, seed=2)]
    assert other != labels
    assert loader(source).steps == 6


def test_orders_are_fair() -> None:
    firsts = [int(Order(10, 1, seed, shuffle=True).of_epoch(3)[0]) for seed in range(2000)]
    counts = np.bincount(firsts, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # 9 degrees of freedom, 0.1 %
    assert sorted(Order(10, 1, 5, shuffle=True).of_epoch(0)) == list(range(10))


@pytest.fixture(params=["shards", "array", "tokens"])
def source(request: pytest.FixtureRequest, shards: Source) -> Source:
    return {"shards": shards, "array": array_source(), "tokens": token_source()}[request.param]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_out_the_same_batches(source: Source, world: int) -> None:
    parts = [steps(source, 12, rank=rank, world=world) for rank in range(world)]
    assert all(len(batch["labels"]) == 8 // world for part in parts for batch in part)
    assert_equal(joined(parts), steps(source, 12))


@pytest.mark.parametrize("start", [1, 3, 5, 10])
def test_resuming_gives_the_batches_of_the_uninterrupted_run(source: Source, start: int) -> None:
    assert_equal(steps(source, 12 - start, start_step=start), steps(source, 12)[start:])


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


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("grey", [True, False])
@pytest.mark.parametrize("side", [36, 32])
def test_the_fast_path_is_the_slow_one(
    monkeypatch: pytest.MonkeyPatch, train: bool, grey: bool, side: int
) -> None:
    fast = array_source(20, side)
    if grey:
        fast = ArraySource(np.ascontiguousarray(fast.images[..., 1]), fast.labels)
    data = replace(SMALL, resize_shorter_edge=side)
    wanted = steps(Slow(fast), 3, data, train=train)
    if side == 32 or train:  # else evaluation resizes 36 to 32

        def refuse(*args: Any) -> None:
            raise AssertionError("one picture at a time")

        monkeypatch.setattr(Image, "fromarray", refuse)
        monkeypatch.setattr(ArraySource, "read", refuse)
    assert_equal(steps(fast, 3, data, train=train), wanted)


def test_flips_and_crops_follow_the_position_not_the_record() -> None:
    same = ArraySource(np.stack([pixels(0, 36, 36)] * 16), np.zeros(16, int))
    images = torch.cat([batch["images"] for batch in steps(same, 8)])
    assert len({image.numpy().tobytes() for image in images}) > 30  # of 5 * 5 * 2
    still = replace(SMALL, random_crop=False, random_flip=False)
    assert len({i.numpy().tobytes() for i in steps(same, 1, still)[0]["images"]}) == 1


def test_damaged_records_are_replaced_by_the_next_in_the_order() -> None:
    sound = array_source(50)
    order = Order(50, 8, 1, shuffle=True).of_epoch(0)
    for damaged in ((order[5],), tuple(order[5:8]), tuple(order[14:17])):
        batches = loader(Slow(sound, tuple(map(int, damaged))), max_bad_share=0.5)
        # each damaged record is replaced by the next sound one
        later = [[i for i in order[position:] if i not in damaged] for position in range(16)]
        wanted = [int(sound_ones[0]) for sound_ones in later]
        got = [batch["labels"].tolist() for batch in islice(batches, 2)]
        assert list(chain(*got)) == wanted
        assert set(batches.bad.names) == {f"array[{index}]" for index in damaged}


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_records_are_counted_and_named_once(
    shards: Source, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    batches = loader(shards, 10, max_bad_share=0.5, workers=workers)
    with caplog.at_level(logging.WARNING):
        list(islice(batches, 9))  # three epochs
    damaged = {"000.tar:00000004", "001.tar:00000017", "001.tar:00000018"}
    assert batches.bad.names.keys() == {f"train-{name}" for name in damaged}
    assert batches.bad.count >= 9
    assert batches.bad.seen == 90 + batches.bad.count
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert all("not readable as a jpg, png or webp image" in text for text in messages)


def test_too_many_damaged_records_end_the_run(shards: Source) -> None:
    message = r"damaged, more than max_bad_share 0\.05: train-00\d\.tar:000000\d+ \(not readable"
    for share, wanted in ((0.05, message), (0.0, "1 of 11 records read are damaged")):
        with pytest.raises(ValueError, match=wanted):
            list(islice(loader(shards, 10, max_bad_share=share), 9))


def test_share_of_damaged_records() -> None:
    bad = BadRecords(0.01, records=1_000_000)
    for i in range(10):  # an early cluster: 10 of the first 1000 are allowed
        bad.add(10, [(f"x{i}", "torn")])
    with pytest.raises(ValueError, match=r"11 of 101 records read .*: x0 \(torn\); x1 \(torn\)"):
        bad.add(1, [("x10", "torn")])
    bad = BadRecords(0.01, records=1_000_000)
    bad.add(100_000, [("again", "torn")] * 1000)
    assert (bad.count, len(bad.names)) == (1000, 1)
    with pytest.raises(ValueError, match="1001 of 100001"):
        bad.add(1, [("again", "torn")])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_is_gone_ends_the_run(tmp_path: Path, workers: int) -> None:
    source = WebDatasetSource(write_shards(tmp_path, [40]))
    batches = iter(loader(source, max_bad_share=1.0, workers=workers))
    next(batches)
    (tmp_path / "train-000.tar").unlink()
    message = r"16 damaged records in a row, up to train-000\.tar:0000.*No such"
    with pytest.raises(ValueError, match=message):
        list(islice(batches, 20))


def test_evaluation_takes_every_record_once_in_order() -> None:
    source = array_source(21)
    batches = Batches(source, SMALL, batch_size=8, seed=9, train=False)
    found = list(batches)
    assert [len(batch["labels"]) for batch in found] == [8, 8, 5]
    assert torch.cat([batch["labels"] for batch in found]).tolist() == list(range(21))
    assert batches.steps == 3
    assert_equal(found, steps(source, 9, train=False, seed=3))  # nothing is drawn
    few = Batches(source, SMALL, batch_size=64, seed=9, train=False)  # less than one batch
    assert [len(batch["labels"]) for batch in few] == [21]


def test_evaluation_is_shared_out_and_leaves_gaps(shards: Source) -> None:
    sound = [i for i in range(30) if i not in (4, 17, 18)]
    found: list[int] = []
    for rank in range(4):
        for batch in steps(shards, 99, train=False, batch_size=4, rank=rank, world=4):
            assert len(batch["labels"]) == 1
            found += batch["labels"].tolist()
    assert sorted(found) == sorted(i % 10 for i in sound)
    whole = torch.cat([batch["labels"] for batch in steps(shards, 99, train=False)])
    assert whole.tolist() == [i % 10 for i in sound]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size wants a multiple of the 1 ranks, above 0; got 0"),
        ({"batch_size": 6, "world": 4}, "multiple of the 4 ranks, above 0; got 6"),
        ({"rank": 2, "world": 2}, "wants rank in 0..1"),
        ({"start_step": -1}, "start_step of 0 or more; got (0, -1)"),
        ({"batch_size": 64}, "50 records fill no batch of 64"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Batches(array_source(), SMALL, **{"batch_size": 8, "seed": 1, "train": True} | options)  # type: ignore[arg-type]


def test_open_source_by_kind(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    fashion = DataConfig(kind="fashion-mnist", train=str(tmp_path), eval=str(tmp_path))
    assert (len(open_source(fashion, "train")), len(open_source(fashion, "eval"))) == (24, 12)
    pattern = write_shards(tmp_path, [2])
    tar = DataConfig(kind="webdataset", train=pattern)
    assert isinstance(open_source(tar, "train"), WebDatasetSource)
    (tmp_path / "folder" / "a").mkdir(parents=True)
    (tmp_path / "folder" / "a" / "0.png").write_bytes(encoded(pixels(0)))
    folder = DataConfig(kind="folder", eval=str(tmp_path / "folder"))
    assert isinstance(open_source(folder, "eval"), FolderSource)
    (tmp_path / "tokens").mkdir()
    about = {"codebook_size": 9, "shard": 0, "shards": 1}
    path = shard_path(tmp_path / "tokens", 0)
    write_shard(path, np.ones((3, 4), int), np.array([0, 1, 7]), about)
    (tmp_path / "x.jsonl").write_text(json.dumps({"class_id": 7, "tokens": [1, 2]}))
    for path in ("tokens", "x.jsonl"):
        tokens = DataConfig(kind="tokens", train=str(tmp_path / path))
        assert isinstance(open_source(tokens, "train"), TokenSource)
        with pytest.raises(ValueError, match=r"wants labels in 0\.\.6; got 7"):
            open_source(tokens, "train", classes=7)

    with pytest.raises(ValueError, match="splits train and eval; got 'val'"):
        open_source(tar, "val")
    with pytest.raises(ValueError, match="kind webdataset want a path for eval; got none"):
        open_source(tar, "eval")
    with pytest.raises(ValueError, match="Fashion-MNIST has 10 classes, the model 9"):
        open_source(fashion, "train", classes=9)
    limited = open_source(tar, "train", classes=1)
    with pytest.raises(BadRecord, match=r"a class in 0\.\.0; got 1"):
        limited.read(1)


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


def test_a_record_without_a_class_in_a_run(tmp_path: Path) -> None:
    members = [(f"{i}.png", encoded(pixels(i))) for i in range(20)]
    members += [(f"{i}.cls", b"1") for i in range(19)]
    source = WebDatasetSource(str(write_tar(tmp_path / "x.tar", members)))
    batches = loader(source, 10, max_bad_share=0.1)
    assert [len(batch["labels"]) for batch in islice(batches, 2)] == [10, 10]
    assert batches.bad.names == {"x.tar:19": "it has no cls"}
