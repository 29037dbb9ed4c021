"""Crops and flips: torchvision's and ADM's pixels, and random numbers that belong to a position."""

import ast
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.records import pixels

from titok_fast.data.crops import (
    VIEWS,
    Crop,
    adm_center_crop,
    crop_draws,
    philox,
    resize_shorter_edge,
    views,
)
from titok_fast.data.sources import BadRecord
from titok_fast.io.images import to_tensor

SHAPES = [(40, 48), (48, 40), (37, 91), (91, 37), (32, 32), (33, 32), (20, 30), (200, 150), (1, 9)]


def test_draws_belong_to_positions() -> None:
    whole = crop_draws(7, 100, 50)
    parts = [crop_draws(7, 100, 1), crop_draws(7, 101, 40), crop_draws(7, 141, 9)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert len(np.unique(crop_draws(7, 0, 1000))) == 3000
    assert not np.intersect1d(crop_draws(7, 0, 1000), crop_draws(8, 0, 1000)).size
    for seed, first in ((-1, 0), (2**70, 2**40)):  # any integer, and any step that can be reached
        assert crop_draws(seed, first, 2).shape == (2, 3)


def test_draws_are_uniform() -> None:
    draws = crop_draws(0, 0, 100_000)
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        counts = np.histogram(column, 20, (0, 1))[0]
        assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # chi-squared, 19 degrees, 0.1 %
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.015


def reference_philox(counter: int, key: tuple[int, int]) -> int:
    """First word of Philox4x64-10, from its paper (Salmon et al., SC'11), in plain integers."""
    mask = 2**64 - 1
    c, k = [counter, 0, 0, 0], list(key)
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(p1 >> 64) ^ c[1] ^ k[0], p1 & mask, (p0 >> 64) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c[0]


@pytest.mark.parametrize(("seed", "stream", "counter"), [(42, 0, 0), (7, 3, 12345)])
def test_words_are_those_of_the_published_generator(seed: int, stream: int, counter: int) -> None:
    word = reference_philox(counter + 1, (seed, stream))  # numpy counts before it draws
    assert philox(seed, stream, counter).random_raw(1).tolist() == [word]
    if stream == 0:
        assert crop_draws(seed, counter, 1)[0, 0] == (word >> 11) / 2**53


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_evaluation_cuts_as_the_rest_of_the_package(height: int, width: int) -> None:
    image = pixels(0, height, width)
    crop = Crop(32, 32, random_crop=False, random_flip=False).one(image, np.zeros(3))
    wanted = to_tensor(image, 32)[0].mul(255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(crop, wanted)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_training_cuts_as_torchvision(height: int, width: int) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    image, crop = pixels(1, height, width), Crop(32, 40, random_crop=True, random_flip=True)
    mode = functional.InterpolationMode.BICUBIC
    resized = functional.resize(Image.fromarray(image), [40], interpolation=mode, antialias=True)
    assert np.array_equal(resize_shorter_edge(image, 40), np.asarray(resized))
    for draws in crop_draws(3, 0, 20):
        room = np.array([resized.height, resized.width]) - 32
        top, left = (int(np.floor(u * (r + 1))) for u, r in zip(draws, room, strict=False))
        wanted = functional.crop(resized, top, left, 32, 32)
        if draws[2] < 0.5:
            wanted = functional.hflip(wanted)
        assert np.array_equal(crop.one(image, draws), np.asarray(wanted))
    center = functional.center_crop(resized, [32, 32])
    plain = Crop(32, 40, random_crop=False, random_flip=False)
    assert np.array_equal(plain.one(image, np.zeros(3)), np.asarray(center))


def test_every_offset_and_both_sides_are_drawn() -> None:
    crop, draws = Crop(4, 6, random_crop=True, random_flip=True), crop_draws(0, 0, 4000)
    top, left, flip = crop.offsets(draws, 6, 8)
    counts = np.zeros((3, 5, 2), int)
    np.add.at(counts, (top, left, flip.astype(int)), 1)
    assert counts.sum() == 4000
    assert ((counts - 4000 / 30) ** 2 / (4000 / 30)).sum() < 58.3  # 29 degrees, 0.1 %
    extremes = np.array([[0.0, 0.0, 0.5], [1 - 2**-53, 1 - 2**-53, 0.5 - 2**-53]])
    assert [x.tolist() for x in crop.offsets(extremes, 6, 8)] == [[0, 2], [0, 4], [False, True]]


@pytest.mark.parametrize("shape", [(9, 40, 48, 3), (9, 40, 48), (9, 32, 32, 3), (9, 32, 32)])
@pytest.mark.parametrize("random", [False, True])
def test_many_at_once_are_cut_as_one_by_one(shape: tuple[int, ...], random: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    before, crop = images.copy(), Crop(32, shape[1], random, random)
    indices, draws = np.array([3, 0, 8, 3, 5]), crop_draws(1, 0, 5)
    got = crop.many(images, indices, draws)
    for row, index, draw in zip(got, indices, draws, strict=True):
        image = images[index] if len(shape) == 4 else np.repeat(images[index][:, :, None], 3, 2)
        wanted = crop.one(image, draw)
        assert np.array_equal(row, wanted if len(shape) == 4 else wanted[:, :, 0])
    assert np.array_equal(images, before)  # what was mirrored is a copy


def test_picture_of_the_wanted_size_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("resized")

    monkeypatch.setattr(Image, "fromarray", refuse)
    image = pixels(0, 32, 32)
    assert np.array_equal(Crop(32, 32, True, False).one(image, np.full(3, 0.9)), image)


@pytest.mark.parametrize("shape", [(1, 101, 3), (101, 1, 3), (0, 5, 3), (5, 0, 3)])
def test_strips_are_damaged_records(shape: tuple[int, ...]) -> None:
    image, wanted = np.zeros(shape, np.uint8), f"got {shape[1]} x {shape[0]}"
    for work in (
        lambda: Crop(32, 32, True, True).one(image, np.zeros(3)),
        lambda: views(image, 32, "center"),
        lambda: views(image, 32, "center_flip"),
        lambda: views(image, 32, "ten_crop"),
    ):
        with pytest.raises(BadRecord, match=re.escape(wanted)):
            work()


def test_crop_larger_than_the_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="resize_shorter_edge wants crop_size 32 or more; got 31"):
        Crop(32, 31, True, True)


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("size", [16, 32])
def test_ten_crop_as_torchvision(height: int, width: int, size: int) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = pixels(2, height, width)
    square = Image.fromarray(adm_center_crop(image, int(1.1 * size)))
    wanted = functional.ten_crop(square, [size, size])
    got = views(image, size, "ten_crop")
    assert got.shape == (10, size, size, 3)
    for row, picture in zip(got, wanted, strict=True):
        assert np.array_equal(row, np.asarray(picture))


def test_views_have_names_in_order() -> None:
    assert VIEWS["center_flip"] == ("center", "mirrored center")
    assert VIEWS["ten_crop"][0] == "top left"
    assert VIEWS["ten_crop"][4:6] == ("center", "mirrored top left")
    image = pixels(0, 70, 64)  # twice 32: halved to 35 x 32 by boxes, then only cropped
    plain, mirrored = views(image, 32, "center_flip")
    halves = image.reshape(35, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(plain - halves[1:33]).max() <= 1  # two passes, each rounded
    assert np.array_equal(mirrored, plain[:, ::-1])
    assert np.array_equal(views(image[:32, :32], 32, "center_flip")[0], image[:32, :32])
    assert np.array_equal(views(image, 32, "center"), plain[None])


@pytest.mark.skipif("TITOK_UPSTREAM" not in os.environ, reason="wants TITOK_UPSTREAM")
@pytest.mark.parametrize(("height", "width"), [*SHAPES, (500, 375), (1024, 4096)])
def test_adm_crop_against_upstream(height: int, width: int) -> None:
    path = Path(os.environ["TITOK_UPSTREAM"]) / "scripts" / "pretokenization.py"
    tree = ast.parse(path.read_text())  # one function: the rest of the file wants their packages
    tree.body = [n for n in tree.body if getattr(n, "name", "") == "center_crop_arr"]
    names: dict[str, Any] = {"Image": Image, "np": np}
    exec(compile(tree, str(path), "exec"), names)
    image = pixels(3, height, width)
    for size in (32, 35, 256):
        wanted = names["center_crop_arr"](Image.fromarray(image), size)
        assert np.array_equal(adm_center_crop(image, size), np.asarray(wanted))
