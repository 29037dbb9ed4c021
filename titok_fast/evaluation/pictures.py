"""Sets of pictures to measure: in memory, in folders, of data sources, drawn by a pipeline.

Each has a fixed order, for the Inception Score in ten splits depends on it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from titok_fast.data.sources import BadRecord, Source
from titok_fast.distributed import my_share
from titok_fast.io.images import list_images, load_image, to_tensor, to_uint8
from titok_fast.io.sample_folder import MANIFEST
from titok_fast.pipeline import TiTokPipeline
from titok_fast.sampling.unmask import sample_seeds

Batch = tuple[Tensor, Tensor | None]
_LABELLED = re.compile(r"\d+_(\d+)\.png")  # what `titok-fast sample` writes


class Pictures(Protocol):
    """Pictures 0..n-1 of one size, perhaps with their classes."""

    def __len__(self) -> int:
        """Number of pictures."""

    def read(self, part: range) -> Batch:
        """A run of them.

        Args:
            part: ascending indices, step 1. Parts are asked for in ascending order.

        Returns:
            (B, H, W, 3) uint8, and (B,) int64 classes or None, on the CPU.
        """


def batches(pictures: Pictures, batch_size: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """This rank's share, as (index of the first picture, pictures, classes)."""
    share = my_share(len(pictures))
    for first in range(share.start, share.stop, batch_size):
        images, labels = pictures.read(range(first, min(first + batch_size, share.stop)))
        yield first, images, labels


class ArrayPictures:
    """Pictures in memory.

    Args:
        images: (n, H, W, 3) uint8.
        labels: (n,) integers, or None.

    Raises:
        ValueError: other shapes or types.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None) -> None:
        check_pixels("ArrayPictures", images.shape, images.dtype)
        if labels is not None and labels.shape != images.shape[:1]:
            raise ValueError(f"ArrayPictures wants {len(images)} labels; got {labels.shape}")
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def read(self, part: range) -> Batch:
        """See Pictures."""
        cut = slice(part.start, part.stop)
        return as_batch(self.images[cut], None if self.labels is None else self.labels[cut])


class FolderPictures:
    """The picture files of a folder, sorted by name. Classes where `titok_fast` wrote the files.

    Args:
        folder: holds jpg, jpeg, png or webp files, at any depth.
        size: side in pixels to resize and crop to; None takes the pictures as they are, which must
            then all be of one size.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no picture there.
    """

    def __init__(self, folder: str | Path, size: int | None = None) -> None:
        self.folder, self.size = Path(folder), size
        self.paths = list_images(folder)
        self._labels = _folder_labels(self.folder, self.paths)
        self._first = load_image(self.paths[0]).size

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, part: range) -> Batch:
        """See Pictures.

        Raises:
            ValueError: an unreadable picture, or one of another size.
        """
        cut = slice(part.start, part.stop)
        labels = None if self._labels is None else self._labels[cut]
        if self.size is not None:
            images = to_uint8(to_tensor(self.paths[cut], self.size), rounding="round")
            return as_batch(images.numpy(), labels)
        pixels = [np.asarray(self._load(path)) for path in self.paths[cut]]
        return as_batch(np.stack(pixels), labels)

    def _load(self, path: Path) -> Any:
        image = load_image(path)
        if image.size != self._first:
            raise ValueError(f"{path} is {image.size}, the first picture {self._first}: one size")
        return image


class SourcePictures:
    """Records of a training source through the evaluation's resize and crop.

    Args:
        source: of pictures.
        size: side S in pixels.
    """

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def read(self, part: range) -> Batch:
        """See Pictures.

        Raises:
            ValueError: a damaged record. None is skipped: that would be another set.
        """
        images, labels = [], []
        for index in part:
            try:
                record = self.source.read(index)
            except BadRecord as error:
                raise ValueError(f"{self.source.name(index)}: {error}") from error
            images.append(record.values)
            labels.append(record.label)
        pixels = to_uint8(to_tensor(images, self.size), rounding="round")
        return pixels, torch.tensor(labels, dtype=torch.int64)


class DrawnPictures:
    """What a pipeline draws, as `sample_many`: picture i shows class i % classes.

    Args:
        pipe: with a generator.
        count: n.
        seed: of the run.
        settings: fields of SamplingConfig to change.

    Raises:
        ValueError: no generator.
    """

    def __init__(self, pipe: TiTokPipeline, count: int, seed: int = 0, **settings: Any) -> None:
        if pipe.generator is None:
            raise ValueError("drawing wants a generator: this pipeline has none")
        self.pipe, self.count, self.seed, self.settings = pipe, count, seed, settings
        self.classes = pipe.generator.config.condition_num_classes

    def __len__(self) -> int:
        return self.count

    def read(self, part: range) -> Batch:
        """See Pictures."""
        labels = torch.arange(part.start, part.stop) % self.classes
        pixels = self.pipe(
            labels,
            seeds=sample_seeds(self.seed, len(part), first=part.start),
            batch_size=len(part),
            output="tensor",
            **self.settings,
        )
        assert isinstance(pixels, Tensor)
        return pixels, labels


def _folder_labels(folder: Path, paths: list[Path]) -> np.ndarray | None:
    matches = [_LABELLED.fullmatch(path.name) for path in paths]
    if all(matches):
        return np.array([int(match[1]) for match in matches if match])
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return np.array([int(path.stem) for path in paths]) % int(manifest["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # pictures from elsewhere


def check_pixels(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """ValueError unless an array holds pictures (n, H, W, 3) uint8."""
    if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or not shape[0]:
        raise ValueError(f"{name} wants pictures (n, H, W, 3) uint8; got {shape} {dtype}")


def as_batch(images: np.ndarray, labels: np.ndarray | None) -> Batch:
    """Arrays as `Pictures.read` gives them, in new memory."""
    pixels = torch.from_numpy(np.array(images))  # a copy: torch wants memory it may write
    return pixels, None if labels is None else torch.from_numpy(labels.astype(np.int64))
