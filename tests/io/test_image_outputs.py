"""Pixels to images: bytes, sheets, PNG files, and the listing of folders."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from titok_fast.io import images


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_to_uint8_truncates_or_rounds_in_float32(dtype: torch.dtype) -> None:
    x = (torch.rand(2, 3, 5, 7) * 1.4 - 0.2).to(dtype)
    scaled = x.float().numpy().clip(0, 1) * np.float32(255)
    for rounding, wanted in [("truncate", np.floor(scaled)), ("round", np.rint(scaled))]:
        got = images.to_uint8(x, rounding=rounding)
        assert got.shape == (2, 5, 7, 3)
        assert got.dtype == torch.uint8
        assert got.is_contiguous()
        assert np.array_equal(got.numpy(), wanted.transpose(0, 2, 3, 1).astype(np.uint8))
    assert torch.equal(images.to_uint8(x), images.to_uint8(x, rounding="truncate"))


def test_all_byte_values_survive_the_round_trip() -> None:
    array = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    for rounding in ("truncate", "round"):
        pixels = images.to_tensor(array, 16)
        assert np.array_equal(images.to_uint8(pixels, rounding=rounding)[0].numpy(), array)


def test_to_uint8_leaves_its_input_alone_and_clamps_infinity() -> None:
    x = torch.tensor([float("inf"), float("-inf"), 0.5]).reshape(1, 3, 1, 1).requires_grad_()
    got = images.to_uint8(x)
    assert got.flatten().tolist() == [255, 0, 127]
    assert x.flatten()[2].item() == 0.5
    assert images.to_uint8(torch.empty(0, 3, 4, 4)).shape == (0, 4, 4, 3)


def test_to_uint8_and_to_pil_refuse_bad_input() -> None:
    good = torch.rand(1, 3, 4, 4)
    with pytest.raises(ValueError, match="NaN"):
        images.to_uint8(good.index_fill(2, torch.tensor([1]), float("nan")))
    with pytest.raises(ValueError, match="'floor'"):
        images.to_uint8(good, rounding="floor")
    with pytest.raises(ValueError, match=r"\(4, 4, 3\)"):
        images.to_uint8(torch.rand(4, 4, 3))
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        images.to_uint8(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(B, H, W, 3\).*\(1, 3, 4, 4\)"):
        images.to_pil(good)


def test_to_uint8_makes_no_host_wait_on_a_gpu() -> None:
    # a fake tensor has no values: reading one, as a NaN check does, raises
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, 8, 8, device="cuda", dtype=torch.bfloat16)
        got = images.to_uint8(x, rounding="round")
    assert got.device.type == "cuda"
    assert got.shape == (2, 8, 8, 3)


def test_to_pil_from_tensor_and_array() -> None:
    pixels = torch.from_numpy(np.stack([noise(4, 6, seed=0), noise(4, 6, seed=1)]))
    for form in (pixels, pixels.numpy()):
        pictures = images.to_pil(form)
        assert [p.size for p in pictures] == [(6, 4), (6, 4)]
        assert np.array_equal(np.asarray(pictures[1]), pixels[1].numpy())
    assert images.to_pil(pixels[:0]) == []


def test_grid_places_every_picture() -> None:
    arrays = [noise(4, 6, seed=i) for i in range(5)]
    sheet = np.asarray(images.grid([Image.fromarray(a) for a in arrays], columns=3, pad=2))
    assert sheet.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    for i, array in enumerate(arrays):
        top, left = 2 + i // 3 * 6, 2 + i % 3 * 8
        assert np.array_equal(sheet[top : top + 4, left : left + 6], array)
    assert (sheet[8:, 18:] == 255).all()  # the sixth cell
    assert images.grid([Image.new("RGB", (4, 4))] * 5, pad=0).size == (12, 8)


def test_grid_refuses_bad_input() -> None:
    small, large = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))
    with pytest.raises(ValueError, match=r"sizes \[\]"):
        images.grid([])
    with pytest.raises(ValueError, match=r"\(4, 4\), \(4, 5\)"):
        images.grid([small, large])
    with pytest.raises(ValueError, match="columns >= 1"):
        images.grid([small], columns=0)


def test_save_png_is_lossless_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for seed in range(2):
        array = noise(8, 8, seed=seed)
        images.save_png(path, Image.fromarray(array))
        assert np.array_equal(np.asarray(Image.open(path)), array)
    assert os.listdir(tmp_path) == ["a.png"]


def test_save_png_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    images.save_png(path, Image.new("RGB", (2, 2)))
    before = path.read_bytes()
    with pytest.raises(OSError, match="CMYK"):
        images.save_png(path, Image.new("CMYK", (2, 2)))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]
    with pytest.raises(ValueError, match=r"\.png; got .*a\.jpg"):
        images.save_png(tmp_path / "a.jpg", Image.new("RGB", (2, 2)))
    with pytest.raises(FileNotFoundError, match=r"no folder .*gone"):
        images.save_png(tmp_path / "gone" / "a.png", Image.new("RGB", (2, 2)))


def test_list_images_recurses_sorts_and_filters(tmp_path: Path) -> None:
    for name in ["b.JPG", "a.png", "c/d.WebP", "c/e.jpeg", "notes.txt", "._a.png", "f.gif"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [str(path.relative_to(tmp_path)) for path in images.list_images(tmp_path)]
    assert found == ["a.png", "b.JPG", "c/d.WebP", "c/e.jpeg"]
    assert images.list_images(tmp_path / "a.png") == [tmp_path / "a.png"]
    with pytest.raises(FileNotFoundError, match="gone"):
        images.list_images(tmp_path / "gone")
    for nothing in (tmp_path / "folder.png", tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match=r"\.webp files; got none in .*(folder|notes)"):
            images.list_images(nothing)
