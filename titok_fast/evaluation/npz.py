"""ADM's `.npz` files: pictures as `arr_0`, statistics as `mu` and `sigma`. Never unpickled."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from titok_fast.evaluation.pictures import Batch, as_batch, check_pixels
from titok_fast.evaluation.statistics import Gaussian
from titok_fast.io.files import write_atomic

ADM_NETWORK = "inception"  # what statistics are of where the file does not say


class NpzPictures:
    """`arr_0` of an ADM archive, (n, H, W, 3) uint8, read as it is asked for.

    Classes are `arr_1` where the archive has one, or follow from the record that
    `titok_fast.cli.sample` leaves in the archive's comment.

    Args:
        path: .npz file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, no such array in it, or an array of another type.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        archive = open_npz(self.path)
        try:
            self._member = archive.open("arr_0.npy")
            shape, fortran, dtype = _read_header(self._member)
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} wants pictures as arr_0, as ADM's files: {error}") from error
        check_pixels(str(path), shape, dtype)
        if fortran:
            raise ValueError(f"{path}: arr_0 is in Fortran order; save it in C order")
        self.shape, self._start = shape, self._member.tell()
        self._labels = _archive_labels(archive, shape[0])

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, part: range) -> Batch:
        """See Pictures.

        Raises:
            ValueError: the file is shorter than its header says, or damaged.
        """
        one = int(np.prod(self.shape[1:]))
        try:
            self._member.seek(self._start + part.start * one)
            content = self._member.read(len(part) * one)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error
        if len(content) != len(part) * one:
            raise ValueError(f"{self.path} is truncated in picture {len(content) // one}")
        images = np.frombuffer(content, np.uint8).reshape(len(part), *self.shape[1:])
        labels = self._labels
        return as_batch(images, None if labels is None else labels[part.start : part.stop])


def has_array(path: str | Path, name: str) -> bool:
    """Whether a .npz file holds an array of that name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no archive.
    """
    with open_npz(Path(path)) as archive:
        return f"{name}.npy" in archive.namelist()


def read_statistics(path: str | Path) -> tuple[Gaussian, str]:
    """`mu` and `sigma` of a file, and the name of the network they are of.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, no statistics in it, or of shapes that do not fit.
    """
    with open_npz(Path(path)) as archive:
        names = archive.namelist()
        try:
            mean, covariance = (_read_array(archive, name) for name in ("mu", "sigma"))
            network = (
                str(_read_array(archive, "network")) if "network.npy" in names else ADM_NETWORK
            )
            count = int(_read_array(archive, "count")) if "count.npy" in names else 0
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} does not hold readable statistics: {error}") from error
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        got = f"{mean.shape} and {covariance.shape}"
        raise ValueError(f"{path} wants mu (d,) and sigma (d, d); got {got}")
    tensors = [torch.from_numpy(x.astype(np.float64)) for x in (mean, covariance)]
    return Gaussian(tensors[0], tensors[1], count), network


def write_statistics(path: str | Path, statistics: Gaussian, network: str) -> None:
    """Write `mu` and `sigma` as ADM's files have them, with the network's name, atomically.

    Args:
        path: name ending in .npz, in a folder that exists.
        statistics: of the features.
        network: name of the network they are of.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise ValueError(f"statistics want a file name ending in .npz; got {path}")
    write_atomic(
        path,
        lambda part: np.savez(
            part,
            mu=statistics.mean.numpy(),
            sigma=statistics.covariance.numpy(),
            network=np.array(network),
            count=np.int64(statistics.count),
        ),
    )


def open_npz(path: Path) -> zipfile.ZipFile:
    """A .npz file as the zip it is: arrays in it are read without pickle.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no archive.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; check the path")
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged or no .npz file: {error}") from error


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _read_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0
    return (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(member)


def _archive_labels(archive: zipfile.ZipFile, count: int) -> np.ndarray | None:
    if "arr_1.npy" in archive.namelist():
        labels = _read_array(archive, "arr_1")
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise ValueError(f"{archive.filename}: arr_1 wants ({count},) integer classes")
        return labels
    try:
        return np.arange(count) % int(json.loads(archive.comment)["classes"])
    except (ValueError, KeyError, TypeError):
        return None  # another program's comment, or none
