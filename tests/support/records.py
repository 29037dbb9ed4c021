"""What the tests of the training data share: pictures, shards and idx files made on the spot."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from titok_fast.data.sources import ArraySource, Source


def pixels(index: int, height: int = 40, width: int = 48) -> np.ndarray:
    """A smooth picture (H, W, 3) uint8, another for each index."""
    y, x = np.mgrid[:height, :width]
    planes = [128 + 100 * np.sin((x * (c + 1) + y * (index % 7 + 1)) / 9 + index) for c in range(3)]
    return np.stack(planes, axis=2).astype(np.uint8)


def array_source(count: int) -> ArraySource:
    """`count` such pictures, of ten classes in turn."""
    return ArraySource(np.stack([pixels(i) for i in range(count)]), np.arange(count) % 10)


def saved(source: Source) -> dict[str, Any]:
    """What a checkpoint says of a source."""
    return json.loads(json.dumps(source.describe()))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Trap:
    """Part of a hostile file: makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    """File content of a picture."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(
        buffer, format=kind, **({"lossless": True} if kind == "WEBP" else {})
    )
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> Path:
    """A tar file; the fractional time makes PAX write a header of its own for each member."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1234.5
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(
    folder: Path, counts: list[int], damaged: tuple[int, ...] = (), side: tuple[int, int] = (40, 48)
) -> str:
    """Shards of PNG records with label index % 10; returns their pattern."""
    index = 0
    for number, count in enumerate(counts):
        members = []
        for _ in range(count):
            content = encoded(pixels(index, *side))
            members.append((f"{index:08d}.png", content[:50] if index in damaged else content))
            members.append((f"{index:08d}.cls", str(index % 10).encode()))
            index += 1
        write_tar(folder / f"train-{number:03d}.tar", members)
    return f"{folder}/train-{{000..{len(counts) - 1:03d}}}.tar"


def write_idx(path: Path, values: np.ndarray, magic: int = 8) -> None:
    """A gzipped idx file of bytes."""
    sizes = np.array(values.shape, ">u4").tobytes()
    header = bytes([0, 0, magic, values.ndim])
    path.write_bytes(gzip.compress(header + sizes + values.astype(np.uint8).tobytes()))


def write_fashion(folder: Path, train: int = 24, test: int = 12) -> None:
    """Four idx files of few pictures."""
    rng = np.random.default_rng(0)
    for stem, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28))
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", np.arange(count) % 10)
