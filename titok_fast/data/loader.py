"""Batches whose content depends on source, seed and step alone.

Position p = step * batch_size + j of a run is in epoch p // usable; the record there is entry
p % usable of that epoch's order. Ranks take contiguous parts of each global batch, so a run can
stop at any step, and go on with any number of ranks and workers.
"""

import signal
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from titok_fast.data.config import DataConfig
from titok_fast.data.crops import Crop
from titok_fast.data.reader import MAX_TRIES, BadRecords, Order, RawBatch, Reader
from titok_fast.data.sources import FolderSource, Source, fashion_mnist
from titok_fast.data.token_shards import TokenSource
from titok_fast.data.webdataset import WebDatasetSource
from titok_fast.io.images import to_tensor
from titok_fast.settings import require

_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # launchers send them to all processes of a run
_GRACE_S = 30  # seconds after which torchrun and Slurm send SIGKILL


def open_source(data: DataConfig, split: str, classes: int | None = None) -> Source:
    """The records of one split.

    Args:
        data: kind and paths.
        split: "train" or "eval".
        classes: number of classes of the model; None takes any label.

    Raises:
        FileNotFoundError: files are missing; the message names them.
        ValueError: another split, no path, damaged files, or labels outside `classes`.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"data have the splits train and eval; got {split!r}")
    path = data.train if split == "train" else data.eval
    if data.kind == "fashion-mnist":
        source = fashion_mnist(split, path or None)
        if classes is not None and int(source.labels.max()) >= classes:
            raise ValueError(f"Fashion-MNIST has 10 classes, the model {classes}")
        return source
    if not path:
        raise ValueError(f"data of kind {data.kind} want a path for {split}; got none")
    if data.kind == "webdataset":
        return WebDatasetSource(path, classes)
    return FolderSource(path, classes) if data.kind == "folder" else TokenSource(path, classes)


class Batches:
    """One rank's share of the global batches of a run, from a step on.

    Iterating yields dictionaries of CPU tensors: `labels` (b,) int64 with `images` (b, 3, S, S)
    float32 in [0, 1], or with `tokens` (b, K) int64. Training never ends, with b = batch_size /
    world. Evaluation yields every record once, in the order of the source, cropped at the center,
    without damaged records; the last batch is smaller, and some ranks may get none of it.

    Args:
        source: of the records.
        data: crop, workers, and the share of records that may be damaged.
        batch_size: of all ranks together.
        seed: of the run, any integer.
        train: training or evaluation, see above.
        rank: 0..world-1.
        world: ranks; divides batch_size.
        start_step: the step whose batch comes first.

    Attributes:
        steps: batches of one epoch.
        bad: of the records this rank has read: `count`, `names` (with reasons), `seen`.

    Raises:
        ValueError: batch_size, rank and world do not fit each other or the source, or the crop is
            larger than the image.
    """

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        *,
        batch_size: int,
        seed: int,
        train: bool,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
    ) -> None:
        fits = batch_size >= 1 and world >= 1 and batch_size % world == 0
        require(fits, "batch_size", f"a multiple of the {world} ranks, above 0", batch_size)
        wanted = f"rank in 0..{world - 1}, start_step of 0 or more"
        require(0 <= rank < world and start_step >= 0, "Batches", wanted, (rank, start_step))
        S, edge = data.crop_size, data.resize_shorter_edge or data.crop_size
        settings = (edge, data.random_crop, data.random_flip) if train else (S, False, False)
        order = Order(len(source), batch_size, seed, shuffle=train)
        self._reader = Reader(source, Crop(S, *settings), order, seed, replace=train)
        self._workers, self._train, self._batch_size = data.workers, train, batch_size
        self._rank, self._world, self._start_step = rank, world, start_step
        self.steps = -(-order.usable // batch_size)
        self.bad = BadRecords(data.max_bad_share, len(source))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for raw in self._raw_batches():
            self.bad.add(raw.seen, raw.bad)
            if self._train and len(raw.labels) < self._batch_size // self._world:
                name, reason = raw.bad[-1]
                raise ValueError(f"{MAX_TRIES} damaged records in a row, up to {name}: {reason}")
            if len(raw.labels):
                yield self._to_tensors(raw)

    def _raw_batches(self) -> Iterator[RawBatch]:
        if not self._workers or self._reader.in_memory:
            return map(self._reader.__getitems__, self._spans())
        loader: Any = DataLoader(
            self._reader,  # type: ignore[arg-type]  # of a data set only __getitems__ is called
            batch_sampler=self._spans(),  # type: ignore[arg-type]  # a range for a list
            num_workers=self._workers,
            collate_fn=_identity,
            worker_init_fn=_survive_signals,
            generator=torch.Generator(),  # else it draws from the global generator
        )
        # block signals until workers install their handlers; an earlier one would kill them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
        try:
            return iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _spans(self) -> Iterator[range]:
        """This rank's positions, step by step."""
        usable = self._reader.order.usable
        for step in count(self._start_step) if self._train else range(self._start_step, self.steps):
            first = step * self._batch_size
            size = self._batch_size if self._train else min(self._batch_size, usable - first)
            start, stop = (first + size * r // self._world for r in (self._rank, self._rank + 1))
            if start < stop:
                yield range(start, stop)

    def _to_tensors(self, raw: RawBatch) -> dict[str, Tensor]:
        labels, values = torch.from_numpy(raw.labels), torch.from_numpy(raw.values)
        if values.ndim == 2:
            return {"tokens": values, "labels": labels}
        if values.ndim == 3:  # grey: a third of the divisions
            grey = values[:, None].to(torch.float32).div_(255)
            return {"images": grey.expand(-1, 3, -1, -1).contiguous(), "labels": labels}
        images = to_tensor(values.permute(0, 3, 1, 2), self._reader.crop.size)
        return {"images": images, "labels": labels}


def _identity(batch: Any) -> Any:
    return batch  # `__getitems__` returns a whole one


def _survive_signals(worker: int) -> None:
    """Keep a worker reading after a signal to the whole process group.

    The parent saves at the end of its step; workers end when it does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)


def _end_later(number: int, frame: object) -> None:
    """Let the next SIGTERM end the worker, as the parent sends to a stuck one, or an alarm."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(_GRACE_S)
