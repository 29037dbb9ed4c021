"""What the tests of batches share: sources that are read fast and slowly, and their first steps."""

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from support.records import pixels
from torch import Tensor

from titok_fast.data.config import DataConfig
from titok_fast.data.loader import Batches
from titok_fast.data.sources import ArraySource, BadRecord, Record, Source
from titok_fast.data.token_shards import TokenSource

SMALL = DataConfig(kind="webdataset", crop_size=32, resize_shorter_edge=36)
Batch = dict[str, Tensor]


def labelled(count: int = 50, side: int = 36) -> ArraySource:
    """Pictures in memory, each with a label of its own."""
    return ArraySource(np.stack([pixels(i, side, side) for i in range(count)]), np.arange(count))


class Slow:
    """An array source that Batches does not know: read record by record."""

    def __init__(self, source: ArraySource, damaged: tuple[int, ...] = ()) -> None:
        self.source, self.damaged = source, damaged
        self.name, self.describe = source.name, source.describe

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Record:
        """One image and its label, unless it is damaged."""
        if index in self.damaged:
            raise BadRecord("scratched")
        return self.source.read(index)


def token_source(count: int = 50) -> TokenSource:
    """Rows of ids, each with a label of its own."""
    source = object.__new__(TokenSource)
    rng = np.random.default_rng(0)
    source.tokens = rng.integers(0, 64, (count, 4)).astype(np.uint16)
    source.labels, source.about = np.arange(count, dtype=np.int32), {}
    return source


def loader(source: Source, batch_size: int = 8, **data: Any) -> Batches:
    """Endless batches of a training run with some settings of the data."""
    return Batches(source, replace(SMALL, **data), batch_size=batch_size, seed=1, train=True)


def steps(source: Source, count: int, data: DataConfig = SMALL, **options: Any) -> list[Batch]:
    """The first batches of a run, in which half of the records may be damaged."""
    arguments = {"batch_size": 8, "seed": 1, "train": True} | options
    return list(islice(Batches(source, replace(data, max_bad_share=0.5), **arguments), count))


def assert_equal(got: list[Batch], wanted: list[Batch]) -> None:
    """Assert equal batches, to the last bit."""
    assert len(got) == len(wanted) > 0
    for a, b in zip(got, wanted, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
