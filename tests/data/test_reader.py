"""The order of a run, the two ways to read its records, and damaged ones."""

import logging
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.batches import SMALL, Slow, assert_equal, labelled, loader, steps
from support.records import write_shards

from titok_fast.data.reader import BadRecords, Order
from titok_fast.data.sources import ArraySource, Source
from titok_fast.data.webdataset import WebDatasetSource


def test_orders_are_fair() -> None:
    firsts = [int(Order(10, 1, seed, shuffle=True).of_epoch(3)[0]) for seed in range(2000)]
    counts = np.bincount(firsts, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # 9 degrees of freedom, 0.1 %
    assert sorted(Order(10, 1, 5, shuffle=True).of_epoch(0)) == list(range(10))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("grey", [True, False])
@pytest.mark.parametrize("side", [36, 32])
def test_the_fast_path_is_the_slow_one(
    monkeypatch: pytest.MonkeyPatch, train: bool, grey: bool, side: int
) -> None:
    fast = labelled(20, side)
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


def test_damaged_records_are_replaced_by_the_next_in_the_order() -> None:
    sound = labelled(50)
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
