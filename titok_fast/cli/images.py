"""`titok-fast tokenize`, `detokenize` and `reconstruct`: images to tokens to images.

Everything that can be refused is refused before weights are read, output folders included. Images
are handled a batch at a time, so that 50,000 of them need no more memory than one batch (the sheet
of `--grid` excepted).
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from titok_fast.cli.options import (
    add_force,
    add_model,
    check_outputs,
    load_pipeline,
    progress_bar,
    sources_of,
)
from titok_fast.io.images import grid, list_images, psnr, save_png, to_pil, to_tensor, to_uint8
from titok_fast.io.token_files import check_suffix, read_ids, write_ids
from titok_fast.pipeline import TiTokPipeline


class _Outputs:
    """Where images go: a folder of PNG files, one sheet, both, or nowhere.

    Args:
        args: with `out`, `grid` and `force`.
        sources: names of what the images are made of, in order.

    Raises:
        ValueError: the sheet's name does not end in .png.
        OSError: a file to write exists (without `--force`), or a folder cannot be made.
    """

    def __init__(self, args: argparse.Namespace, sources: Sequence[str | Path]) -> None:
        self.out, self.sheet, self.count = args.out, args.grid, len(sources)
        names = [f"{i:06d}_{Path(source).stem}.png" for i, source in enumerate(sources)]
        paths = [args.out / name for name in names] if args.out else []
        self._paths, self._drawn = iter(paths), list[Image.Image]()
        if args.grid is not None and args.grid.suffix.lower() != ".png":
            raise ValueError(f"--grid wants a name ending in .png; got {args.grid}")
        check_outputs([*paths, *([args.grid] if args.grid else [])], force=args.force)
        for folder in (args.out, args.grid and args.grid.parent):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)

    def add(self, images: list[Image.Image]) -> None:
        """Write the next images."""
        for image in images:
            if self.out is not None:
                save_png(next(self._paths), image)
            if self.sheet is not None:
                self._drawn.append(image)

    def close(self) -> Iterator[str]:
        """Write the sheet, if one is wanted, and say where everything is."""
        if self.out is not None:
            yield f"{self.count} images in {self.out}"
        if self.sheet is not None:
            save_png(self.sheet, grid(self._drawn))
            yield f"{self.count} images in {self.sheet}"


def add_reconstruct(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `reconstruct`."""
    parser.description = (
        "Encode images, decode them, and print the PSNR of each. Images are resized and cropped "
        "to the model's square first; PSNR is measured on that square. Without --out and --grid "
        "only numbers are printed."
    )
    _add_inputs(parser)
    what = "write input and result next to each other"
    parser.add_argument("--side-by-side", action="store_true", help=what)
    _add_outputs(parser)
    add_model(parser)


def add_tokenize(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `tokenize`."""
    parser.description = "Turn images into token ids, and write them with the images' names."
    _add_inputs(parser)
    add, what = parser.add_argument, "file to write: .npz or .json"
    add("--out", type=Path, required=True, metavar="FILE", help=what)
    what = "integer type of the ids in .npz (default: the smallest that holds the codebook)"
    add("--id-dtype", choices=("int16", "int32"), help=what)
    add_force(parser)
    add_model(parser)


def add_detokenize(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `detokenize`."""
    parser.description = "Turn the ids in a file that `tokenize` wrote into images."
    parser.add_argument("ids", type=Path, metavar="FILE", help="ids to read: .npz or .json")
    _add_outputs(parser)
    add_model(parser)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    what = "image file, or folder that is searched to any depth (jpg, png, webp)"
    parser.add_argument("inputs", nargs="+", type=Path, metavar="IMAGE", help=what)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    add, what = parser.add_argument, "folder for PNG files named {index}_{name}.png"
    add("--out", type=Path, metavar="DIR", help=what)
    add("--grid", type=Path, metavar="FILE", help="PNG file that shows all images in rows")
    add_force(parser)


def reconstruct(args: argparse.Namespace) -> Iterator[str]:
    """Images through the tokenizer and back."""
    sources = sources_of(args)
    config = sources.tokenizer_config
    config.check_has_pixels()
    paths = _images(args.inputs)
    outputs = _Outputs(args, paths)
    pipe = load_pipeline(args, sources)
    decibels: list[float] = []
    for part, size in _batches(args, pipe, len(paths)):
        batch = to_tensor(paths[part], config.crop_size)
        originals = to_uint8(batch, rounding="round")
        made = pipe.reconstruct(batch, batch_size=size, output="tensor")
        assert isinstance(made, torch.Tensor)
        decibels += psnr(originals, made).tolist()
        outputs.add(to_pil(torch.cat([originals, made], 2) if args.side_by_side else made))
    where = list(outputs.close())
    for value, path in zip(decibels, paths, strict=True):
        yield f"{value:7.2f} dB  {path}"
    yield f"{np.mean(decibels):7.2f} dB  mean PSNR of {len(paths)}"
    yield from where


def tokenize(args: argparse.Namespace) -> Iterator[str]:
    """Images to a file of token ids."""
    check_suffix(args.out)
    sources = sources_of(args)
    config = sources.tokenizer_config
    config.check_has_ids()
    smallest = torch.int16 if config.codebook_size <= 2**15 else torch.int32
    dtype = getattr(torch, args.id_dtype) if args.id_dtype else smallest
    if config.codebook_size - 1 > torch.iinfo(dtype).max:
        raise ValueError(f"--id-dtype int16 is too small for {config.codebook_size} codes")
    paths = _images(args.inputs)
    check_outputs([args.out], force=args.force)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(args, sources)
    rows = [
        pipe.tokenize(list(paths[part]), dtype=dtype, batch_size=size).numpy()
        for part, size in _batches(args, pipe, len(paths))
    ]
    names = [path.as_posix() for path in paths]
    write_ids(args.out, np.concatenate(rows), names, codebook_size=config.codebook_size)
    yield f"{len(paths)} x {config.num_latent_tokens} ids in {args.out}"


def detokenize(args: argparse.Namespace) -> Iterator[str]:
    """A file of token ids to images."""
    if args.out is None and args.grid is None:
        raise ValueError("detokenize wants --out DIR, --grid FILE, or both")
    sources = sources_of(args)
    config = sources.tokenizer_config
    config.check_has_pixels()
    config.check_has_ids()
    record = read_ids(args.ids)
    K, N = config.num_latent_tokens, config.codebook_size
    if (record.ids.shape[1], record.codebook_size) != (K, N):
        raise ValueError(
            f"{args.ids} holds {record.ids.shape[1]} of {record.codebook_size} codes, this "
            f"tokenizer has {K} of {N}: use the one that made them"
        )
    outputs = _Outputs(args, record.files)
    pipe, ids = load_pipeline(args, sources), torch.from_numpy(record.ids)
    for part, size in _batches(args, pipe, len(ids)):
        made = pipe.detokenize(ids[part], batch_size=size)
        assert isinstance(made, list)
        outputs.add(made)
    yield from outputs.close()


def _images(inputs: Sequence[Path]) -> list[Path]:
    return [path for source in inputs for path in list_images(source)]


def _batches(
    args: argparse.Namespace, pipe: TiTokPipeline, total: int
) -> Iterator[tuple[slice, int]]:
    """Slices of 0..total, each with the size of a whole one; the bar moves as they are done."""
    size = args.batch_size or pipe.default_batch_size
    with progress_bar(args, total) as bar:
        for start in range(0, total, size):
            yield slice(start, start + size), size
            bar.update(min(size, total - start))
