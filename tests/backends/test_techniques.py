"""`fast` from the start: in Python, on the command line, and on many processes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from support.processors import AVX2, BF16, NO_BF16
from support.tiny_models import (
    rebuilt,
    tiny_generator_config,
    tiny_tokenizer,
    tiny_tokenizer_config,
)

from titok_fast import PRESETS, ImageBert, SamplingConfig, TiTokPipeline
from titok_fast.backends.techniques import resolve_fast
from titok_fast.cli import main as cli
from titok_fast.presets import Preset

SETTINGS = SamplingConfig(4, 3.0, "linear", 3.0, 4.5, True)
CLASSES = 4


@pytest.fixture(autouse=True)
def _known_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titok_fast.processor.here._known", BF16)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What TiTokPipeline.compile is given."""
    given: list[object] = []
    compile_ = TiTokPipeline.compile

    def spy(self: TiTokPipeline, techniques: Any = None, **options: object) -> TiTokPipeline:
        given.append(techniques)
        return compile_(self, techniques, **options)

    monkeypatch.setattr(TiTokPipeline, "compile", spy)
    monkeypatch.setattr("titok_fast.pipeline.use_cache_dir", lambda folder: None)
    return given


@pytest.fixture
def weights(tmp_path: Path) -> list[str]:
    folder = tmp_path / "weights"
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    config = replace(tiny_generator_config(), condition_num_classes=CLASSES)
    rebuilt(ImageBert(config)).save_pretrained(folder / "generator")
    return [f"--tokenizer={folder / 'tokenizer'}", f"--generator={folder / 'generator'}"]


def test_modes_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_fast(False, "cpu", torch.float32) == ()
    for known, dtype, attention in (
        (BF16, torch.bfloat16, ("products",)),
        (BF16, torch.float32, ()),
        (NO_BF16, torch.bfloat16, ()),
        (AVX2, torch.float32, ()),
    ):
        monkeypatch.setattr("titok_fast.processor.here._known", known)
        assert resolve_fast(True, "cpu", dtype) == ("packed", *attention)
        assert resolve_fast("int8", "cpu", dtype) == (*attention, "int8")
    for wrong in ("packed", "default", None, ["packed"]):
        with pytest.raises(ValueError, match="fast wants True, False or 'int8'; got"):
            resolve_fast(wrong, "cpu", torch.float32)  # type: ignore[arg-type]


def test_fast_from_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = Preset(tiny_tokenizer_config(), tiny_generator_config(), SETTINGS)
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    plain = TiTokPipeline.random("tiny")
    assert plain.techniques == ()
    assert TiTokPipeline.random("tiny", fast=False).techniques == ()
    fast = TiTokPipeline.random("tiny", fast=True)
    assert fast.techniques == ("packed",)
    assert torch.equal(
        fast([1, 2], output="tensor"),
        TiTokPipeline.random("tiny").compile()([1, 2], output="tensor"),
    )
    plain.tokenizer.save_pretrained(str(tmp_path))
    loaded = TiTokPipeline.from_pretrained(tokenizer=str(tmp_path), fast="int8")
    assert loaded.techniques == ("int8",)
    assert TiTokPipeline.from_pretrained(tokenizer=str(tmp_path)).techniques == ()
    missing = str(tmp_path / "missing")  # refused before anything is read
    with pytest.raises(ValueError, match="fast wants True, False or 'int8'; got 'quick'"):
        TiTokPipeline.from_pretrained(tokenizer=missing, fast="quick")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'int8' is for the CPU; the pipeline is on cuda"):
        TiTokPipeline.from_pretrained(tokenizer=missing, fast="int8", device="cuda")


def run(*arguments: object) -> int:
    return cli.main([*map(str, arguments), "--quiet", "--device=cpu"])


def sheet(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(float)


def test_every_command_takes_it(tmp_path: Path, weights: list[str], asked: list[object]) -> None:
    photo, tokenizer = tmp_path / "photo.png", weights[0]
    Image.fromarray(data.coffee()).save(photo)
    names = {(): "plain", ("--fast",): "fast", ("--fast", "int8"): "int8"}
    for words, name in names.items():
        out = tmp_path / name
        assert run("sample", *weights, "--labels=1,3", f"--grid={out}-s.png", *words) == 0
        assert run("tokenize", photo, tokenizer, f"--out={out}.json", *words) == 0
        ids = tmp_path / "plain.json"
        assert run("detokenize", ids, tokenizer, f"--grid={out}-d.png", *words) == 0
        assert run("reconstruct", photo, tokenizer, f"--grid={out}-r.png", *words) == 0
    assert asked == [("packed",)] * 4 + [("int8",)] * 4
    for kind in "sdr":
        plain, fast, int8 = (sheet(tmp_path / f"{name}-{kind}.png") for name in names.values())
        assert np.abs(plain - fast).mean() < 0.5  # of 255; rounding
        assert plain.shape == int8.shape
        assert (plain != int8).any()  # 8 bits are seen: the option reached the networks
    same = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "fast")]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fast", "photo.png"], "wants int8, or no value; got 'photo.png': does it"),
        (["--fast=int8", "--dtype=float16"], "'int8' wants float32 or bfloat16; got torch.float16"),
    ],
)
def test_refused_before_loading(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    assert run("tokenize", "x.png", f"--tokenizer={missing}", "--out=ids.json", *words) == 2
    assert message in capsys.readouterr().err


def test_many_pictures(
    tmp_path: Path, weights: list[str], asked: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(name: str, *words: str) -> int:
        common = ["--count=4", "--steps=2", "--device=cpu", "--quiet", f"--out={tmp_path / name}"]
        return cli.main(["sample", *weights, *common, *words])

    assert draw("plain") == draw("fast", "--fast") == 0
    assert asked == [("packed",)]
    plain, fast = (
        np.stack([sheet(tmp_path / name / f"{i:06d}_{i}.png") for i in range(4)])
        for name in ("plain", "fast")
    )
    assert np.abs(plain - fast).mean() < 0.5
    manifest = json.loads((tmp_path / "fast" / "manifest.json").read_text())
    assert manifest["fast"] == ["packed"]
    before = json.loads((tmp_path / "plain" / "manifest.json").read_text())
    assert manifest | {"fast": []} == before  # the weights as loaded, not as packed
    assert draw("fast", "--fast") == 0
    assert asked == [("packed",)]  # nothing to draw, nothing to compile
    assert draw("fast", "--fast", "int8") == 2
    assert "fast" in capsys.readouterr().err
    assert asked == [("packed",)]
    assert draw("new", "--fast=int8", "--dtype=float16") == 2
    assert "'int8' wants float32 or bfloat16" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
