"""Files of token ids: what `titok-fast tokenize` writes and `titok-fast detokenize` reads.

`.npz` holds arrays `ids` (n, K) and `files` (n,) and the number `codebook_size`; `.json` holds an
object with the same three keys. Neither format can execute anything when read.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titok_fast.io.files import write_atomic

SUFFIXES = (".npz", ".json")


@dataclass(frozen=True)
class TokenFile:
    """Contents of a file of ids."""

    ids: np.ndarray  # (n, K) int64
    files: list[str]  # n names of the images they came from
    codebook_size: int  # N of the tokenizer that made them


def check_suffix(path: Path) -> None:
    """Raise ValueError unless the name ends in .npz or .json."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"a file of ids wants a name ending in .npz or .json; got {path}")


def write_ids(
    path: str | Path, ids: np.ndarray, files: Sequence[str], *, codebook_size: int
) -> None:
    """Write (n, K) integer ids and n names atomically, as .npz or .json, in a folder that exists.

    Raises:
        ValueError: another suffix, or not one name per row.
    """
    path = Path(path)
    check_suffix(path)
    if ids.ndim != 2 or len(ids) != len(files):
        raise ValueError(f"write_ids wants ids (n, K) and n names; got {ids.shape}, {len(files)}")
    if path.suffix.lower() == ".npz":
        record: Any = {"ids": ids, "files": np.array(files, np.str_)}
        record["codebook_size"] = np.int64(codebook_size)
        write_atomic(path, lambda part: np.savez_compressed(part, **record))
        return
    content = {"codebook_size": codebook_size, "files": list(files), "ids": ids.tolist()}
    write_atomic(path, json.dumps(content).encode())


def read_ids(path: str | Path) -> TokenFile:
    """Read a file of `write_ids`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, a damaged file, missing keys, or ids that are not (n, K)
            integers from 0 to codebook_size - 1 with one name per row.
    """
    path = Path(path)
    check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of ids at {path}; check the path")
    try:
        record = _read_npz(path) if path.suffix.lower() == ".npz" else _read_json(path)
        ids = np.asarray(record["ids"])
        files = [str(name) for name in record["files"]]
        size = int(record["codebook_size"])
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        wanted = "wants ids, files and codebook_size, as `titok-fast tokenize` writes them"
        raise ValueError(f"{path} {wanted}: {type(error).__name__}: {error}") from error
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or len(ids) != len(files):
        got = f"ids {ids.shape} {ids.dtype} and {len(files)} names"
        raise ValueError(f"{path} wants integer ids (n, K) and n file names; got {got}")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        got = f"{int(ids.min())}..{int(ids.max())}"
        raise ValueError(f"{path} wants ids in 0..{size - 1}, its codebook; got {got}")
    return TokenFile(ids.astype(np.int64), files, size)


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in ("ids", "files", "codebook_size")}


def _read_json(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise TypeError(f"the top level is a {type(record).__name__}")
    return record
