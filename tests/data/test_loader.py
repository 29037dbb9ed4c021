"""Batches as a function of source, seed and step, whatever the ranks; what a split opens."""

import json
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from support.batches import SMALL, Batch, assert_equal, labelled, loader, steps, token_source
from support.records import encoded, pixels, write_fashion, write_shards

from titok_fast.data.config import DataConfig
from titok_fast.data.loader import Batches, open_source
from titok_fast.data.sources import ArraySource, BadRecord, FolderSource, Source
from titok_fast.data.token_shards import TokenSource, shard_path, write_shard
from titok_fast.data.webdataset import WebDatasetSource


def joined(parts: list[list[Batch]]) -> list[Batch]:
    """The global batches that the ranks' shares make up."""
    return [
        {key: torch.cat([share[key] for share in shares]) for key in shares[0]}
        for shares in zip(*parts, strict=True)
    ]


def test_batches_have_the_promised_form(shards: Source) -> None:
    for source in (shards, labelled(), token_source()):
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


def test_every_epoch_takes_each_record_at_most_once_in_another_order() -> None:
    source = labelled(50)  # 6 batches of 8; two records are left out, others each time
    labels = [batch["labels"].tolist() for batch in steps(source, 24)]
    epochs = [list(chain(*labels[i : i + 6])) for i in range(0, 24, 6)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({tuple(set(range(50)) - set(epoch)) for epoch in epochs}) > 1
    other = [batch["labels"].tolist() for batch in steps(source, 24, seed=2)]
    assert other != labels
    assert loader(source).steps == 6


@pytest.fixture(params=["shards", "array", "tokens"])
def source(request: pytest.FixtureRequest, shards: Source) -> Source:
    return {"shards": shards, "array": labelled(), "tokens": token_source()}[request.param]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_out_the_same_batches(source: Source, world: int) -> None:
    parts = [steps(source, 12, rank=rank, world=world) for rank in range(world)]
    assert all(len(batch["labels"]) == 8 // world for part in parts for batch in part)
    assert_equal(joined(parts), steps(source, 12))


@pytest.mark.parametrize("start", [1, 3, 5, 10])
def test_resuming_gives_the_batches_of_the_uninterrupted_run(source: Source, start: int) -> None:
    assert_equal(steps(source, 12 - start, start_step=start), steps(source, 12)[start:])


def test_flips_and_crops_follow_the_position_not_the_record() -> None:
    same = ArraySource(np.stack([pixels(0, 36, 36)] * 16), np.zeros(16, int))
    images = torch.cat([batch["images"] for batch in steps(same, 8)])
    assert len({image.numpy().tobytes() for image in images}) > 30  # of 5 * 5 * 2
    still = replace(SMALL, random_crop=False, random_flip=False)
    assert len({i.numpy().tobytes() for i in steps(same, 1, still)[0]["images"]}) == 1


def test_evaluation_takes_every_record_once_in_order() -> None:
    source = labelled(21)
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
        Batches(labelled(), SMALL, **{"batch_size": 8, "seed": 1, "train": True} | options)  # type: ignore[arg-type]


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
