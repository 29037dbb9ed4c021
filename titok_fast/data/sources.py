"""Sources of training records, which can be read at any index.

The order of a run then depends on its seed and step alone, not on the number of ranks and workers.
Files are parsed as images and numbers; nothing in them is executed. Not torchvision's data sets:
the core does not depend on it, and it reads damaged files without an error.
"""

import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from titok_fast.io.images import _to_rgb, list_images
from titok_fast.io.sample_folder import differences
from titok_fast.settings import require

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
_FASHION_CLASSES = 10
_FASHION_SIDE = 28
# Pillow's other readers include one that starts a program (EPS, through Ghostscript)
_FORMATS = ("JPEG", "PNG", "WEBP")
_MAX_PHRASES = 4


class BadRecord(ValueError):  # noqa: N818 - a record, not an error of the program
    """One record is damaged; the others may be readable."""


class Record(NamedTuple):
    """One training example.

    Attributes:
        values: pixels (H, W, 3) uint8 of an image of any size, or (K,) int64 token ids.
        label: class, 0 or more.
    """

    values: np.ndarray
    label: int


class Source(Protocol):
    """Records 0..len-1."""

    def __len__(self) -> int:
        """Number of records, damaged ones included."""

    def read(self, index: int) -> Record:
        """One record.

        Raises:
            BadRecord: it is damaged.
            OSError: its file cannot be read.
        """

    def name(self, index: int) -> str:
        """Name of a record, for messages."""

    def describe(self) -> dict[str, Any]:
        """What identifies the data, as plain JSON values; independent of the folder."""


def check_same_data(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue a run with other data than it began with, by `describe()` of both.

    Raises:
        ValueError: they differ; the message names what changed.
    """
    phrases = differences(dict(saved), dict(now))
    before, after = saved.get("shards"), now.get("shards")
    # the number of shards says more than the first names
    if isinstance(before, dict) and isinstance(after, dict) and len(before) != len(after):
        phrases.insert(0, f"there were {len(before)} shards, now {len(after)}")
    if phrases:
        more = [f"and {len(phrases) - _MAX_PHRASES} more"] if len(phrases) > _MAX_PHRASES else []
        changed = "; ".join(phrases[:_MAX_PHRASES] + more)
        raise ValueError(
            f"the data are not those this run began with: {changed}. Give it the same files, or "
            "start a new run"
        )


def decode_image(content: bytes) -> np.ndarray:
    """Content of a jpg, png or webp file -> (H, W, 3) uint8, upright, as `images.load_image`.

    Raises:
        BadRecord: empty, truncated, too large, or not such a file.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            return np.asarray(_to_rgb(image))
    except MemoryError:
        raise  # not the file's fault
    except Exception as error:  # damaged files make Pillow raise a dozen types
        reason = f"{type(error).__name__}: {error}" if content else "it is empty"
        raise BadRecord(f"not readable as a jpg, png or webp image: {reason}") from error


class ArraySource:
    """Images of one size in memory.

    Args:
        images: (M, H, W) grey or (M, H, W, 3) uint8; not copied.
        labels: (M,) integers of 0 or more.
        kind: name of the data in `describe`.

    Raises:
        ValueError: other shapes or types, no image, or a negative label.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, kind: str = "array") -> None:
        grey = images.ndim == 3
        if images.dtype != np.uint8 or not (grey or (images.ndim == 4 and images.shape[3] == 3)):
            wanted = "(M, H, W) or (M, H, W, 3) uint8"
            raise ValueError(f"{kind} wants images {wanted}; got {images.shape} {images.dtype}")
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            wanted = f"({len(images)},) integers"
            raise ValueError(f"{kind} wants labels {wanted}; got {labels.shape} {labels.dtype}")
        require(images.size > 0, kind, "at least one image", images.shape)
        require(int(labels.min()) >= 0, kind, "labels of 0 or more", int(labels.min()))
        self.images, self.labels, self.kind = images, labels.astype(np.int64), kind

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Record:
        """One image and its label."""
        image = self.images[index]
        rgb = image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
        return Record(rgb, int(self.labels[index]))

    def name(self, index: int) -> str:
        """Such as `array[7]`."""
        return f"{self.kind}[{index}]"

    def describe(self) -> dict[str, Any]:
        """Number, size and a digest of images and labels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data)
        digest.update(self.labels.astype("<i8").data)
        shape = list(self.images.shape[1:])
        return {"kind": self.kind, "count": len(self), "shape": shape, "sha256": digest.hexdigest()}


def fashion_mnist(split: str, folder: str | Path | None = None) -> ArraySource:
    """Fashion-MNIST from its four idx files, padded to 32 x 32 with two black pixels on each side.

    Args:
        split: "train" (60,000 images) or "eval" (10,000, the files named t10k).
        folder: holds the .gz files; None is where Debian's package puts them.

    Returns:
        Grey images (M, 32, 32), labels 0..9.

    Raises:
        FileNotFoundError: a file is missing; the message says how to get it.
        ValueError: another split, or a damaged file.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"Fashion-MNIST has the splits train and eval; got {split!r}")
    folder = FASHION_MNIST if folder is None else Path(folder)
    stem = "train" if split == "train" else "t10k"
    images = _read_idx(folder / f"{stem}-images-idx3-ubyte.gz", dims=3)
    labels = _read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", dims=1)
    if images.shape[1:] != (_FASHION_SIDE, _FASHION_SIDE) or len(images) != len(labels):
        raise ValueError(
            f"{folder} wants images of {_FASHION_SIDE} x {_FASHION_SIDE} and a label for each; "
            f"got {images.shape} and {len(labels)} labels"
        )
    if labels.size and labels.max() >= _FASHION_CLASSES:
        raise ValueError(f"{folder} wants labels 0..9; got {labels.max()}: get the files again")
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return ArraySource(padded, labels, kind="fashion-mnist")


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """A gzipped idx file of bytes: 0, 0, 8 (uint8), number of dimensions, sizes, values."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}: install Debian's package dataset-fashion-mnist, or name the folder "
            "that holds the four idx .gz files of Fashion-MNIST"
        )
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}; get it again") from error
    start, magic = 4 + 4 * dims, bytes([0, 0, 8, dims])
    if content[:4] != magic or len(content) < start:
        got = content[:4].hex(" ") or "nothing"
        raise ValueError(f"{path} wants an idx file that starts {magic.hex(' ')}; got {got}")
    shape = [int(n) for n in np.frombuffer(content, ">u4", dims, offset=4)]
    count = math.prod(shape)
    if len(content) - start != count:
        got = f"{len(content) - start} bytes"
        raise ValueError(f"{path} wants {count} values, as its header says; got {got}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


class FolderSource:
    """A folder of folders of images: the sub-folders, sorted by name, are classes 0, 1, ...

    Args:
        folder: holds sub-folders with jpg, jpeg, png or webp files at any depth.
        classes: number of classes there may be; None for any.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no sub-folder, too many, or one without images.
    """

    def __init__(self, folder: str | Path, classes: int | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder of images at {folder}; check the path")
        found = [p.name for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
        if not found or (classes is not None and len(found) > classes):
            wanted = "one or more" if classes is None else f"1 to {classes}"
            raise ValueError(
                f"{folder} wants {wanted} sub-folders, one per class; got {len(found)}"
            )
        self._names: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(sorted(found)):
            paths = list_images(self.folder / name)
            self._names += [path.relative_to(self.folder).as_posix() for path in paths]
            labels += [label] * len(paths)
        self._labels, self.num_classes = np.array(labels), len(found)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Record:
        """One image and the class of its folder."""
        content = (self.folder / self._names[index]).read_bytes()
        return Record(decode_image(content), int(self._labels[index]))

    def name(self, index: int) -> str:
        """Path inside the folder."""
        return self._names[index]

    def describe(self) -> dict[str, Any]:
        """Number, classes, and a digest of all names and sizes."""
        digest = hashlib.sha256()
        for name in self._names:
            digest.update(f"{name}\t{(self.folder / name).stat().st_size}\n".encode())
        return {
            "kind": "folder",
            "count": len(self),
            "classes": self.num_classes,
            "names_and_sizes_sha256": digest.hexdigest(),
        }
