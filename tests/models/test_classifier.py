"""The small classifier: shapes, files, learning."""

import json
from pathlib import Path

import pytest
import torch

from titok_fast.models.classifier import FashionClassifier


def test_shapes_and_size() -> None:
    model = FashionClassifier().eval()
    x = torch.rand(3, 3, 32, 32)
    assert model(x).shape == (3, 10)
    assert model.features(x).shape == (3, model.dim)
    assert 0.25e6 < sum(p.numel() for p in model.parameters()) < 0.5e6
    torch.testing.assert_close(model.head(model.features(x)), model(x))


def test_a_picture_does_not_depend_on_its_batch() -> None:
    model, x = FashionClassifier().eval(), torch.rand(5, 3, 32, 32)
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]), rtol=1e-5, atol=1e-6)
    assert not list(model.buffers())  # nothing that a moving average of weights would miss


def test_colour_is_not_seen() -> None:
    model, grey = FashionClassifier().eval(), torch.rand(2, 1, 32, 32)
    tint = torch.tensor([0.1, -0.05, -0.05]).view(1, 3, 1, 1)
    torch.testing.assert_close(model(grey + tint), model(grey.expand(-1, 3, -1, -1)))


def test_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\).*got \(1, 1, 28, 28\)"):
        FashionClassifier()(torch.zeros(1, 1, 28, 28))


def test_save_and_load(tmp_path: Path) -> None:
    model = FashionClassifier()
    model.save_pretrained(tmp_path / "c")
    loaded = FashionClassifier.from_pretrained(tmp_path / "c")
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert json.loads((tmp_path / "c" / "config.json").read_text())["model_type"] == (
        "fashion-classifier"
    )


def test_load_refuses_other_models(tmp_path: Path) -> None:
    FashionClassifier().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="describes a bert; wanted a fashion-classifier"):
        FashionClassifier.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe a fashion-classifier"):
        FashionClassifier.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="truncated"):
        FashionClassifier.from_pretrained(tmp_path / "model.safetensors")
