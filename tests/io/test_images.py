"""Pictures in, on photographs that ship with scikit-image and on damaged files."""

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from titok_fast.io import images

PHOTOS = Path(skimage.__file__).parent / "data"
# square and landscape, one with odd sides; all inside the wheel, so that nothing is downloaded
NAMES = ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def torchvision_eval(picture: Image.Image, size: int) -> torch.Tensor:
    transforms = pytest.importorskip("torchvision").transforms
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(size, bicubic), transforms.CenterCrop(size), transforms.ToTensor()]
    return transforms.Compose(steps)(picture)


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("name", NAMES)
def test_photo_equals_torchvision_bit_for_bit(name: str, size: int) -> None:
    picture = Image.open(PHOTOS / name).convert("RGB")
    got = images.to_tensor(PHOTOS / name, size)
    assert got.shape == (1, 3, size, size)
    assert torch.equal(got[0], torchvision_eval(picture, size))
    assert got.std() > 0.1  # a photograph, not a blank


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_any_size_equals_torchvision(height: int, width: int, size: int) -> None:
    picture = Image.fromarray(noise(height, width))
    assert torch.equal(images.to_tensor(picture, size)[0], torchvision_eval(picture, size))


def test_half_pixel_offset_rounds_to_even() -> None:
    # widths 8 + 1, 3, 5: offsets 0.5, 1.5, 2.5 -> 0, 2, 2; a floor gives 0, 1, 2
    for width, left in [(9, 0), (11, 2), (13, 2)]:
        array = noise(8, width)
        got = images.to_tensor(array, 8)[0]
        assert torch.equal(got, torch.from_numpy(array[:, left : left + 8]).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("shape", [(40, 60), (32, 32)])
def test_every_input_kind_gives_the_same_pixels(shape: tuple[int, int], tmp_path: Path) -> None:
    array = noise(*shape)
    picture, chw = Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1)
    images.save_png(tmp_path / "a.png", picture)
    path = tmp_path / "a.png"
    kinds = [path, str(path), picture, array, array[None], chw, chw[None]]
    wanted = images.to_tensor(picture, 32)
    for kind in kinds:
        assert torch.equal(images.to_tensor(kind, 32), wanted)
    batch = images.to_tensor(kinds, 32)
    assert batch.shape == (7, 3, 32, 32)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, wanted.expand(7, -1, -1, -1))


def test_array_with_negative_strides_and_read_only() -> None:
    array = noise(20, 20)
    flipped = array[::-1, ::-1]
    assert torch.equal(images.to_tensor(flipped, 20), images.to_tensor(flipped.copy(), 20))
    array.flags.writeable = False
    assert torch.equal(images.to_tensor(array, 20)[0, :, 0, 0] * 255, torch.tensor(array[0, 0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_float_tensor_keeps_its_values_in_new_memory(dtype: torch.dtype) -> None:
    x = torch.rand(2, 3, 16, 16).to(dtype)
    got = images.to_tensor(x, 16)
    assert got.dtype == torch.float32
    assert torch.equal(got, x.float())
    assert got.data_ptr() != x.data_ptr()


def test_float_tensor_keeps_its_gradient() -> None:
    x = torch.rand(3, 8, 8, requires_grad=True)
    images.to_tensor(x, 8).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8, 8))


@pytest.mark.parametrize(
    "empty", [[], (), torch.empty(0, 3, 16, 16), torch.empty(0, 3, 9, 7, dtype=torch.uint8)]
)
def test_empty_batch(empty: Any) -> None:
    got = images.to_tensor(empty, 16)
    assert got.shape == (0, 3, 16, 16)
    assert got.dtype == torch.float32


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.rand(3, 15, 16), ["(3, 16, 16)", "(3, 15, 16)", "not resized"]),
        (torch.rand(16, 16, 3), ["(3, H, W)", "(16, 16, 3)", "channels-first"]),
        (torch.rand(1, 1, 16, 16), ["(1, 1, 16, 16)"]),
        (torch.rand(16, 16), ["(16, 16)"]),
        (torch.rand(3, 16, 16) * 255, ["[0, 1]", "divide"]),
        (torch.rand(3, 16, 16) - 1e-2, ["[0, 1]", "-0.0"]),
        (torch.full((3, 16, 16), 1.001), ["1.001"]),
        (torch.rand(3, 16, 16).index_fill(1, torch.tensor([4]), float("nan")), ["nan"]),
        (torch.rand(3, 16, 16).index_fill(1, torch.tensor([4]), float("inf")), ["inf"]),
        (torch.zeros(3, 16, 16, dtype=torch.int64), ["torch.int64", "uint8"]),
        (np.zeros((16, 16, 3)), ["float64", "uint8"]),
        (np.zeros((3, 16, 16), np.uint8), ["(H, W, 3)", "(3, 16, 16)"]),
        (np.zeros((16, 16, 4), np.uint8), ["(16, 16, 4)", "PIL"]),
        (np.zeros((0, 16, 3), np.uint8), ["16 x 0"]),
        (Image.new("RGB", (1, 101)), ["1 x 101", "crop"]),
        (Image.new("F", (16, 16)), ["to_tensor, item 0", "mode F"]),
        (None, ["NoneType"]),
        ([b"png"], ["bytes"]),
    ],
)
def test_bad_input_is_refused_by_name(bad: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        images.to_tensor(bad, 16)
    for word in words:
        assert word in str(error.value)


def test_error_names_the_item_and_the_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="to_tensor, item 1"):
        images.to_tensor([noise(16, 16), torch.rand(3, 4, 4)], 16)
    for size in (0, -1, 2.5, "256"):
        with pytest.raises(ValueError, match="wants size"):
            images.to_tensor(noise(16, 16), size)


def test_tensors_on_two_devices_are_refused() -> None:
    mixed = [torch.empty(0, 3, 8, 8), torch.empty(0, 3, 8, 8, device="meta")]
    with pytest.raises(ValueError, match=r"one device.*cpu.*meta"):
        images.to_tensor(mixed, 8)


def see_through() -> Image.Image:
    """Random colours; the upper third transparent, the middle opaque, the lower in between."""
    array = noise(6, 6, 4)
    array[:2, :, 3] = 0
    array[2:4, :, 3] = 255
    return Image.fromarray(array)


def assert_on_white(got: Image.Image, source: Image.Image) -> None:
    rgba = np.asarray(source.convert("RGBA"), float)
    alpha = rgba[..., 3:] / 255
    pixels = np.asarray(got, float)
    assert np.abs(pixels - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    assert (pixels[alpha[..., 0] == 0] == 255).all()
    assert (pixels != 255).any()


@pytest.mark.parametrize("steps", [["RGBA"], ["LA"], ["LA", "PA"], ["RGBa"], ["LA", "La"]])
def test_transparent_pil_images_are_composited_on_white(steps: list[str]) -> None:
    picture = see_through()
    for mode in steps:
        picture = picture.convert(mode)
    got = images.to_tensor(picture, 6)
    source = picture.convert("LA") if steps[-1] == "La" else picture
    assert_on_white(images.to_pil(images.to_uint8(got, rounding="round"))[0], source)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_transparent_files_are_composited_on_white(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    see_through().save(path, lossless=True)
    assert_on_white(images.load_image(path), Image.open(path))


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_one_transparent_colour_is_white(mode: str, tmp_path: Path) -> None:
    picture = Image.fromarray(np.full((4, 4, 3), 40, np.uint8)).convert(mode)
    picture.putpixel((1, 1), {"P": 200, "L": 7, "RGB": (1, 2, 3)}[mode])
    key = picture.getpixel((1, 1))
    picture.save(tmp_path / "a.png", transparency=key)
    got = np.asarray(images.load_image(tmp_path / "a.png"))
    assert (got[1, 1] == 255).all()
    assert (got[0, 0] < 60).all()


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257], [25700, 32768, 65406, 65535]], np.uint16)
    wanted = np.round(values / 257).astype(np.uint8)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        got = np.asarray(images.load_image(tmp_path / name))
        assert np.array_equal(got, np.repeat(wanted[..., None], 3, axis=2))
    wide = Image.fromarray(values.astype(np.int32))
    assert torch.equal(
        images.to_tensor(wide.crop((0, 0, 2, 2)), 2)[0, 0] * 255, torch.tensor(wanted[:, :2])
    )
    with pytest.raises(ValueError, match=r"0\.\.65535; got 0\.\.65536"):
        images.to_tensor(Image.fromarray(np.array([[0, 65536]], np.int32)), 2)


def test_sixteen_bit_transparent_level_is_white(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[100, 5000]], np.uint16))
    picture.save(tmp_path / "a.png", transparency=5000)
    assert np.asarray(images.load_image(tmp_path / "a.png"))[0].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "LAB", "P"])
def test_other_modes_become_rgb(mode: str) -> None:
    photo = Image.open(PHOTOS / "chelsea.png")
    picture = photo.convert(mode)
    got = images.to_pil(images.to_uint8(images.to_tensor(picture, 300)))[0]
    assert np.array_equal(
        np.asarray(got), np.asarray(picture.convert("RGB").crop((76, 0, 376, 300)))
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(noise(5, 7))
    stored.save(tmp_path / "a.png", exif=exif)
    turned = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    assert turned.size == ((5, 7) if orientation > 4 else (7, 5))
    assert (np.array_equal(turned, stored)) == (orientation == 1)
    got = images.load_image(tmp_path / "a.png")
    assert np.array_equal(got, turned)
    by_path, by_open, by_load = (
        images.to_tensor(x, 5) for x in (tmp_path / "a.png", Image.open(tmp_path / "a.png"), got)
    )
    assert torch.equal(by_path, by_open)
    assert torch.equal(by_path, by_load)


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"load_image: no file .*gone\.jpg"):
        images.load_image(tmp_path / "gone.jpg")
    (tmp_path / "zero.jpg").touch()
    with pytest.raises(ValueError, match=r"zero\.jpg.*the file is empty"):
        images.load_image(tmp_path / "zero.jpg")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"text\.png.*cannot identify.*replace"):
        images.to_tensor(tmp_path / "text.png", 16)
    with pytest.raises(ValueError, match="cannot read"):
        images.load_image(tmp_path)


@pytest.mark.parametrize("name", ["rocket.jpg", "chelsea.png"])
def test_truncated_photo_is_refused(name: str, tmp_path: Path) -> None:
    data = (PHOTOS / name).read_bytes()
    for keep in (0.01, 0.5, 0.95):
        (tmp_path / name).write_bytes(data[: int(keep * len(data))])
        with pytest.raises(ValueError, match=f"load_image: cannot read .*{name}"):
            images.load_image(tmp_path / name)


def test_truncated_photo_opened_by_the_caller_is_refused() -> None:
    data = (PHOTOS / "rocket.jpg").read_bytes()
    picture = Image.open(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(ValueError, match=r"to_tensor, item 0: .*truncated"):
        images.to_tensor(picture, 64)


def test_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images.save_png(tmp_path / "bomb.png", Image.new("RGB", (64, 64)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png.*4096 pixels"):
        images.load_image(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["png", "jpeg", "webp", "gif", "tiff"]), st.data())
def test_damaged_files_give_a_picture_or_a_value_error(kind: str, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(9, 9)).save(buffer, kind)
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged"
        path.write_bytes(damaged)
        try:
            mode, message = images.load_image(path).mode, ""
        except ValueError as error:
            mode, message = "", str(error)
        assert mode == "RGB" or str(path) in message
