"""Token shards, the official JSONL, and pre-tokenisation by any number of processes."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file, save_file
from support.records import pixels, write_fashion, write_shards
from support.tiny_models import rebuilt, tiny_tokenizer, tiny_tokenizer_config

from titok_fast import TiTok
from titok_fast.cli.pretokenize import main, pretokenize
from titok_fast.crew import Crew
from titok_fast.data.crops import VIEWS, views
from titok_fast.data.sources import ArraySource, Source, check_same_data
from titok_fast.data.token_shards import (
    TokenSource,
    jsonl_to_shards,
    read_shard,
    shard_numbers,
    shard_path,
    shards_to_jsonl,
    write_shard,
)
from titok_fast.data.tokenize_shards import ShardMaker, tokenizer_fingerprint
from titok_fast.data.webdataset import WebDatasetSource
from titok_fast.io.images import to_tensor

COUNT, SHARD, K, N = 23, 5, 8, 64


pytestmark = pytest.mark.usefixtures("one_thread_for_all")  # as torchrun sets it


@pytest.fixture
def tokenizer() -> TiTok:
    return tiny_tokenizer("stage1", K, N)


@pytest.fixture
def source() -> ArraySource:
    return ArraySource(np.stack([pixels(i) for i in range(COUNT)]), np.arange(COUNT) % 10)


def ids(rows: int, K: int = K, N: int = N) -> np.ndarray:
    return np.random.default_rng(0).integers(0, N, (rows, K))


def about(number: int = 0, shards: int = 1, N: int = N, **more: Any) -> dict[str, Any]:
    return {"codebook_size": N, "shard": number, "shards": shards, **more}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code.replace("HASH", seed)]
        subprocess.run(command, check=True, env=environment)
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


def shard_folder(
    folder: Path, counts: tuple[int, ...] = (4, 3, 5)
) -> tuple[np.ndarray, np.ndarray]:
    tokens, labels = ids(sum(counts)), np.arange(sum(counts))
    start = 0
    for number, count in enumerate(counts):
        part = slice(start, start + count)
        said = about(number, len(counts), tokenizer_sha256="abc")
        write_shard(shard_path(folder, number), tokens[part], labels[part], said)
        start += count
    return tokens, labels


def test_source_of_shards(tmp_path: Path) -> None:
    tokens, labels = shard_folder(tmp_path)
    source = TokenSource(tmp_path, classes=12)
    assert len(source) == 12
    assert source.tokens.dtype == np.uint16
    for index in (0, 3, 4, 11):
        record = source.read(index)
        assert record.tokens.dtype == np.int64
        assert np.array_equal(record.tokens, tokens[index])
        assert record.label == labels[index]
    said = source.describe()
    assert (said["kind"], said["count"], said["tokens_per_image"]) == ("tokens", 12, K)
    assert said["tokenizer_sha256"] == "abc"
    check_same_data(json.loads(json.dumps(said)), TokenSource(tmp_path).describe())
    write_shard(
        shard_path(tmp_path, 1), tokens[:3], labels[4:7], about(1, 3, tokenizer_sha256="abc")
    )
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
    shards = jsonl_to_shards(
        tmp_path / "all.jsonl", tmp_path / "back", codebook_size=N, shard_size=rows
    )
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
    with pytest.raises(ValueError, match="at least one line"):
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


def test_fingerprint_is_of_what_decides_ids() -> None:
    stage1, stage2 = tiny_tokenizer("stage1"), tiny_tokenizer("legacy")
    assert tokenizer_fingerprint(stage1) == tokenizer_fingerprint(stage2)
    for name in ("latent_tokens", "encoder.ln_pre.weight", "quantize.embedding.weight"):
        other = tiny_tokenizer("stage1")
        with torch.no_grad():
            other.get_parameter(name).view(-1)[0] += 1
        assert tokenizer_fingerprint(other) != tokenizer_fingerprint(stage1), name


@pytest.mark.parametrize("augmentation", ["center", "center_flip", "ten_crop"])
def test_tokens_are_those_of_each_view(
    tmp_path: Path, tokenizer: TiTok, source: ArraySource, augmentation: str
) -> None:
    A = len(VIEWS[augmentation])
    rows = pretokenize(
        tokenizer, source, tmp_path, augmentation=augmentation, batch_size=7, shard_size=SHARD
    )
    assert rows == COUNT * A
    made = TokenSource(tmp_path)
    assert made.about["views"] == list(VIEWS[augmentation])
    assert made.about["tokenizer_sha256"] == tokenizer_fingerprint(tokenizer)
    assert np.array_equal(made.labels, np.repeat(np.arange(COUNT) % 10, A))
    for index in (0, SHARD, COUNT - 1):
        batch = to_tensor(views(pixels(index), 32, augmentation), 32)
        with torch.no_grad():
            _, result = tokenizer.encode(batch)
        wanted = result["min_encoding_indices"].squeeze(1).numpy()
        assert np.array_equal(made.tokens[index * A : (index + 1) * A], wanted)
    assert len({row.tobytes() for row in made.tokens}) > (3 if A == 1 else 5)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    found = [(path.name, path.stat()) for path in folder.iterdir()]
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}


def test_what_is_missing_or_damaged_is_made_again(
    tmp_path: Path, tokenizer: TiTok, source: ArraySource
) -> None:
    options: dict[str, Any] = {"batch_size": 6, "shard_size": SHARD}
    pretokenize(tokenizer, source, tmp_path, **options)
    whole, before = contents(tmp_path), stamps(tmp_path)
    assert len(whole) == 6  # five shards and the manifest
    pretokenize(tokenizer, source, tmp_path, **options)
    assert stamps(tmp_path) == before  # nothing was left to do
    shard_path(tmp_path, 0).unlink()
    shard_path(tmp_path, 2).write_bytes(whole["tokens-00002.safetensors"][:-1])
    tokens, labels, said = read_shard(shard_path(tmp_path, 3))
    write_shard(shard_path(tmp_path, 3), tokens, labels, {**said, "batch_size": 99})
    (tmp_path / ".tokens-00004.safetensors.k1ll3d.safetensors").write_bytes(b"half")
    pretokenize(tokenizer, source, tmp_path, **options)
    assert contents(tmp_path) == whole
    for name in ("manifest.json", "tokens-00001.safetensors", "tokens-00004.safetensors"):
        assert stamps(tmp_path)[name] == before[name]


def test_two_ranks_make_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pattern = write_shards(tmp_path / "data", [12, 11], damaged=(3,))
    tiny_tokenizer("stage1", K, N).save_pretrained(tmp_path / "weights")
    options = [
        f"--tokenizer={tmp_path / 'weights'}", "--data=webdataset", f"--path={pattern}",
        "--batch-size=6", f"--shard-size={SHARD}", "--device=cpu", "--quiet",
        "--max-bad-share=0.2", "--workers=2",
    ]  # fmt: skip
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*start, "-m", "titok_fast.cli.pretokenize", *options, f"--out={tmp_path / '2'}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    jsonl = tmp_path / "all.jsonl"
    assert main([*options, f"--out={tmp_path / '1'}", f"--jsonl={jsonl}"]) == 0
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert said == f"44 x 8 ids in {tmp_path / '2'}\n"
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert np.array_equal(TokenSource(jsonl).tokens, TokenSource(tmp_path / "1").tokens)


def test_ranks_share_the_work_and_must_agree(
    tmp_path: Path, tokenizer: TiTok, source: ArraySource
) -> None:
    store, made = dist.HashStore(), [0, 0]
    makes, follower_works = ShardMaker.make, threading.Event()

    def follow(shard_size: int) -> None:
        with Crew(store, 1, 2) as crew:
            pretokenize(
                tiny_tokenizer("stage1", K, N), source, tmp_path, shard_size=shard_size, crew=crew
            )

    def counted(maker: ShardMaker, *arguments: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            made[0] += 1
            assert follower_works.wait(60)  # it polls for the plan, and might come too late
        else:
            made[1] += 1
            follower_works.set()
        makes(maker, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardMaker, "make", counted)
        thread = threading.Thread(target=follow, args=(1,))
        thread.start()
        with Crew(store, 0, 2) as crew:
            assert pretokenize(tokenizer, source, tmp_path, shard_size=1, crew=crew) == 2 * COUNT
        thread.join()
    assert sum(made) == COUNT
    assert min(made) > 0


def test_a_rank_that_differs_is_refused(
    tmp_path: Path, tokenizer: TiTok, source: ArraySource
) -> None:
    store = dist.HashStore()
    Crew(store, 0, 2).publish({"manifest": {"kind": "tokens", "shard_size": 3}, "shards": []})
    with pytest.raises(
        ValueError, match=r"rank 1 differs from rank 0: .*shard_size was 3, now 4000"
    ):
        pretokenize(tokenizer, source, tmp_path, crew=Crew(store, 1, 2))
    assert not list(tmp_path.iterdir())


def test_a_leader_that_fails_tells_the_others(
    tmp_path: Path, tokenizer: TiTok, source: ArraySource
) -> None:
    (tmp_path / "other").write_text("not ours")
    store = dist.HashStore()
    with pytest.raises(FileExistsError, match=r"holds other but no manifest\.json"):
        pretokenize(tokenizer, source, tmp_path, crew=Crew(store, 0, 2))
    with pytest.raises(ConnectionError, match="rank 0 could not start"):
        pretokenize(tokenizer, source, tmp_path, crew=Crew(store, 1, 2))


def test_settings_of_an_earlier_run(tmp_path: Path, tokenizer: TiTok, source: ArraySource) -> None:
    pretokenize(tokenizer, source, tmp_path, shard_size=SHARD)
    before = stamps(tmp_path)
    other = TiTok(tiny_tokenizer_config("stage1", K, N))
    fewer: Source = ArraySource(source.images[:20], source.labels[:20])
    for arguments, options, phrase in (
        ((tokenizer, source), {"augmentation": "ten_crop"}, "augmentation was 'center_flip'"),
        ((tokenizer, source), {"batch_size": 4}, "batch_size was 128, now 4"),
        ((tokenizer, source), {"dtype": torch.bfloat16}, "dtype was 'float32', now 'bfloat16'"),
        ((other, source), {}, "tokenizer_sha256 was"),
        ((tokenizer, fewer), {}, "source.count was 23, now 20"),
    ):
        with pytest.raises(ValueError, match="begun with other settings: .*" + re.escape(phrase)):
            pretokenize(*arguments, tmp_path, **{"shard_size": SHARD, **options})  # type: ignore[arg-type]
        tokenizer.float()
    assert stamps(tmp_path) == before


def test_damaged_pictures_are_left_out(tmp_path: Path, tokenizer: TiTok) -> None:
    (tmp_path / "data").mkdir()
    source = WebDatasetSource(write_shards(tmp_path / "data", [12], damaged=(0, 1, 2, 7)))
    rows = pretokenize(tokenizer, source, tmp_path / "a", shard_size=3, max_bad_share=0.5)
    assert rows == 16
    made = TokenSource(tmp_path / "a")  # its first shard is empty
    assert made.labels.tolist() == [label for i in (3, 4, 5, 6, 8, 9, 0, 1) for label in (i, i)]
    said = read_shard(shard_path(tmp_path / "a", 2))[2]
    assert said["skipped"] == ["train-000.tar:00000007"]
    with pytest.raises(ValueError, match=r"3 of 3 records read are damaged, more than max_bad_sha"):
        pretokenize(tokenizer, source, tmp_path / "b", shard_size=3, max_bad_share=0.2)
    with pytest.raises(
        ValueError, match=r"4 of 12 records are damaged, more than max_bad_share 0\.3"
    ):
        # all shards are there, so only their sum can tell
        pretokenize(tokenizer, source, tmp_path / "a", shard_size=3, max_bad_share=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"augmentation": "flip"},
            "augmentation wants one of center, center_flip, ten_crop; got 'flip'",
        ),
        ({"batch_size": 0}, "wants batch_size of 1 or more; got 0"),
        ({"shard_size": 0}, "wants shard_size of 1 or more; got 0"),
        ({"workers": 0}, "wants workers of 1 or more; got 0"),
    ],
)
def test_arguments_that_do_not_exist(
    tmp_path: Path, tokenizer: TiTok, source: ArraySource, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pretokenize(tokenizer, source, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_what_has_no_tokens_or_no_pictures(tmp_path: Path, source: ArraySource) -> None:
    with pytest.raises(ValueError, match="a VAE tokenizer has no token ids"):
        pretokenize(tiny_tokenizer("vae"), source, tmp_path)
    shard_folder(tmp_path)
    with pytest.raises(ValueError, match="these data are tokens already"):
        pretokenize(tiny_tokenizer("vq"), TokenSource(tmp_path), tmp_path / "out")


def test_full_disk_leaves_whole_shards_only(
    tmp_path: Path, tokenizer: TiTok, source: ArraySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    pretokenize(tokenizer, source, tmp_path / "whole", shard_size=SHARD)
    from titok_fast.data import token_shards

    save = token_shards.save_file

    def fail_late(arrays: Any, path: Path, metadata: Any) -> None:
        save(arrays, path, metadata=metadata)
        if "tokens-00002" in path.name:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_shards, "save_file", fail_late)
    with pytest.raises(OSError, match="No space left"):
        pretokenize(tokenizer, source, out, shard_size=SHARD)
    assert shard_numbers(out) == [0, 1]
    monkeypatch.setattr(token_shards, "save_file", save)
    pretokenize(tokenizer, source, out, shard_size=SHARD)
    assert contents(out) == contents(tmp_path / "whole")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    write_fashion(tmp_path / "data")
    rebuilt(TiTok(tiny_tokenizer_config("stage1", K, N))).save_pretrained(tmp_path / "weights")
    data = ["--data=fashion-mnist", f"--path={tmp_path / 'data'}", "--split=eval", "--device=cpu"]
    weights = f"--tokenizer={tmp_path / 'weights'}"
    assert main([*data, weights, f"--out={tmp_path / 'out'}", "--quiet"]) == 0
    assert capsys.readouterr().out == f"24 x 8 ids in {tmp_path / 'out'}\n"
    for options, message in (
        ([*data], "name a published model with --model, or weights with --tokenizer"),
        ([*data, f"--tokenizer={tmp_path / 'nowhere'}"], "is neither a directory"),
        (["--data=folder", weights], "data of kind folder want a path for train; got none"),
        ([*data, weights, "--path=nowhere"], "install Debian's package dataset-fashion-mnist"),
        ([*data, weights, "--batch-size=0"], "wants batch_size of 1 or more"),
        ([*data, weights, "--dtype=bfloat16"], "dtype was 'float32', now 'bfloat16'"),
    ):
        assert main([*options, f"--out={tmp_path / 'out'}"]) == 2
        assert message in capsys.readouterr().err


def test_a_stopped_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    write_fashion(tmp_path / "data")
    tiny_tokenizer("stage1", K, N).save_pretrained(tmp_path / "weights")
    options = [
        "--data=fashion-mnist", f"--path={tmp_path / 'data'}", "--device=cpu", "--quiet",
        f"--tokenizer={tmp_path / 'weights'}", "--shard-size=6",
    ]  # fmt: skip
    assert main([*options, f"--out={tmp_path / 'whole'}"]) == 0
    make = ShardMaker.make

    def stop(maker: ShardMaker, number: int, *more: Any) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        make(maker, number, *more)

    monkeypatch.setattr(ShardMaker, "make", stop)
    assert main([*options, f"--out={tmp_path / 'out'}"]) == 130
    assert shard_numbers(tmp_path / "out") == [0, 1]
    monkeypatch.setattr(ShardMaker, "make", make)
    assert main([*options, f"--out={tmp_path / 'out'}"]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
