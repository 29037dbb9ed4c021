"""The work behind `titok-fast`: each command checks its arguments, loads, works, yields its lines.

Everything that can be refused is refused before weights are read into memory, output folders
included. Pictures are handled a batch at a time, so that 50,000 of them need no more memory than
one batch (the sheet of `--grid` excepted).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from tqdm import tqdm

from titok_fast.cli.album import Album, refuse_existing
from titok_fast.cli.models import (
    check_options,
    decodes,
    generator_config,
    has_tokens,
    load,
    tokenizer_config,
)
from titok_fast.cli.options import settings
from titok_fast.config import SamplingConfig
from titok_fast.io.images import list_images, to_pil, to_tensor, to_uint8
from titok_fast.io.token_files import check_suffix, read_ids, write_ids
from titok_fast.pipeline import TiTokPipeline
from titok_fast.presets import check_classes, preset
from titok_fast.sampling.unmask import sample_seeds

_MOST_COLUMNS = 20  # wider sheets do not fit a screen

# evaluation/command.py takes refuse_existing from here
__all__ = ["detokenize", "psnr", "reconstruct", "refuse_existing", "sample", "tokenize"]


def sample(args: argparse.Namespace) -> Iterator[str]:
    """Draw pictures of classes."""
    if args.out is None and args.grid is None:
        raise ValueError("sample wants --out DIR, --grid FILE, or both: where do the pictures go?")
    changes = settings(args)
    SamplingConfig().updated(**changes)
    check_options(args)
    has_tokens(tokenizer_config(args))
    labels = _labels(args, generator_config(args).condition_num_classes)
    names = [f"{i:06d}_{label}.png" for i, label in enumerate(labels)]
    album = Album(names, args.out, args.grid, force=args.force, columns=_columns(args, labels))
    pipe = load(args)
    seeds, size = sample_seeds(args.seed, len(labels)), _batch_size(args, pipe)
    with _progress(args, len(labels)) as bar:
        for part in _chunks(len(labels), size):
            pictures = pipe(labels[part], seeds=seeds[part], batch_size=size, **changes)
            album.add(pictures)  # type: ignore[arg-type]  # "pil" gives a list
            bar.update(len(pictures))
        album.close()
    yield from _where(args, len(labels))


def _labels(args: argparse.Namespace, classes: int) -> list[int]:
    """What each picture is to show: --num of each label, or the classes in turn."""
    if args.labels is None:
        return [i % classes for i in range(args.num or classes)]
    check_classes(args.labels, classes, preset(args.model).classes if args.model else ())
    return [label for label in args.labels for _ in range(args.num or 1)]


def _columns(args: argparse.Namespace, labels: list[int]) -> int | None:
    """Where classes take turns and are few, a column of the sheet for each."""
    count = len(set(labels))
    return count if args.labels is None and count <= _MOST_COLUMNS else None


def reconstruct(args: argparse.Namespace) -> Iterator[str]:
    """Pictures through the tokenizer and back."""
    check_options(args)
    config = decodes(tokenizer_config(args))
    paths = _pictures(args.inputs)
    names = [f"{i:06d}_{path.stem}.png" for i, path in enumerate(paths)]
    album = Album(names, args.out, args.grid, force=args.force)
    pipe = load(args)
    size, decibels = _batch_size(args, pipe), []
    with _progress(args, len(paths)) as bar:
        for part in _chunks(len(paths), size):
            batch = to_tensor(paths[part], config.crop_size)
            given = to_uint8(batch, rounding="round").numpy()
            made = pipe.reconstruct(batch, batch_size=size, output="numpy")
            assert isinstance(made, np.ndarray)
            decibels += [psnr(a, b) for a, b in zip(given, made, strict=True)]
            album.add(to_pil(np.concatenate([given, made], axis=2) if args.side_by_side else made))
            bar.update(len(made))
        album.close()
    for value, path in zip(decibels, paths, strict=True):
        yield f"{value:7.2f} dB  {path}"
    yield f"{np.mean(decibels):7.2f} dB  mean PSNR of {len(paths)}"
    yield from _where(args, len(paths))


def tokenize(args: argparse.Namespace) -> Iterator[str]:
    """Pictures to a file of token ids."""
    check_suffix(args.out)
    check_options(args)
    config = has_tokens(tokenizer_config(args))
    smallest = torch.int16 if config.codebook_size <= 2**15 else torch.int32
    dtype = getattr(torch, args.id_dtype) if args.id_dtype else smallest
    if config.codebook_size - 1 > torch.iinfo(dtype).max:
        raise ValueError(f"--id-dtype int16 is too small for {config.codebook_size} codes")
    paths = _pictures(args.inputs)
    refuse_existing([args.out], force=args.force)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pipe = load(args)
    size, rows = _batch_size(args, pipe), []
    with _progress(args, len(paths)) as bar:
        for part in _chunks(len(paths), size):
            ids = pipe.tokenize(list(paths[part]), dtype=dtype, batch_size=size)
            rows.append(ids.numpy())
            bar.update(len(ids))
    names = [path.as_posix() for path in paths]
    write_ids(args.out, np.concatenate(rows), names, codebook_size=config.codebook_size)
    yield f"{len(paths)} x {config.num_latent_tokens} ids in {args.out}"


def detokenize(args: argparse.Namespace) -> Iterator[str]:
    """A file of token ids to pictures."""
    if args.out is None and args.grid is None:
        raise ValueError("detokenize wants --out DIR, --grid FILE, or both")
    check_options(args)
    config, record = has_tokens(decodes(tokenizer_config(args))), read_ids(args.ids)
    wanted = (config.num_latent_tokens, config.codebook_size)
    if (record.ids.shape[1], record.codebook_size) != wanted:
        got = f"{record.ids.shape[1]} of {record.codebook_size}"
        raise ValueError(
            f"{args.ids} holds {got} codes, this tokenizer has {wanted[0]} of {wanted[1]}: "
            "use the one that made them"
        )
    names = [f"{i:06d}_{Path(name).stem}.png" for i, name in enumerate(record.files)]
    album = Album(names, args.out, args.grid, force=args.force)
    pipe = load(args)
    size, ids = _batch_size(args, pipe), torch.from_numpy(record.ids)
    with _progress(args, len(names)) as bar:
        for part in _chunks(len(names), size):
            pictures = pipe.detokenize(ids[part], batch_size=size)
            album.add(pictures)  # type: ignore[arg-type]  # "pil" gives a list
            bar.update(len(pictures))
        album.close()
    yield from _where(args, len(names))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures of one shape; inf where equal."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def _batch_size(args: argparse.Namespace, pipe: TiTokPipeline) -> int:
    return args.batch_size or pipe.default_batch_size


def _pictures(inputs: Sequence[Path]) -> list[Path]:
    return [path for source in inputs for path in list_images(source)]


def _chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, start + size)


def _progress(args: argparse.Namespace, total: int) -> "tqdm[NoReturn]":
    return tqdm(total=total, unit="image", desc=args.command, disable=args.quiet, file=sys.stderr)


def _where(args: argparse.Namespace, count: int) -> Iterator[str]:
    if args.out is not None:
        yield f"{count} pictures in {args.out}"
    if args.grid is not None:
        yield f"sheet of {count} in {args.grid}"
