"""Read, resize, crop, convert and write images; no other file converts to or from uint8.

The resize is the one TiTok was evaluated with: PIL's antialiased bicubic on the shorter edge, then
a center crop. A tensor-mode or non-antialiased resize gives other pixels and another rFID.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from titok_fast.io.files import write_atomic

ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
# a 1 x 60000 strip is a small file, but 4 gigapixels once its shorter edge is 256
_MAX_ASPECT = 100


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read one image file as RGB, upright.

    Transparency is composited on white, the EXIF orientation applied, 16-bit grey scaled to 8 bits;
    of an animation the first frame is taken.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: empty, truncated, not an image, over twice PIL.Image.MAX_IMAGE_PIXELS, or in a
            mode without a defined way to RGB.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            return _to_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"load_image: no file {path}; check the path") from None
    except Exception as error:  # damaged files make Pillow raise a dozen types
        empty = path.is_file() and path.stat().st_size == 0
        reason = "the file is empty" if empty else f"{type(error).__name__}: {error}"
        message = f"load_image: cannot read {path} as an image: {reason}"
        raise ValueError(f"{message}; replace the file or leave it out") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image)
    if image.mode == "F":
        raise ValueError("mode F (float) has no defined range; convert it to 8 bits first")
    if image.has_transparency_data:
        # Pillow converts premultiplied grey (La) to LA only
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255; Pillow's own conversion clips at 255 and turns most of it white."""
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        got = f"{values.min()}..{values.max()}"
        raise ValueError(f"mode {image.mode} is read as 16-bit, 0..65535; got {got}")
    grey = (values + 128) // 257  # 65535 / 255, rounded
    if "transparency" in image.info:  # a PNG may name one grey level as transparent
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def to_tensor(images: ImageLike | Sequence[ImageLike], size: int) -> Tensor:
    """Turn images into a batch for the tokenizer.

    All but float tensors may have any size: they are resized and center-cropped on the host.

    Args:
        images: one, or a list or tuple, of: path; PIL image (any mode, EXIF orientation applied);
            numpy uint8 (H, W, 3) or (B, H, W, 3); torch uint8, or floats in [0, 1], (3, H, W) or
            (B, 3, H, W).
        size: side S of the result in pixels.

    Returns:
        (B, 3, S, S) float32 in [0, 1], in new memory, on the tensors' device or else the CPU; B = 0
        for an empty list. Checking the range of a float tensor waits for its device.

    Raises:
        ValueError: wrong type, dtype, channels or layout; a float tensor of another size, out of
            [0, 1] or with NaN; tensors on several devices; an unreadable file.
        FileNotFoundError: a path that does not exist.
    """
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"to_tensor wants size as an int of 1 or more; got {size!r}")
    items: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
    parts = [_convert(item, size, f"to_tensor, item {i}") for i, item in enumerate(items)]
    devices = sorted({str(part.device) for part in parts})
    if len(devices) > 1:
        raise ValueError(f"to_tensor wants all images on one device; got {devices}; move them")
    return torch.cat(parts) if parts else torch.empty(0, 3, size, size)


def _convert(item: ImageLike, size: int, name: str) -> Tensor:
    """One item of `to_tensor` -> (B, 3, S, S) float32."""
    if isinstance(item, str | os.PathLike):
        return _fit_images([load_image(item)], size, name)
    if isinstance(item, Image.Image):
        try:
            image = _to_rgb(item)
        except (OSError, ValueError) as error:  # decoding happens here: Image.open is lazy
            raise ValueError(f"{name}: cannot convert this PIL image to RGB: {error}") from error
        return _fit_images([image], size, name)
    if isinstance(item, np.ndarray):
        return _convert_array(item, size, name)
    if isinstance(item, Tensor):
        return _convert_tensor(item, size, name)
    wanted = "a path, PIL image, numpy array or torch tensor, or a list or tuple of these"
    raise ValueError(f"{name}: wants {wanted}; got {type(item).__name__}")


def _convert_array(array: np.ndarray, size: int, name: str) -> Tensor:
    if array.dtype != np.uint8:
        hint = "pass floats in [0, 1] as a torch tensor (3, H, W)"
        raise ValueError(f"{name}: wants a numpy array of uint8; got {array.dtype}; {hint}")
    if array.ndim not in (3, 4) or array.shape[-1] != 3:
        hint = "pass grey or transparent images as PIL images, channels-first ones as tensors"
        raise ValueError(f"{name}: wants (H, W, 3) or (B, H, W, 3); got {array.shape}; {hint}")
    batch = array if array.ndim == 4 else array[None]
    # a copy: torch takes neither negative strides nor read-only memory
    return _fit_batch(torch.from_numpy(batch.copy()), size, name)


def _convert_tensor(tensor: Tensor, size: int, name: str) -> Tensor:
    shape = tuple(tensor.shape)
    if tensor.ndim not in (3, 4) or shape[-3] != 3:
        hint = "tensors are channels-first, numpy arrays channels-last"
        raise ValueError(f"{name}: wants a tensor (3, H, W) or (B, 3, H, W); got {shape}; {hint}")
    batch = tensor if tensor.ndim == 4 else tensor[None]
    if tensor.dtype == torch.uint8:
        return _fit_batch(batch.permute(0, 2, 3, 1), size, name)
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: wants uint8 or floats in [0, 1]; got {tensor.dtype}; convert")
    if shape[-2:] != (size, size):
        hint = "float tensors are not resized: pass uint8 or a PIL image, or resize it yourself"
        raise ValueError(f"{name}: wants (3, {size}, {size}); got {shape[-3:]}; {hint}")
    if tensor.numel():
        low, high = (float(x) for x in torch.aminmax(batch.detach()))
        if not (low >= 0.0 and high <= 1.0):  # written so that NaN, which aminmax keeps, fails too
            hint = "divide 0..255 by 255, map [-1, 1] by (x + 1) / 2, clamp what overshoots"
            raise ValueError(f"{name}: wants values in [0, 1]; got {low:g}..{high:g}; {hint}")
    return batch.float()


def _fit_batch(batch: Tensor, size: int, name: str) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, S, S) float32 on the same device."""
    if batch.shape[1:3] == (size, size):
        return _scale(batch)
    return _fit_images(to_pil(batch), size, name).to(batch.device)


def _fit_images(images: list[Image.Image], size: int, name: str) -> Tensor:
    """RGB images of any sizes -> (B, 3, S, S) float32."""
    fitted = [np.asarray(_resize_crop(image, size, name)) for image in images]
    # the reshape gives an empty list its shape
    return _scale(torch.from_numpy(np.array(fitted, np.uint8).reshape(-1, size, size, 3)))


def _scale(batch: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32 in [0, 1], contiguous."""
    planes = batch.permute(0, 3, 1, 2)
    return planes.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _resize_crop(image: Image.Image, size: int, name: str) -> Image.Image:
    """Shorter edge to `size`, then the center square; pixel for pixel what torchvision gives."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if short < 1 or long > _MAX_ASPECT * short:
        wanted = f"sides above zero and at most {_MAX_ASPECT} times each other"
        raise ValueError(f"{name}: wants {wanted}; got {width} x {height}; crop it first")
    new_long = int(size * long / short)  # torchvision truncates here ...
    new_size = (size, new_long) if width <= height else (new_long, size)
    if new_size != image.size:
        image = image.resize(new_size, Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2.0) for side in new_size)  # ... and rounds half to even
    return image.crop((left, top, left + size, top + size))


def to_uint8(pixels: Tensor, *, rounding: Literal["truncate", "round"] = "truncate") -> Tensor:
    """Turn decoded pixels into bytes, by float32 arithmetic: bfloat16 has no fraction above 128.

    Args:
        pixels: (B, 3, H, W), any floating dtype; values outside [0, 1] are clamped.
        rounding: "truncate" for samples, as the published sampling script does; "round" (half to
            even) for reconstructions, as the published evaluation does. Mixing them moves FID.

    Returns:
        (B, H, W, 3) uint8, contiguous, on the same device, without gradient.

    Raises:
        ValueError: wrong shape, dtype or rounding; on the CPU also NaN. Elsewhere the check would
            make the host wait, and a NaN becomes 0.
    """
    if rounding not in ("truncate", "round"):
        raise ValueError(f'to_uint8 wants rounding "truncate" or "round"; got {rounding!r}')
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"to_uint8 wants pixels (B, 3, H, W); got {tuple(pixels.shape)}")
    if not pixels.is_floating_point():
        raise ValueError(f"to_uint8 wants a floating dtype in [0, 1]; got {pixels.dtype}")
    if pixels.device.type == "cpu" and pixels.isnan().any():
        raise ValueError("to_uint8 wants numbers; got NaN; check the model's weights and dtype")
    x = pixels.detach().float().nan_to_num(nan=0.0).clamp_(0, 1).mul_(255)
    x = x.round_() if rounding == "round" else x
    return x.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_pil(pixels: Tensor | np.ndarray) -> list[Image.Image]:
    """(B, H, W, 3) uint8, as `to_uint8` returns it, to B RGB images.

    Raises:
        ValueError: wrong shape or dtype.
    """
    pixels = torch.as_tensor(pixels)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != torch.uint8:
        got = f"{tuple(pixels.shape)} {pixels.dtype}"
        raise ValueError(f"to_pil wants (B, H, W, 3) uint8; got {got}; use to_uint8 first")
    return [Image.fromarray(x) for x in pixels.cpu().contiguous().numpy()]


def grid(images: Sequence[Image.Image], columns: int | None = None, pad: int = 2) -> Image.Image:
    """Arrange images in rows on white.

    Args:
        images: at least one image, all of one size.
        columns: images per row; by default the grid is nearly square.
        pad: pixels between images and around the whole.

    Raises:
        ValueError: no image, several sizes, columns below 1 or pad below 0.
    """
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise ValueError(f"grid wants one or more images of one size; got sizes {sizes}")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1 or pad < 0:
        raise ValueError(f"grid wants columns >= 1 and pad >= 0; got {columns} and {pad}")
    width, height = sizes[0][0] + pad, sizes[0][1] + pad
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * width + pad, rows * height + pad), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (pad + i % columns * width, pad + i // columns * height))
    return sheet


def save_png(path: str | os.PathLike[str], image: Image.Image) -> None:
    """Write a PNG atomically, in a folder that exists.

    Raises:
        ValueError: another suffix.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"save_png wants a file name ending in .png; got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save_png: no folder {path.parent}; create it first")
    write_atomic(path, lambda part: image.save(part, format="PNG"))


def list_images(path: str | os.PathLike[str]) -> list[Path]:
    """The jpg, jpeg, png and webp files in a folder, at any depth, or one such file; sorted.

    Hidden files are skipped: some systems leave one beside each image, with its suffix.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: no image there.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"list_images: no file or folder {path}; check the path")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    found = [f for f in files if f.suffix.lower() in _SUFFIXES and not f.name.startswith(".")]
    if not found:
        wanted = ", ".join(sorted(_SUFFIXES))
        raise ValueError(f"list_images wants {wanted} files; got none in {path}; check the path")
    return sorted(found)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in two (B, H, W, 3) uint8: (B,) float64, in dB."""
    error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / error)
