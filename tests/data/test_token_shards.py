"""Token shards, and the official JSONL."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.processes import python
from support.records import contents

from titok_fast.data.sources import check_same_data
from titok_fast.data.token_shards import (
    TokenSource,
    jsonl_to_shards,
    read_shard,
    shard_numbers,
    shard_path,
    shards_to_jsonl,
    write_shard,
)

K, N = 8, 64


def ids(rows: int, K: int = K, N: int = N) -> np.ndarray:
    return np.random.default_rng(0).integers(0, N, (rows, K))


def about(number: int = 0, shards: int = 1, N: int = N, **more: Any) -> dict[str, Any]:
    return {"codebook_size": N, "shard": number, "shards": shards, **more}


@pytest.mark.parametrize(
    ("N", "kind"), [(64, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32), (2**30, np.uint32)]
)
def test_shards_are_compact_and_come_back(tmp_path: Path, N: int, kind: type) -> None:
    tokens, labels = ids(7, N=N), np.array([0, 1, 2, 3, 4, 5, 2**31 - 1])
    tokens[0, 0] = N - 1
    write_shard(tmp_path / "x.safetensors", tokens, labels, about(N=N, extra=["a", 1]))
    stored = load_file(tmp_path / "x.safetensors")  # any reader of the format gets them
    assert (stored["tokens"].dtype, stored["labels"].dtype) == (kind, np.int32)
    got, got_labels, said = read_shard(tmp_path / "x.safetensors")
    assert np.array_equal(got, tokens)
    assert np.array_equal(got_labels, labels)
    assert said == about(N=N, extra=["a", 1])


@pytest.mark.parametrize(
    ("tokens", "labels", "message"),
    [
        (ids(3), np.zeros(2, int), "wants tokens (M, K) and labels (M,); got (3, 8) and (2,)"),
        (ids(3)[0], np.zeros(8, int), "got (8,) and (8,)"),
        (ids(3) + N, np.zeros(3, int), "wants ids in 0..63; got "),
        (ids(3) - N, np.zeros(3, int), "wants ids in 0..63; got -"),
        (ids(3), np.array([0, -1, 2]), "wants labels in 0..2147483647; got -1..2"),
        (ids(3), np.array([0, 2**31, 2]), "got 0..2147483648"),
    ],
)
def test_shards_that_are_not_written(
    tmp_path: Path, tokens: np.ndarray, labels: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write_shard(tmp_path / "x.safetensors", tokens, labels, about())
    assert not list(tmp_path.iterdir())


def test_equal_shards_are_equal_files_in_every_process(tmp_path: Path) -> None:
    code = f"""
import numpy as np
from pathlib import Path
from titok_fast.data.token_shards import write_shard
for i in range(3):
    about = {{"codebook_size": 64, "shard": 0, "shards": 1, "views": ["a", "b"], "dtype": "x"}}
    tokens, labels = np.ones((5, 8), int), np.ones(5, int)
    write_shard(Path({str(tmp_path)!r}) / f"{{i}}-HASH", tokens, labels, about)
"""
    for seed in ("1", "2"):
        done = python("-c", code.replace("HASH", seed), PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
    assert len(contents(tmp_path)) == 6
    assert len(set(contents(tmp_path).values())) == 1


def test_every_flipped_or_missing_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_shard(path, ids(6), np.arange(6), about())
    whole = path.read_bytes()
    for position in (0, 8, 20, len(whole) - 100, len(whole) - 1):
        broken = bytearray(whole)
        broken[position] ^= 1
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
            read_shard(path)
    for size in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x\.safetensors is damaged, or no token shard"):
            read_shard(path)
    with pytest.raises(FileNotFoundError, match="no token shard at"):
        read_shard(tmp_path / "nowhere.safetensors")


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    good = {"tokens": ids(3).astype(np.uint16), "labels": np.zeros(3, np.int32)}
    said = json.dumps({**about(), "sha256": "0"})
    for arrays, metadata, message in (
        ({"weight": np.zeros(3)}, None, "no token shard: KeyError"),
        (good, {"titok_fast": "{"}, "no token shard: JSONDecodeError"),
        (good, {"titok_fast": "[]"}, "no token shard: TypeError"),
        (good, {"titok_fast": said}, "its content has another digest"),
        ({**good, "tokens": ids(3)}, {"titok_fast": said}, "(3, 8) int64 and (3,) int32"),
        ({**good, "labels": np.zeros(4, np.int32)}, {"titok_fast": said}, "(4,) int32"),
    ):
        save_file(arrays, path, metadata=metadata)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=re.escape(message)):
            read_shard(path)


def shard_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    tokens, labels = ids(12), np.arange(12)
    for number, part in enumerate((slice(0, 4), slice(4, 7), slice(7, 12))):
        said = about(number, 3, tokenizer_sha256="abc")
        write_shard(shard_path(folder, number), tokens[part], labels[part], said)
    return tokens, labels


def test_source_of_shards(tmp_path: Path) -> None:
    tokens, labels = shard_folder(tmp_path)
    source = TokenSource(tmp_path, classes=12)
    assert len(source) == 12
    assert source.tokens.dtype == np.uint16
    for index in (0, 3, 4, 11):
        record = source.read(index)
        assert record.values.dtype == np.int64
        assert np.array_equal(record.values, tokens[index])
        assert record.label == labels[index]
    said = source.describe()
    assert (said["kind"], said["count"], said["tokens_per_image"]) == ("tokens", 12, K)
    assert said["tokenizer_sha256"] == "abc"
    check_same_data(json.loads(json.dumps(said)), TokenSource(tmp_path).describe())
    said = about(1, 3, tokenizer_sha256="abc")
    write_shard(shard_path(tmp_path, 1), tokens[:3], labels[4:7], said)
    with pytest.raises(ValueError, match="sha256 was"):
        check_same_data(said, TokenSource(tmp_path).describe())
    with pytest.raises(ValueError, match=r"wants labels in 0\.\.10; got 11"):
        TokenSource(tmp_path, classes=11)


def test_incomplete_and_mixed_folders(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no token shards in .*pretokenize"):
            TokenSource(folder)
    tokens, labels = shard_folder(tmp_path)
    shard_path(tmp_path, 1).unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 3 shards, 1 first: run pretokenize"):
        TokenSource(tmp_path)
    said = about(1, 3, tokenizer_sha256="another")
    write_shard(shard_path(tmp_path, 1), tokens[:3], labels[:3], said)
    with pytest.raises(ValueError, match=r"another run .*\['tokenizer_sha256'\] differ"):
        TokenSource(tmp_path)
    shard_path(tmp_path, 1).write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"tokens-00001\.safetensors is damaged"):
        TokenSource(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    write_shard(shard_path(empty, 0), ids(0), np.zeros(0, int), about())
    with pytest.raises(ValueError, match="at least one row of tokens; got none"):
        TokenSource(empty)


@pytest.mark.parametrize("rows", [1, 4, 12, 100])
def test_official_jsonl_there_and_back(tmp_path: Path, rows: int) -> None:
    tokens, labels = shard_folder(tmp_path)
    assert shards_to_jsonl(tmp_path, tmp_path / "all.jsonl") == 12
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    assert json.loads(lines[5]) == {"class_id": 5, "tokens": tokens[5].tolist()}
    back, size = tmp_path / "back", {"codebook_size": N, "shard_size": rows}
    shards = jsonl_to_shards(tmp_path / "all.jsonl", back, **size)
    assert shards == len(shard_numbers(tmp_path / "back")) == -(-12 // rows)
    for place in (tmp_path / "back", tmp_path / "all.jsonl"):
        source = TokenSource(place)
        assert source.tokens.dtype == np.uint16
        assert np.array_equal(source.tokens, tokens)
        assert np.array_equal(source.labels, labels)
    shards_to_jsonl(tmp_path / "back", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "all.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"class_id": 1, "tokens": [1, 2', 'wants {"class_id": int, "tokens": [int, ...]}'),
        ("", 'wants {"class_id": int, "tokens": [int, ...]}; got JSONDecodeError'),
        ("[1, 2]", "got TypeError"),
        ('{"tokens": [1, 2]}', "got KeyError: 'class_id'"),
        ('{"class_id": 1, "tokens": []}', "wants a class and one or more ids"),
        ('{"class_id": 1, "tokens": 5}', "wants a class and one or more ids"),
        ('{"class_id": 1, "tokens": [1, 2.0]}', "whole numbers in 0..2147483647; got"),
        ('{"class_id": 1, "tokens": [1, true]}', "whole numbers in 0..2147483647; got"),
        ('{"class_id": -1, "tokens": [1, 2]}', "whole numbers in 0..2147483647; got"),
        ('{"class_id": 1, "tokens": [1, 9999999999]}', "whole numbers in 0..2147483647; got"),
        ('{"class_id": 1, "tokens": [1, 2, 3]}', "wants 2 ids; got 3"),
        ("\xff", "got "),
    ],
)
def test_faulty_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    good = '{"class_id": 0, "tokens": [0, 1]}\n'
    path = tmp_path / "x.jsonl"
    path.write_bytes((good * 2 + line + "\n" + good).encode("latin-1"))
    for work in (
        lambda: TokenSource(path),
        lambda: jsonl_to_shards(path, tmp_path / "out", codebook_size=9),
    ):
        with pytest.raises(ValueError, match=r"x\.jsonl, line 3: .*" + re.escape(message)):
            work()
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_jsonl_faults(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(FileNotFoundError, match="no file of tokens"):
        TokenSource(path)
    path.write_text("")
    with pytest.raises(ValueError, match="at least one row"):
        TokenSource(path)
    with pytest.raises(ValueError, match="at least one row"):
        jsonl_to_shards(path, tmp_path / "a", codebook_size=9)
    path.write_text('{"class_id": 0, "tokens": [0, 9]}')
    with pytest.raises(ValueError, match=r"wants ids in 0\.\.8; got 0\.\.9"):
        jsonl_to_shards(path, tmp_path / "b", codebook_size=9)
    jsonl_to_shards(path, tmp_path / "c", codebook_size=10)
    with pytest.raises(FileExistsError, match="holds token shards already"):
        jsonl_to_shards(path, tmp_path / "c", codebook_size=10)
    with pytest.raises(ValueError, match="shard_size wants 1 or more"):
        jsonl_to_shards(path, tmp_path / "d", codebook_size=10, shard_size=0)


def test_failed_conversion_leaves_the_old_file(tmp_path: Path) -> None:
    shard_folder(tmp_path)
    old = tmp_path / "old.jsonl"
    old.write_text("precious")
    shard_path(tmp_path, 2).write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged"):
        shards_to_jsonl(tmp_path, old)
    assert old.read_text() == "precious"
    assert not list(tmp_path.glob(".*"))
