"""Sets of images to measure: in memory, in files, of data sources, or drawn by a pipeline.

Each has a fixed order, on which the Inception Score in ten splits depends.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from titok_fast.data.sources import BadRecord, FolderSource, Source, fashion_mnist
from titok_fast.data.webdataset import WebDatasetSource
from titok_fast.distributed import my_share
from titok_fast.io.images import list_images, load_image, to_tensor, to_uint8
from titok_fast.io.npz import Batch, NpzPictures, as_batch, check_pixels
from titok_fast.io.sample_folder import MANIFEST
from titok_fast.pipeline import TiTokPipeline
from titok_fast.sampling.unmask import sample_seeds

LOCATIONS = (
    "an .npz file (arr_0), a folder of images, a folder of sub-folders (one per class), "
    "fashion-mnist:train, fashion-mnist:eval, or webdataset:PATTERN"
)
_LABELLED = re.compile(r"\d+_(\d+)\.png")  # what `titok-fast sample` writes


class Pictures(Protocol):
    """Images 0..n-1 of one size, perhaps with their classes."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, part: range) -> Batch:
        """Consecutive images.

        Args:
            part: ascending indices, step 1. Parts are asked for in ascending order.

        Returns:
            (B, H, W, 3) uint8, and (B,) int64 classes or None, on the CPU.
        """


def batches(
    pictures: Pictures, batch_size: int, progress: Callable[[int], object] | None = None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """This rank's share, as (index of the first image, images, classes).

    After each batch, `progress` is called with its number of images.
    """
    share = my_share(len(pictures))
    for first in range(share.start, share.stop, batch_size):
        images, labels = pictures.read(range(first, min(first + batch_size, share.stop)))
        yield first, images, labels
        if progress is not None:
            progress(len(images))


class ArrayPictures:
    """Images (n, H, W, 3) uint8 in memory, with their classes (n,) if known.

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
        """Rows of the arrays."""
        rows = slice(part.start, part.stop)
        return as_batch(self.images[rows], None if self.labels is None else self.labels[rows])


class FolderPictures:
    """The image files of a folder, sorted by name. Classes where `titok_fast` wrote the files.

    Args:
        folder: holds jpg, jpeg, png or webp files, at any depth.
        size: side in pixels to resize and crop to; None takes the images as they are, which must
            then all be of one size.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image there.
    """

    def __init__(self, folder: str | Path, size: int | None = None) -> None:
        self.size, self.paths = size, list_images(folder)
        self._labels = _folder_labels(Path(folder), self.paths)
        self._first = load_image(self.paths[0]).size

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, part: range) -> Batch:
        """Load, and resize if a size was given.

        Raises:
            ValueError: an unreadable image, or one of another size.
        """
        rows = slice(part.start, part.stop)
        labels = None if self._labels is None else self._labels[rows]
        if self.size is not None:
            images = to_uint8(to_tensor(self.paths[rows], self.size), rounding="round")
            return as_batch(images.numpy(), labels)
        return as_batch(np.stack([self._load(path) for path in self.paths[rows]]), labels)

    def _load(self, path: Path) -> np.ndarray:
        image = load_image(path)
        if image.size != self._first:
            raise ValueError(
                f"{path} is {image.size}, the first image {self._first}: resize them, or say the "
                "size to bring them to"
            )
        return np.asarray(image)


def _folder_labels(folder: Path, paths: list[Path]) -> np.ndarray | None:
    matches = [_LABELLED.fullmatch(path.name) for path in paths]
    if all(matches):
        return np.array([int(match[1]) for match in matches if match])
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return np.array([int(path.stem) for path in paths]) % int(manifest["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # images from elsewhere


class SourcePictures:
    """Images of a training source, resized and center-cropped to a side of `size` pixels."""

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def read(self, part: range) -> Batch:
        """Load and resize.

        Raises:
            ValueError: a damaged record. Skipping it would measure another set.
        """
        records = []
        for index in part:
            try:
                records.append(self.source.read(index))
            except BadRecord as error:
                raise ValueError(f"{self.source.name(index)}: {error}") from error
        images = to_tensor([record.values for record in records], self.size)
        labels = torch.tensor([record.label for record in records], dtype=torch.int64)
        return to_uint8(images, rounding="round"), labels


class DrawnPictures:
    """Images drawn by a pipeline as by `titok-fast sample`: image i shows class i % classes.

    `settings` are fields of SamplingConfig to change.

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
        """Draw images, each by its own seed."""
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


def find_source(location: str) -> tuple[Source, int | None] | None:
    """A source of labelled images, and its number of classes if known.

    None where `location` is not one of the last four `LOCATIONS`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged files.
    """
    kind, _, rest = location.partition(":")
    if kind == "fashion-mnist":
        split, _, folder = rest.partition(":")
        return fashion_mnist(split or "eval", folder or None), 10
    if kind == "webdataset":
        return WebDatasetSource(rest), None
    path = Path(location)
    entries = [p for p in path.iterdir() if not p.name.startswith(".")] if path.is_dir() else []
    if not entries or not all(entry.is_dir() for entry in entries):
        return None
    source = FolderSource(path)
    return source, source.num_classes


def open_pictures(location: str, size: int | None = None) -> Pictures:
    """Images in a fixed order.

    Args:
        location: one of `LOCATIONS`.
        size: side in pixels to resize and crop to. None takes a flat folder's images as they are,
            and is an error where images may be of any size.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no images there, or an archive of another size.
    """
    if location.lower().endswith(".npz"):
        archive = NpzPictures(location)
        if size is not None and archive.shape[1:3] != (size, size):
            got = archive.shape[1:3]
            raise ValueError(f"{location} holds {got} pixels; wanted {size} x {size}")
        return archive
    found = find_source(location)
    if found is None:
        return FolderPictures(location, size)
    if location.startswith("fashion-mnist"):
        size = size or 32
    if size is None:
        raise ValueError(f"{location} holds images of any size: say which with --size")
    return SourcePictures(found[0], size)
