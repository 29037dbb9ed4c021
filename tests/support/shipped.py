"""The model that comes with the package, with random weights: what its tests share."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from titok_fast import TiTokPipeline
from titok_fast.cli.convert import convert
from titok_fast.models.classifier import FashionClassifier
from titok_fast.presets import PRESETS

MODEL = "fashion-16"


def trained(folder: Path) -> dict[str, Path]:
    """Folders as training runs leave them, random weights: tokenizer, generator, classifier."""
    pipe = TiTokPipeline.random(MODEL, seed=3)
    assert pipe.generator is not None
    pipe.tokenizer.save_pretrained(folder / "stage2")
    pipe.generator.save_pretrained(folder / "generator")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        FashionClassifier().save_pretrained(folder / "classifier")
    names = {"tokenizer": "stage2", "generator": "generator", "classifier": "classifier"}
    return {part: folder / name for part, name in names.items()}


def ship(sources: dict[str, Path], target: Path) -> Path:
    """What `titok-fast convert` makes of them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    convert(sources, target)
    return target


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the preset's weights be those of a folder."""
    monkeypatch.setitem(PRESETS, MODEL, replace(PRESETS[MODEL], folder=folder))
