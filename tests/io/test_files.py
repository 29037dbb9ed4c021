"""Files of weights: written atomically, read without executing code, found, and told when bad."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.processes import python
from support.records import Trap
from support.tiny_models import (
    assert_same_weights,
    official_state,
    tiny_generator,
    tiny_generator_config,
    tiny_tokenizer_config,
)
from torch import Tensor

from titok_fast import ImageBert, TiTok, UViTBert
from titok_fast.io.files import read_tensors, write_atomic


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_truncated_and_damaged_files(form: str, tmp_path: Path) -> None:
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.bin")
    state = {"a.weight": torch.randn(40, 50), "b.bias": torch.randn(7)}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    shares = [0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.5, 0.9, 0.999]
    for cut in [int(len(content) * share) for share in shares]:
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"weights\.[a-z]+ .*(truncated|damaged)"):
            read_tensors(path)
    pick, refused = random.Random(0), 0
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(20):
            damaged[pick.randrange(min(500, len(content)))] = pick.randrange(256)
        path.write_bytes(damaged)
        try:
            read_tensors(path)
        except ValueError:  # any other exception fails the test
            refused += 1
    assert refused > 50


def test_unreadable_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.bin").touch()

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr("torch.load", refuse)
    with pytest.raises(PermissionError, match="not yours"):
        read_tensors(tmp_path / "weights.bin")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy_format", [False, True])
def test_pickles_with_code_are_refused_not_executed(legacy_format: bool, tmp_path: Path) -> None:
    canary, path = tmp_path / "executed", tmp_path / "weights.bin"
    state = {**official_state(tiny_generator("ViT")), "extra": Trap(canary)}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy_format)
    with pytest.raises(ValueError, match="Python objects beside tensors, which are never executed"):
        ImageBert.from_pretrained(path, config=tiny_generator_config("ViT"))
    assert not canary.exists()
    path.write_bytes(pickle.dumps(Trap(canary)))
    with pytest.raises(ValueError, match="refused"):
        ImageBert.from_pretrained(path, config=tiny_generator_config("ViT"))
    assert not canary.exists()
    pickle.loads(path.read_bytes())  # the canary does sing where code is executed
    assert canary.exists()


def test_file_that_is_no_flat_dictionary(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="flat dictionary from names to tensors"):
        TiTok.from_pretrained(tmp_path / "weights.bin", config=tiny_tokenizer_config())


def test_crash_in_writing_keeps_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tiny_generator("ViT")
    old.save_pretrained(tmp_path)
    new = ImageBert(tiny_generator_config("ViT"))

    def crash(tensors: dict[str, Tensor], path: Path, **options: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr("titok_fast.io.files.save_file", crash)
    with pytest.raises(OSError, match="no space left"):
        new.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_weights(old, ImageBert.from_pretrained(tmp_path))


def test_crash_before_rename_keeps_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def crash(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        tiny_generator("ViT").save_pretrained(tmp_path / "file" / "model")
    if os.geteuid() == 0:  # root may write anywhere
        return
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        tiny_generator("ViT").save_pretrained(locked)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("folder", r"folder holds none of model\.safetensors, pytorch_model\.bin"),
        ("absent/with/slashes", "neither a directory, nor a file, nor a hub repository"),
        ("absent.bin", "neither a directory, nor a file, nor a hub repository"),
        ("./absent/absent.bin", "neither a directory, nor a file, nor a hub repository"),
    ],
)
def test_sources_that_do_not_exist(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        TiTok.from_pretrained(source, config=tiny_tokenizer_config())


def test_hub_offline_with_an_empty_cache(tmp_path: Path) -> None:
    """In another process: huggingface_hub reads its environment once."""
    code = (
        "from titok_fast import TiTok\n"
        "try: TiTok.from_pretrained('yucornetto/tokenizer_titok_l32_imagenet')\n"
        "except FileNotFoundError as error: print(error)"
    )
    done = python("-c", code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    said = "yucornetto/tokenizer_titok_l32_imagenet is no directory here"
    assert done.stdout.startswith(said), done.stderr
    assert "HF_HUB_OFFLINE=1" in done.stdout


def test_hub_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    model, asked = tiny_generator("UViT"), []
    model.save_pretrained(tmp_path)
    torch.save(official_state(model), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()

    def download(repository: str, name: str, *, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        if repository == "someone/private":
            raise OSError("401 Client Error")
        if not (tmp_path / name).is_file():
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    loaded = UViTBert.from_pretrained("someone/generator", revision="v1")
    assert_same_weights(model, loaded)
    assert asked == [
        ("someone/generator", "model.safetensors", "v1"),
        ("someone/generator", "pytorch_model.bin", "v1"),
        ("someone/generator", "config.json", "v1"),
    ]
    with pytest.raises(FileNotFoundError, match=r"cannot be had from the hub .*401 Client Error"):
        UViTBert.from_pretrained("someone/private")
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="hub repository someone/generator holds none of"):
        UViTBert.from_pretrained("someone/generator")
