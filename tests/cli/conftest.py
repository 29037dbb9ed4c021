"""Saved models and photographs for the tests of commands."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data
from support.command_line import GENERATOR, SAMPLING, TOKENIZER, VAE
from support.sample_runs import saved, wanted_pixels
from support.tiny_models import (
    rebuilt,
    tiny_tokenizer,
)

from titok_fast.models.generator import ImageBert
from titok_fast.presets import PRESETS, Preset


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for kind, name in (("legacy", "tokenizer"), ("vae", "vae"), ("stage1", "stage1")):
        tiny_tokenizer(kind).save_pretrained(folder / name)
    rebuilt(ImageBert(GENERATOR)).save_pretrained(folder / "generator")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    Image.fromarray(data.astronaut()).resize((48, 48)).save(folder / "astronaut.png")
    Image.fromarray(data.coffee()).resize((90, 60)).save(folder / "coffee.jpg")
    Image.fromarray(data.chelsea()).resize((64, 80)).save(folder / "more" / "cat.webp")
    Image.fromarray(data.camera()).resize((32, 32)).save(folder / "more" / "coffee.png")
    return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", Preset(TOKENIZER, GENERATOR, SAMPLING))
    monkeypatch.setitem(PRESETS, "tiny-vae", Preset(VAE))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the tests of sampling."""
    return saved(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def wanted(models: Path) -> np.ndarray:
    return wanted_pixels(models)
