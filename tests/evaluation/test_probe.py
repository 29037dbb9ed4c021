"""Linear probing: LARS, the schedule, features, and that a probe learns what is there."""

import math

import numpy as np
import pytest
import torch
from support.tiny_models import tiny_tokenizer
from torch import nn

from titok_fast.data.sources import ArraySource
from titok_fast.evaluation.pictures import ArrayPictures, SourcePictures
from titok_fast.evaluation.probe import (
    LARS,
    ProbeConfig,
    _order,
    _random_crop,
    _rate,
    linear_probe,
    probe_features,
)


def test_lars_by_hand() -> None:
    matrix, vector = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.ones(1))
    optimizer = LARS([matrix, vector], lr=0.5, weight_decay=0.1, momentum=0.9)
    for parameter in (matrix, vector):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    move = torch.tensor([[1.3, 1.4]])  # gradient + decay
    move = 0.001 * 5 / move.norm() * move
    torch.testing.assert_close(matrix.data, torch.tensor([[3.0, 4.0]]) - 0.5 * move)
    torch.testing.assert_close(vector.data, torch.tensor([0.5]))  # neither decay nor trust
    before = vector.item()
    optimizer.step()  # momentum: 1 + 0.9
    assert before - vector.item() == pytest.approx(0.5 * 1.9)


def test_lars_starts_from_zero_weights() -> None:
    matrix = nn.Parameter(torch.zeros(1, 2))
    matrix.grad = torch.ones(1, 2)
    LARS([matrix], lr=0.1).step()
    torch.testing.assert_close(matrix.data, torch.full((1, 2), -0.1))


def test_learning_rate_is_maes() -> None:
    config = ProbeConfig()
    peak = 0.1 * 16384 / 256
    assert _rate(0, 16384, config) == 0
    assert _rate(5, 16384, config) == pytest.approx(peak / 2)
    assert _rate(10, 16384, config) == pytest.approx(peak)
    assert _rate(50, 16384, config) == pytest.approx(peak / 2)
    assert _rate(90, 16384, config) == pytest.approx(0)


def test_order_is_a_permutation_of_whole_batches() -> None:
    parts = list(_order(103, 10, seed=1, epoch=0))
    assert [len(part) for part in parts] == [10] * 10
    assert len(torch.cat(parts).unique()) == 100
    assert torch.equal(parts[0], next(_order(103, 10, seed=1, epoch=0)))
    assert not torch.equal(parts[0], next(_order(103, 10, seed=1, epoch=1)))


@pytest.mark.parametrize("kind", ["legacy", "vq", "vae"])
def test_features(kind: str) -> None:
    model, images = tiny_tokenizer(kind), torch.rand(3, 3, 32, 32)
    latents, codes = (probe_features(model, images, layer) for layer in ("latents", "codes"))
    assert latents.shape == (3, 64)
    assert codes.shape == (3, 12)
    with torch.no_grad():
        z = model.encoder(images, model.latent_tokens)[:, :12]
    torch.testing.assert_close(codes, z.mean(dim=(2, 3)))
    if not model.config.is_legacy:  # there the layer in between commutes with the mean
        projected = model.encoder.conv_out(latents)[:, :12]
        torch.testing.assert_close(projected, codes)
    assert not model.encoder.ln_post._forward_hooks


def two_kinds(n: int, seed: int) -> ArraySource:
    """Dark and bright pictures with noise."""
    drawn = np.random.default_rng(seed)
    labels = drawn.integers(0, 2, n)
    images = (labels * 90)[:, None, None, None] + drawn.integers(0, 120, (n, 32, 32, 3))
    return ArraySource(images.astype(np.uint8), labels)


@pytest.mark.parametrize(
    ("layer", "augment"), [("latents", False), ("codes", False), ("codes", True)]
)
def test_probe_learns(layer: str, augment: bool) -> None:
    pytest.importorskip("torchvision", reason="extra eval")
    sizes = {"epochs": 40, "warmup_epochs": 1, "batch_size": 16, "encode_batch_size": 24}
    config = ProbeConfig(layer=layer, base_learning_rate=400.0, augment=augment, **sizes)  # type: ignore[arg-type]
    train, test = two_kinds(64, 0), SourcePictures(two_kinds(50, 1), 32)
    done: list[int] = []
    model = tiny_tokenizer()
    figures = linear_probe(model, train, test, 2, config, progress=done.append)
    assert figures["probe_top1"] > 0.9
    assert figures["probe_top5"] == 1.0
    assert figures["probe_epochs"] == len(done) == 40
    if not augment:
        assert linear_probe(model, train, test, 2, config) == figures
    assert all(p.grad is None for p in model.parameters())


def test_probe_of_noise_is_chance() -> None:
    drawn = np.random.default_rng(0)
    images = drawn.integers(0, 256, (60, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(60) % 2
    config = ProbeConfig(epochs=2, warmup_epochs=0, batch_size=16, augment=False)
    train = ArraySource(images[:40], labels[:40])
    figures = linear_probe(
        tiny_tokenizer(), train, ArrayPictures(images[40:], labels[40:]), 2, config
    )
    assert 0.1 < figures["probe_top1"] < 0.9


def test_random_crops_follow_their_seed() -> None:
    pytest.importorskip("torchvision", reason="extra eval")
    crop = _random_crop(16)
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    state = torch.random.get_rng_state()
    a, b, c = crop(image, 1), crop(image, 1), crop(image, 2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert a.shape == (3, 16, 16)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert 0 <= float(a.min()) <= float(a.max()) <= 1


def test_refusals() -> None:
    with pytest.raises(ValueError, match="layer wants one of latents, codes; got 'pixels'"):
        ProbeConfig(layer="pixels")
    with pytest.raises(ValueError, match="epochs wants at least 1; got 0"):
        ProbeConfig(epochs=0)
    unlabelled = ArrayPictures(np.zeros((4, 32, 32, 3), np.uint8))
    config = ProbeConfig(epochs=1, batch_size=8, augment=False)
    with pytest.raises(ValueError, match="images with classes"):
        linear_probe(tiny_tokenizer(), two_kinds(8, 0), unlabelled, 2, config)
    assert math.isfinite(_rate(0.5, 8, ProbeConfig(epochs=1, warmup_epochs=1)))
