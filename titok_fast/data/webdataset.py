"""WebDataset shards read at any index: tar headers are scanned once, records read by offset.

Only the image and the `cls` of a record are read. Nothing is extracted or unpickled; URLs and pipes
are refused.
"""

import hashlib
import math
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titok_fast.data.sources import BadRecord, Record, decode_image

_SUFFIXES = ("jpg", "png", "jpeg", "webp")  # the first of these that a record has
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_MAX_SHARDS = 1_000_000
_MAX_LABEL_BYTES = 16
_SCANNERS = 8  # threads, which hide the latency of network file systems
_BLOCK = 512


def expand(pattern: str) -> list[Path]:
    """Names of shards: `name-{0000..0252}.tar` counts up, zeros kept; several braces multiply.

    Args:
        pattern: local path with any number of braces, or none.

    Raises:
        ValueError: a URL or pipe, a brace that is no range, a range that runs backwards, or over a
            million names.
    """
    scheme = _SCHEME.match(pattern)
    if scheme:
        raise ValueError(
            f"{pattern}: shards are read from local files, not through {scheme[0]!r}; copy them, "
            "and give their path"
        )
    ranges = [(int(first), int(last), len(first)) for first, last in _RANGE.findall(pattern)]
    for first, last, _ in ranges:
        if first > last:
            raise ValueError(f"{pattern}: the range {first}..{last} runs backwards")
    if math.prod(last - first + 1 for first, last, _ in ranges) > _MAX_SHARDS:
        raise ValueError(f"{pattern} names more than {_MAX_SHARDS} shards")
    if set("{}") & set(_RANGE.sub("", pattern)):
        raise ValueError(f"{pattern}: braces want two numbers, such as {{0000..0252}}")
    names = [pattern]
    for first, last, digits in ranges:
        numbers = [f"{i:0{digits}d}" for i in range(first, last + 1)]
        names = [_RANGE.sub(number, name, count=1) for name in names for number in numbers]
    return [Path(name) for name in names]


class Shard(NamedTuple):
    """What a tar file holds.

    Attributes:
        keys: (n,) bytes, the records' names.
        spans: (n, 4) int64: offset and length of the image, then of the label; -1 if absent.
        size: of the file in bytes.
    """

    keys: np.ndarray
    spans: np.ndarray
    size: int


def index_shard(path: Path) -> Shard:
    """Scan the headers of one shard.

    Raises:
        FileNotFoundError: no such file.
        ValueError: compressed, truncated, damaged, a name twice, or no record at all.
    """
    records: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, _, suffix = name.partition(".")
                suffix = suffix.lower()
                if not member.isreg() or suffix not in (*_SUFFIXES, "cls"):
                    continue
                record = records.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if suffix in record:
                    raise ValueError(f"shard {path} holds {member.name} twice")
                record[suffix] = member.offset_data, member.size
            with open(path, "rb") as file:  # tarfile ignores a missing end mark
                file.seek(tar.offset)
                if file.read(_BLOCK) != bytes(_BLOCK):
                    raise tarfile.ReadError(f"no end mark after {tar.offset} bytes")
    except tarfile.TarError as error:
        raise ValueError(
            f"shard {path} is truncated, damaged or compressed: {error}; get it again, unpacked "
            "if it was compressed, or leave it out of the pattern"
        ) from error
    if not records:
        wanted = f"records with {', '.join(_SUFFIXES)} and cls"
        raise ValueError(f"shard {path} wants {wanted}; got none")
    spans = np.full((len(records), 4), -1, np.int64)
    for row, record in zip(spans, records.values(), strict=True):
        image = next((record[s] for s in _SUFFIXES if s in record), (-1, -1))
        row[:] = *image, *record.get("cls", (-1, -1))
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in records])
    return Shard(keys, spans, path.stat().st_size)


class WebDatasetSource:
    """Local WebDataset shards of images and class numbers.

    Opening reads every header, which takes about 10 s for each hundred thousand records.

    Args:
        pattern: see `expand`.
        classes: number of classes; a record of another class is damaged. None takes any.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a pattern or shard that cannot be used.
    """

    def __init__(self, pattern: str, classes: int | None = None) -> None:
        self.paths, self.classes = expand(pattern), classes
        missing = [path for path in self.paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(self.paths)} shards of {pattern} are missing, "
                f"{missing[0]} first; correct the pattern, or get them"
            )
        with ThreadPoolExecutor(_SCANNERS) as pool:
            self._shards = list(pool.map(index_shard, self.paths))
        self._ends = np.cumsum([len(shard.keys) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> Record:
        """One record.

        Raises:
            BadRecord: image or label is absent or damaged, or its class does not exist.
            OSError: the shard cannot be read.
        """
        shard, row = self._find(index)
        at, size, label_at, label_size = (int(n) for n in self._shards[shard].spans[row])
        if at < 0 or label_at < 0:
            raise BadRecord("it has no image" if at < 0 else "it has no cls")
        if label_size > _MAX_LABEL_BYTES:
            raise BadRecord(f"cls wants a class number; got {label_size} bytes")
        with open(self.paths[shard], "rb") as file:
            file.seek(at)
            content = file.read(size)
            file.seek(label_at)
            text = file.read(label_size).decode("latin-1").strip()
        if not (text.isascii() and text.isdigit()):
            raise BadRecord(f"cls wants a class number; got {text!r}")
        if self.classes is not None and int(text) >= self.classes:
            raise BadRecord(f"wants a class in 0..{self.classes - 1}; got {text}")
        return Record(decode_image(content), int(text))

    def name(self, index: int) -> str:
        """Such as `imagenet-train-0003.tar:00012345`."""
        shard, row = self._find(index)
        key = self._shards[shard].keys[row].decode("utf-8", "replace")
        return f"{self.paths[shard].name}:{key}"

    def describe(self) -> dict[str, Any]:
        """Number of records, name and size of each shard, and a digest of names and offsets."""
        above = os.path.commonpath([path.absolute().parent for path in self.paths])
        names = [path.absolute().relative_to(above).as_posix() for path in self.paths]
        digest = hashlib.sha256()
        for shard in self._shards:
            digest.update(b"\0".join([*shard.keys.tolist(), shard.spans.astype("<i8").tobytes()]))
        return {
            "kind": "webdataset",
            "count": len(self),
            "shards": {n: s.size for n, s in zip(names, self._shards, strict=True)},
            "index_sha256": digest.hexdigest(),
        }

    def _find(self, index: int) -> tuple[int, int]:
        """Shard, and row within it."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are records 0..{len(self) - 1}; got {index}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + len(self._shards[shard].keys)
