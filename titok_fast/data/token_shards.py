"""Token files: compact shards of ids and labels, and the official JSONL.

A shard is a safetensors file with `tokens` (M, K), uint16 or for codebooks above 65536 uint32, and
`labels` (M,) int32. Its one metadata entry holds the settings, its number, the number of shards and
the digest of its content, so a folder of shards needs no index.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from titok_fast.data.sources import Record
from titok_fast.io.files import write_atomic
from titok_fast.io.sample_folder import make_writable

_NAME = re.compile(r"tokens-(\d{5,})\.safetensors")
# one entry: several would be written in any order
_ENTRY = "titok_fast"
_MAX_LABEL = 2**31 - 1


def shard_path(folder: Path, number: int) -> Path:
    """File of shard `number`, counted from 0."""
    return folder / f"tokens-{number:05d}.safetensors"


def shard_numbers(folder: Path) -> list[int]:
    """Numbers of the shards in a folder, ascending."""
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def write_shard(path: Path, tokens: np.ndarray, labels: np.ndarray, about: dict[str, Any]) -> None:
    """Write one shard atomically; equal input gives equal bytes.

    Args:
        path: of `shard_path`, in a folder that exists.
        tokens: (M, K) integers in [0, N); M may be 0.
        labels: (M,) integers from 0 to 2**31 - 1.
        about: plain JSON values, among them `codebook_size` (N), `shard` (its number) and `shards`
            (how many there are).

    Raises:
        ValueError: shapes, or ids or labels out of range.
        OSError: it cannot be written.
    """
    N = about["codebook_size"]
    if tokens.ndim != 2 or labels.shape != tokens.shape[:1]:
        got = f"{tokens.shape} and {labels.shape}"
        raise ValueError(f"{path} wants tokens (M, K) and labels (M,); got {got}")
    _check_ranges(path, tokens, N, labels)
    arrays = {
        "tokens": np.ascontiguousarray(tokens, np.uint16 if N <= 2**16 else np.uint32),
        "labels": np.ascontiguousarray(labels, np.int32),
    }
    record = json.dumps({**about, "sha256": _digest(arrays)}, sort_keys=True)
    write_atomic(path, lambda part: save_file(arrays, part, metadata={_ENTRY: record}))


def read_shard(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Read and check one shard.

    Returns:
        Tokens (M, K) uint16 or uint32, labels (M,) int32, and `about`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole shard, or its content is not what was written.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no token shard at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})[_ENTRY])
            arrays = {name: file.get_tensor(name) for name in ("tokens", "labels")}
        N, sha256 = int(about["codebook_size"]), about.pop("sha256")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged, or no token shard: {reason}") from error
    tokens, labels = arrays["tokens"], arrays["labels"]
    kinds = tokens.dtype in (np.uint16, np.uint32) and labels.dtype == np.int32
    if not kinds or tokens.ndim != 2 or labels.shape != tokens.shape[:1]:
        got = f"{tokens.shape} {tokens.dtype} and {labels.shape} {labels.dtype}"
        raise ValueError(f"{path} wants (M, K) uint16 or uint32 and (M,) int32; got {got}")
    if _digest(arrays) != sha256:
        raise ValueError(f"{path} is damaged: its content has another digest; make it again")
    _check_ranges(path, tokens, N, labels)
    return tokens, labels, about


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in ("tokens", "labels"):
        values = arrays[name]
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.astype(values.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def _check_ranges(path: Path, tokens: np.ndarray, N: int, labels: np.ndarray) -> None:
    for what, values, largest in (("ids", tokens, N - 1), ("labels", labels, _MAX_LABEL)):
        if values.size and not 0 <= int(values.min()) <= int(values.max()) <= largest:
            got = f"{int(values.min())}..{int(values.max())}"
            raise ValueError(f"{path} wants {what} in 0..{largest}; got {got}")


def read_folder(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
    """Tokens, labels and the common settings of a folder's shards, in order, one at a time.

    Raises:
        FileNotFoundError: no such folder, no shard in it, or some are missing.
        ValueError: a damaged shard, or shards of different runs.
    """
    numbers = shard_numbers(folder) if folder.is_dir() else []
    if not numbers:
        raise FileNotFoundError(f"no token shards in {folder}; make them with pretokenize")
    first: dict[str, Any] | None = None
    for number in numbers:
        path = shard_path(folder, number)
        tokens, labels, about = read_shard(path)
        same = {k: v for k, v in about.items() if k not in ("shard", "skipped")}
        first = same if first is None else first
        changed = sorted(k for k in same.keys() | first.keys() if same.get(k) != first.get(k))
        if changed:
            raise ValueError(f"{path} is of another run than the one before it: {changed} differ")
        missing = sorted(set(range(about["shards"])) - set(numbers))
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of {about['shards']} shards, {missing[0]} first: "
                "run pretokenize again in that folder"
            )
        yield tokens, labels, same


class TokenSource:
    """Tokens in memory, from a folder of shards or an official JSONL file.

    Args:
        path: folder, or file ending in .jsonl.
        classes: number of classes there may be; None for any.

    Attributes:
        tokens: (M, K) uint16 or uint32.
        labels: (M,) int32.
        about: settings that all shards share; empty for JSONL.

    Raises:
        FileNotFoundError: nothing there, or shards are missing.
        ValueError: damaged, no rows, rows of several lengths, or a label outside `classes`.
    """

    def __init__(self, path: str | Path, classes: int | None = None) -> None:
        self.path = Path(path)
        read = _read_jsonl if self.path.suffix == ".jsonl" else read_folder
        parts = list(read(self.path))
        if not any(len(labels) for _, labels, _ in parts):
            raise ValueError(f"{path} wants at least one row of tokens; got none")
        self.tokens = np.concatenate([tokens for tokens, _, _ in parts])
        self.labels = np.concatenate([labels for _, labels, _ in parts])
        self.about = parts[0][2]
        if classes is not None and int(self.labels.max()) >= classes:
            raise ValueError(f"{path} wants labels in 0..{classes - 1}; got {self.labels.max()}")

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, index: int) -> Record:
        """One row."""
        return Record(self.tokens[index].astype(np.int64), int(self.labels[index]))

    def name(self, index: int) -> str:
        """Such as `tokens[7]`."""
        return f"{self.path.name}[{index}]"

    def describe(self) -> dict[str, Any]:
        """Shape and digest of ids and labels, and `about`."""
        return {
            "kind": "tokens",
            "count": len(self),
            "tokens_per_image": self.tokens.shape[1],
            "sha256": _digest({"tokens": self.tokens, "labels": self.labels}),
            **self.about,
        }


def _read_jsonl(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
    """Tokens (M, K) uint16 or uint32, labels (M,) int32 and no settings, by 65536 rows."""
    if not path.is_file():
        raise FileNotFoundError(f"no file of tokens at {path}")
    K, number = 0, 0
    with open(path, "rb") as file:
        while lines := list(islice(file, 65536)):
            records = [_parse(path, number + i, line) for i, line in enumerate(lines, 1)]
            K = K or len(records[0][0])
            for i, (ids, _) in enumerate(records, 1):
                if len(ids) != K:
                    raise ValueError(f"{path}, line {number + i}: wants {K} ids; got {len(ids)}")
            number += len(lines)
            tokens = np.array([ids for ids, _ in records], np.uint32)
            small = int(tokens.max()) < 2**16
            labels = np.array([label for _, label in records], np.int32)
            yield tokens.astype(np.uint16) if small else tokens, labels, {}


def _parse(path: Path, number: int, line: bytes) -> tuple[list[int], int]:
    try:
        record = json.loads(line)
        ids, label = record["tokens"], record["class_id"]
    except (KeyError, TypeError, ValueError) as error:
        wanted = 'wants {"class_id": int, "tokens": [int, ...]}; got ' + type(error).__name__
        raise ValueError(f"{path}, line {number}: {wanted}: {error}") from error
    for value in [label, *ids] if isinstance(ids, list) and ids else [None]:
        if type(value) is not int or not 0 <= value <= _MAX_LABEL:  # a bool is an int as well
            wanted = f"a class and one or more ids, whole numbers in 0..{_MAX_LABEL}"
            raise ValueError(f"{path}, line {number}: wants {wanted}; got {str(record)[:80]}")
    return ids, label


def jsonl_to_shards(
    path: str | Path, folder: str | Path, *, codebook_size: int, shard_size: int = 100_000
) -> int:
    """Turn the official JSONL into shards; its ids are all in memory, as in training.

    Args:
        path: .jsonl file of lines {"class_id": int, "tokens": [int, ...]}.
        folder: for the shards; is made, and must not hold shards yet.
        codebook_size: N of the tokenizer that made the ids.
        shard_size: rows of a shard.

    Returns:
        Number of shards.

    Raises:
        FileNotFoundError: no such file.
        FileExistsError: the folder holds shards already.
        ValueError: a line is not such a record, rows of several lengths, or an id of N or more.
        OSError: the folder cannot be written to.
    """
    path, folder = Path(path), Path(folder)
    if shard_size < 1:
        raise ValueError(f"shard_size wants 1 or more; got {shard_size}")
    source = TokenSource(path)  # checks all lines before the first shard is written
    make_writable(folder)
    if shard_numbers(folder):
        raise FileExistsError(f"{folder} holds token shards already: choose another folder")
    starts = range(0, len(source), shard_size)
    for number, start in enumerate(starts):
        rows = slice(start, start + shard_size)
        about = {"codebook_size": codebook_size, "shard": number, "shards": len(starts)}
        write_shard(shard_path(folder, number), source.tokens[rows], source.labels[rows], about)
    return len(starts)


def shards_to_jsonl(folder: str | Path, path: str | Path) -> int:
    """Turn a folder of shards into the official JSONL, a shard in memory at a time, atomically.

    Args:
        folder: of shards.
        path: file to write, in a folder that exists.

    Returns:
        Number of lines.

    Raises:
        FileNotFoundError: no shards, or some are missing.
        ValueError: a damaged shard.
        OSError: it cannot be written; a file already there is untouched.
    """
    lines = 0

    def fill(part: Path) -> None:
        nonlocal lines
        with open(part, "w", encoding="utf-8") as file:
            for tokens, labels, _ in read_folder(Path(folder)):
                for ids, label in zip(tokens.tolist(), labels.tolist(), strict=True):
                    file.write(json.dumps({"class_id": label, "tokens": ids}) + "\n")
                lines += len(tokens)

    write_atomic(path, fill)
    return lines
