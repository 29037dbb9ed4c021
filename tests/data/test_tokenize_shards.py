"""Pre-tokenisation by any number of processes, of which any may die."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.processes import python
from support.ranks import run_together
from support.records import array_source, contents, pixels, write_fashion, write_shards
from support.tiny_models import rebuilt, tiny_tokenizer, tiny_tokenizer_config

from titok_fast import TiTok
from titok_fast.cli.main import main
from titok_fast.data import token_shards, tokenize_shards
from titok_fast.data.crops import VIEWS, views
from titok_fast.data.sources import ArraySource, Source
from titok_fast.data.token_shards import (
    TokenSource,
    read_shard,
    shard_numbers,
    shard_path,
    write_shard,
)
from titok_fast.data.tokenize_shards import pretokenize, tokenizer_fingerprint
from titok_fast.data.webdataset import WebDatasetSource
from titok_fast.distributed import Ranks
from titok_fast.io.images import to_tensor

COUNT, SHARD, K, N = 23, 5, 8, 64

pytestmark = pytest.mark.usefixtures("one_thread_for_all")  # as torchrun sets it


@pytest.fixture
def tokenizer() -> TiTok:
    return tiny_tokenizer("stage1", K, N)


@pytest.fixture
def source() -> ArraySource:
    return array_source(COUNT)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The command for 24 images and saved weights, without --out."""
    (tmp_path / "data").mkdir()
    write_fashion(tmp_path / "data")
    rebuilt(TiTok(tiny_tokenizer_config("stage1", K, N))).save_pretrained(tmp_path / "weights")
    weights, data = tmp_path / "weights", tmp_path / "data"
    options = f"--data=fashion-mnist --path={data} --tokenizer={weights} --device=cpu --quiet"
    return ["pretokenize", *options.split(), "--shard-size=6"]


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
    options: dict[str, Any] = {"batch_size": 7, "shard_size": SHARD}
    assert pretokenize(tokenizer, source, tmp_path, augmentation=augmentation, **options) == 23 * A
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
    message = r"4 of 12 records are damaged, more than max_bad_share 0\.3"
    with pytest.raises(ValueError, match=message):  # all shards are there: only their sum can tell
        pretokenize(tokenizer, source, tmp_path / "a", shard_size=3, max_bad_share=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentation": "flip"}, "wants one of center, center_flip, ten_crop; got 'flip'"),
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


def test_what_has_no_tokens_or_no_images(tmp_path: Path, source: ArraySource) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("not ours")
    with pytest.raises(FileExistsError, match=r"holds file but no manifest\.json"):
        pretokenize(tiny_tokenizer("vq"), source, tmp_path / "other")
    with pytest.raises(ValueError, match="a VAE tokenizer has no token ids"):
        pretokenize(tiny_tokenizer("vae"), source, tmp_path)
    said = {"codebook_size": N, "shard": 0, "shards": 1}
    write_shard(shard_path(tmp_path, 0), np.zeros((2, K), int), np.zeros(2, int), said)
    with pytest.raises(ValueError, match="these data are tokens already"):
        pretokenize(tiny_tokenizer("vq"), TokenSource(tmp_path), tmp_path / "out")


def test_full_disk_leaves_whole_shards_only(
    tmp_path: Path, tokenizer: TiTok, source: ArraySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    pretokenize(tokenizer, source, tmp_path / "whole", shard_size=SHARD)
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


def test_two_ranks_make_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pattern = write_shards(tmp_path / "data", [12, 11], damaged=(3,))
    tiny_tokenizer("stage1", K, N).save_pretrained(tmp_path / "weights")
    command = (
        f"pretokenize --tokenizer={tmp_path / 'weights'} --data=webdataset --path={pattern} "
        f"--batch-size=6 --shard-size={SHARD} --device=cpu --quiet --max-bad-share=0.2 --workers=2"
    ).split()
    launch = "-m torch.distributed.run --nproc_per_node=2 --standalone -m titok_fast"
    done = python(*launch.split(), *command, f"--out={tmp_path / '2'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"44 x 8 ids in {tmp_path / '2'}\n"
    jsonl = tmp_path / "all.jsonl"
    assert main([*command, f"--out={tmp_path / '1'}", f"--jsonl={jsonl}"]) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert np.array_equal(TokenSource(jsonl).tokens, TokenSource(tmp_path / "1").tokens)


def loses_a_rank(ranks: Ranks, out: Path) -> None:
    """Rank 1 dies before its second shard."""
    make = tokenize_shards._Shards.make

    def die(shards: Any, number: int, *more: Any) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        make(shards, number, *more)

    tokenize_shards._Shards.make = die  # type: ignore[method-assign]
    model = tiny_tokenizer("stage1", K, N)
    pretokenize(model, array_source(COUNT), out, shard_size=SHARD, ranks=ranks)


def test_a_killed_rank_leaves_whole_shards_for_another_number_of_ranks(
    tmp_path: Path, tokenizer: TiTok, source: ArraySource
) -> None:
    out = tmp_path / "out"
    told, both = run_together(loses_a_rank, (out,))
    assert [process.exitcode for process in both] == [3, -signal.SIGKILL]
    (message,) = told
    assert re.search(r"another rank is gone.*: 1 of 5 shards are missing. Run the same", message)
    assert shard_numbers(out) == [0, 1, 2, 4]
    pretokenize(tokenizer, source, out, shard_size=SHARD)  # one rank makes the rest
    pretokenize(tokenizer, source, tmp_path / "whole", shard_size=SHARD)
    assert contents(out) == contents(tmp_path / "whole")


class RankOne(Ranks):
    """Rank 1 of 2, whose rank 0 says always the same."""

    def agree(self, work: Any) -> Any:
        return {"kind": "tokens", "shard_size": 3}, []


def test_a_rank_that_differs_is_refused(
    tmp_path: Path, tokenizer: TiTok, source: ArraySource
) -> None:
    message = r"rank 1 differs from rank 0: .*shard_size was 3, now 4000"
    with pytest.raises(ValueError, match=message):
        pretokenize(tokenizer, source, tmp_path, ranks=RankOne(1, 2, torch.device("cpu")))
    assert not list(tmp_path.iterdir())


def test_the_command(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"--out={tmp_path / 'out'}"
    assert main([*command, out, "--split=eval"]) == 0
    assert capsys.readouterr().out == f"24 x 8 ids in {tmp_path / 'out'}\n"
    without_weights = [word for word in command if not word.startswith("--tokenizer")]
    for words, message in (
        (without_weights, "name a published model (--model), or weights (--tokenizer)"),
        ([*command, f"--tokenizer={tmp_path / 'nowhere'}"], "is neither a directory"),
        ([*command, "--data=folder", "--path="], "of kind folder want a path for eval; got none"),
        ([*command, "--path=nowhere"], "install Debian's package dataset-fashion-mnist"),
        ([*command, "--batch-size=0"], "wants batch_size of 1 or more"),
        ([*command, "--dtype=bfloat16"], "dtype was 'float32', now 'bfloat16'"),
        ([*command, "--patience=0"], "a number of seconds above 0; got '0'"),
    ):
        assert main([*words, out, "--split=eval"]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, also where a shell started pytest in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_goes_on(
    ctrl_c: None,
    tmp_path: Path,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    assert main([*command, f"--out={tmp_path / 'whole'}"]) == 0
    make, out = tokenize_shards._Shards.make, f"--out={tmp_path / 'out'}"

    def stop(shards: Any, shard: int, *more: Any) -> None:
        if shard == 2:
            os.kill(os.getpid(), number)
        make(shards, shard, *more)

    with monkeypatch.context() as patched:
        patched.setattr(tokenize_shards._Shards, "make", stop)
        assert main([*command, out]) == 130
    assert shard_numbers(tmp_path / "out") == [0, 1]
    assert signal.getsignal(signal.SIGTERM) == handler
    assert main([*command, out]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
