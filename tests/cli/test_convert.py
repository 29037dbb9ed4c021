"""`titok-fast convert`: what it writes, what loading gives back, and that it is all or nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.shipped import trained
from support.tiny_models import tiny_generator, tiny_tokenizer

from titok_fast import ImageBert, TiTok
from titok_fast.cli import convert as cli_convert
from titok_fast.cli import main as cli
from titok_fast.io.files import read_tensors, write_tensors
from titok_fast.models.classifier import FashionClassifier

CODEBOOK = "quantize.embedding.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return trained(tmp_path_factory.mktemp("runs"))


def arguments(sources: dict[str, Path], out: Path) -> list[str]:
    return ["convert", *(f"--{part}={path}" for part, path in sources.items()), f"--out={out}"]


def test_half_precision_on_disk_and_float32_again(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fashion-16"
    assert cli.main(arguments(sources, out)) == 0
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
        f"{part}/{name}"
        for part in ("classifier", "generator", "tokenizer")
        for name in ("config.json", "model.safetensors")
    ]
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    said = f"tokenizer, generator, classifier in {out}: {size / 1e6:.2f} MB\n"
    assert capsys.readouterr().out == said
    for part, source in sources.items():
        before, after = (read_tensors(f / "model.safetensors") for f in (source, out / part))
        assert before.keys() == after.keys()
        for name, tensor in after.items():
            exact = name.endswith(CODEBOOK)
            assert tensor.dtype == (torch.float32 if exact else torch.float16), name
            want = before[name] if exact else before[name].half()
            assert torch.equal(tensor, want), name
        configs = [json.loads((f / "config.json").read_text()) for f in (source, out / part)]
        assert configs[0] == configs[1]
    model = TiTok.from_pretrained(out / "tokenizer")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    half = read_tensors(out / "tokenizer" / "model.safetensors")["latent_tokens"]
    assert torch.equal(model.latent_tokens, half.float())
    assert ImageBert.from_pretrained(out / "generator").dtype == torch.float32
    FashionClassifier.from_pretrained(out / "classifier")


def test_any_single_part_and_any_dtype(sources: dict[str, Path], tmp_path: Path) -> None:
    only = {"generator": sources["generator"]}
    assert cli.main([*arguments(only, tmp_path / "g"), "--dtype=float32"]) == 0
    made = read_tensors(tmp_path / "g" / "generator" / "model.safetensors")
    before = read_tensors(sources["generator"] / "model.safetensors")
    assert all(torch.equal(made[name], tensor) for name, tensor in before.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g"]


def test_an_existing_folder_stays_until_the_new_one_is_whole(
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("precious")
    assert cli.main(arguments(sources, out)) == 2
    assert f"{out} exists already; pass --force" in capsys.readouterr().err

    def full(path: Path, tensors: dict[str, Any]) -> None:
        write_tensors(path, tensors)
        if path.parent.name == "generator":
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(cli_convert, "write_tensors", full)
        assert cli.main([*arguments(sources, out), "--force"]) == 2
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]

    rename = Path.rename
    with monkeypatch.context() as patched:  # the second of two renames fails
        patched.setattr(Path, "rename", lambda a, b: _fail() if a.name == "new" else rename(a, b))
        assert cli.main([*arguments(sources, out), "--force"]) == 2
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]

    assert cli.main([*arguments(sources, out), "--force"]) == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(sources)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def _fail() -> None:
    raise PermissionError(13, "denied")


def test_what_does_not_fit_is_refused(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_generator("ViT").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer("legacy").save_pretrained(tmp_path / "wide")
    weights = tmp_path / "wide" / "model.safetensors"
    tensors = read_tensors(weights)
    tensors["latent_tokens"][0, 0] = 1e6  # above the largest half
    write_tensors(weights, tensors)
    out = tmp_path / "out"
    for parts, message in (
        ({}, "convert wants at least one of --tokenizer, --generator, --classifier"),
        ({"tokenizer": tmp_path / "none"}, "none is neither a directory"),
        ({"classifier": sources["generator"]}, "does not describe a fashion-classifier"),
        (sources | {"generator": tmp_path / "tiny"}, "they do not belong together"),
        ({"tokenizer": tmp_path / "wide"}, "latent_tokens holds NaN or Inf"),
    ):
        assert cli.main(arguments(parts, out)) == 2
        assert message in capsys.readouterr().err
        assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny", "wide"]
    assert cli.main(arguments(sources, tmp_path / "no" / "where")) == 2
    assert "create it first" in capsys.readouterr().err
