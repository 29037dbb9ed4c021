"""Reading the records of a step: their order in the run, and damaged ones."""

import logging
from typing import NamedTuple

import numpy as np

from titok_fast.data.crops import Crop, crop_draws, philox
from titok_fast.data.sources import ArraySource, BadRecord, Source
from titok_fast.data.token_shards import TokenSource

_log = logging.getLogger(__name__)
MAX_TRIES = 16  # after as many damaged records in a row, the disk is at fault
_EARLY = 1000  # with fewer records read, their share is no estimate


class Order:
    """The record of each position of the run.

    With `shuffle`, each epoch has another order and drops the records that fill no global batch;
    else the order is that of the source.

    Raises:
        ValueError: no batch can be filled.
    """

    def __init__(self, records: int, batch_size: int, seed: int, shuffle: bool) -> None:
        self.records, self.seed, self.shuffle = records, seed, shuffle
        self.usable = records // batch_size * batch_size if shuffle else records
        if not self.usable:
            raise ValueError(
                f"{records} records fill no batch of {batch_size}: make the batch smaller"
            )
        self._epoch, self._order = -1, np.arange(records)

    def index(self, position: int, ahead: int = 0) -> int:
        """Record of a position, or the one `ahead` further in the order of its epoch."""
        epoch, start = divmod(position, self.usable)
        return int(self.of_epoch(epoch)[(start + ahead) % self.records])

    def indices(self, positions: range) -> np.ndarray:
        """(B,) records of consecutive positions inside one epoch."""
        epoch, start = divmod(positions.start, self.usable)
        return self.of_epoch(epoch)[start : start + len(positions)]

    def of_epoch(self, epoch: int) -> np.ndarray:
        """(M,) all records in the order of an epoch."""
        if self.shuffle and epoch != self._epoch:
            # sorts raw words, because numpy's shuffle may change between versions
            words = philox(self.seed, 1 + epoch).random_raw(self.records)
            self._epoch, self._order = epoch, np.argsort(words, kind="stable")
        return self._order


class BadRecords:
    """Counts damaged records, names each once in the log, and stops the run above a share.

    Args:
        max_share: of the records read, or of the first 1000 (fewer in a smaller source).
        records: number of records in the source.
    """

    def __init__(self, max_share: float, records: int) -> None:
        self.max_share, self._least = max_share, min(_EARLY, records)
        self.seen, self.count = 0, 0
        self.names: dict[str, str] = {}  # to reasons

    def add(self, seen: int, bad: list[tuple[str, str]]) -> None:
        """Count `seen` more records, among them `bad` with names and reasons.

        Raises:
            ValueError: too many are damaged.
        """
        self.seen += seen
        self.count += len(bad)
        for name, reason in bad:
            if name not in self.names:
                _log.warning("left out the record %s: %s", name, reason)
                self.names[name] = reason
        if self.count > self.max_share * max(self.seen, self._least):
            worst = [f"{name} ({reason})" for name, reason in list(self.names.items())[:3]]
            raise ValueError(
                f"{self.count} of {self.seen} records read are damaged, more than max_bad_share "
                f"{self.max_share:g}: {'; '.join(worst)}. Mend the data, or raise max_bad_share"
            )


class RawBatch(NamedTuple):
    """The records that one rank reads for one step.

    Arrays: workers hand tensors over through /dev/shm, which is small in containers.

    Attributes:
        values: (b, S, S, 3) uint8 pixels, (b, S, S) if all are grey, or (b, K) int64 tokens.
        labels: (b,) int64.
        seen: records read.
        bad: name and reason of the damaged among them.
    """

    values: np.ndarray
    labels: np.ndarray
    seen: int
    bad: list[tuple[str, str]]


class Reader:
    """Reads the records of positions; a DataLoader calls it in its workers.

    With `replace`, the next record of the order replaces a damaged one; else it is left out.
    """

    def __init__(self, source: Source, crop: Crop, order: Order, seed: int, replace: bool) -> None:
        self.source, self.crop, self.order = source, crop, order
        self.seed, self.replace = seed, replace

    @property
    def in_memory(self) -> bool:
        """Whether reading a batch takes a few array operations, which need no worker."""
        if isinstance(self.source, ArraySource):
            return min(self.source.images.shape[1:3]) == self.crop.shorter_edge
        return isinstance(self.source, TokenSource)

    def __getitems__(self, positions: range) -> RawBatch:
        """Read consecutive positions of one epoch.

        The batch ends early after 16 damaged records in a row. It does not raise: in a worker, the
        traceback would keep the loader's processes alive.
        """
        if not self.in_memory:
            return self._one_by_one(positions)
        indices, source = self.order.indices(positions), self.source
        if isinstance(source, TokenSource):
            values = source.tokens[indices].astype(np.int64)
        else:
            assert isinstance(source, ArraySource)
            draws = crop_draws(self.seed, positions.start, len(positions))
            values = self.crop.many(source.images, indices, draws)
        labels = source.labels[indices].astype(np.int64)
        return RawBatch(values, labels, len(indices), [])

    def _one_by_one(self, positions: range) -> RawBatch:
        draws = crop_draws(self.seed, positions.start, len(positions))
        S, bad = self.crop.size, list[tuple[str, str]]()
        pixels, labels = np.empty((len(positions), S, S, 3), np.uint8), list[int]()
        for position, row in zip(positions, draws, strict=True):
            for ahead in range(MAX_TRIES if self.replace else 1):
                index = self.order.index(position, ahead)
                try:
                    record = self.source.read(index)
                    pixels[len(labels)] = self.crop.one(record.values, row)
                except (BadRecord, OSError) as error:
                    bad.append((self.source.name(index), str(error)))
                    continue
                labels.append(record.label)
                break
            else:
                if self.replace:
                    break
        kept, seen = len(labels), len(labels) + len(bad)
        return RawBatch(pixels[:kept], np.array(labels, np.int64), seen, bad)
