"""ADM's `.npz` archives of images: `arr_0` (n, H, W, 3) uint8, read and written in parts.

Nothing in an archive is unpickled.
"""

import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titok_fast.io.files import write_atomic

Batch = tuple[Tensor, Tensor | None]


def check_pixels(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """ValueError unless an array holds images (n, H, W, 3) uint8."""
    if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or not shape[0]:
        raise ValueError(f"{name} wants images (n, H, W, 3) uint8; got {shape} {dtype}")


def as_batch(images: np.ndarray, labels: np.ndarray | None) -> Batch:
    """Arrays as (B, H, W, 3) uint8 images and (B,) int64 classes, in new memory."""
    pixels = torch.from_numpy(np.array(images))  # a copy: torch wants memory it may write
    return pixels, None if labels is None else torch.from_numpy(labels.astype(np.int64))


class NpzPictures:
    """Images of a .npz archive, read on demand.

    Classes are `arr_1` where the archive has one, or follow from the comment of `write_archive`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, no such array in it, or an array of another type.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        archive = open_npz(self.path)
        try:
            self._member = archive.open("arr_0.npy")
            version = np.lib.format.read_magic(self._member)
            read = np.lib.format.read_array_header_1_0
            read = read if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(self._member)
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} wants images as arr_0, as ADM's files: {error}") from error
        check_pixels(str(path), shape, dtype)
        if fortran:
            raise ValueError(f"{path}: arr_0 is in Fortran order; save it in C order")
        self.shape, self._start = shape, self._member.tell()
        self._labels = _archive_labels(archive, shape[0])

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, part: range) -> Batch:
        """Images and classes of a run of indices, as `as_batch`.

        Raises:
            ValueError: the file is shorter than its header says, or damaged.
        """
        size = int(np.prod(self.shape[1:]))
        try:
            self._member.seek(self._start + part.start * size)
            content = self._member.read(len(part) * size)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error
        if len(content) != len(part) * size:
            raise ValueError(f"{self.path} is truncated in image {len(content) // size}")
        images = np.frombuffer(content, np.uint8).reshape(len(part), *self.shape[1:])
        labels = self._labels
        return as_batch(images, None if labels is None else labels[part.start : part.stop])


def _archive_labels(archive: zipfile.ZipFile, count: int) -> np.ndarray | None:
    if "arr_1.npy" in archive.namelist():
        labels = read_array(archive, "arr_1")
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise ValueError(f"{archive.filename}: arr_1 wants ({count},) integer classes")
        return labels
    try:
        return np.arange(count) % int(json.loads(archive.comment)["classes"])
    except (ValueError, KeyError, TypeError):
        return None  # another program's comment, or none


def open_npz(path: str | Path) -> zipfile.ZipFile:
    """Open a .npz file as a zip archive, for `read_array`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no archive.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}; check the path")
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged or no .npz file: {error}") from error


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of an open archive.

    Raises:
        KeyError: no array of that name.
        ValueError, EOFError, zipfile.BadZipFile: damaged, or objects that want unpickling.
    """
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def archive_exists(path: Path, manifest: dict[str, Any]) -> bool:
    """Whether `write_archive` has written an archive with this manifest already.

    Raises:
        FileExistsError: another file is there.
    """
    if not path.exists():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            found = json.loads(archive.comment)
    except (OSError, ValueError, zipfile.BadZipFile):
        found = None
    if found != manifest:
        raise FileExistsError(f"{path} exists and is not of this run: choose another name")
    return True


def write_archive(
    path: Path,
    images: Iterable[np.ndarray],
    size: int,
    manifest: dict[str, Any],
    progress: Callable[[int], object],
) -> None:
    """Write an archive, an image in memory at a time, atomically.

    The manifest is the archive's comment: it tells a later run that its work is done.

    Args:
        path: name ending in .npz, in a folder that exists.
        images: arrays (S, S, 3) uint8 in index order, as many as the manifest's `num`.
        size: S.
        manifest: plain JSON values, under 65536 bytes in all.
        progress: called with the number of images written since the last call.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (manifest["num"], size, size, 3)}

    def fill(part: Path) -> None:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            archive.comment = json.dumps(manifest).encode()
            # a ZipInfo carries no clock time, so equal images give equal bytes
            entry = zipfile.ZipInfo("arr_0.npy")
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for image in images:
                    member.write(np.ascontiguousarray(image).data)
                    progress(1)

    write_atomic(path, fill)
