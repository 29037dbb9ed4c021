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
from PIL import Image
from tqdm import tqdm

from titok_fast.attention import backend_name
from titok_fast.config import GeneratorConfig, SamplingConfig, TokenizerConfig
from titok_fast.fast import check_techniques, chosen
from titok_fast.files import fetch
from titok_fast.images import grid, list_images, save_png, to_pil, to_tensor, to_uint8
from titok_fast.pipeline import TiTokPipeline
from titok_fast.presets import preset
from titok_fast.sample_options import place
from titok_fast.sampling import sample_seeds
from titok_fast.token_files import check_suffix, read_ids, write_ids
from titok_fast.tokenizer import TiTok


class Album:
    """Where pictures go: a folder of PNG files, one sheet, both, or nowhere.

    Args:
        names: file names in order, one per picture.
        out: folder, made if need be; None writes no single files.
        sheet: PNG file that shows all pictures in rows; None writes none.
        force: existing files may be replaced.

    Raises:
        ValueError: the sheet's name does not end in .png, or there is nothing to put on it.
        OSError: a file to write exists (without `force`), or a folder cannot be had.
    """

    def __init__(
        self, names: Sequence[str], out: Path | None, sheet: Path | None, *, force: bool
    ) -> None:
        self.paths = [out / name for name in names] if out else []
        self.sheet, self.done = sheet, 0
        self._kept: list[Image.Image] = []
        if sheet is not None and (sheet.suffix.lower() != ".png" or not names):
            raise ValueError(f"--grid wants a name ending in .png, and a picture; got {sheet}")
        refuse_existing([*self.paths, *([sheet] if sheet else [])], force=force)
        if sheet is not None:
            sheet.parent.mkdir(parents=True, exist_ok=True)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)

    def add(self, pictures: list[Image.Image]) -> None:
        """Write the next pictures."""
        for picture in pictures:
            if self.paths:
                save_png(self.paths[self.done], picture)
            if self.sheet is not None:
                self._kept.append(picture)
            self.done += 1

    def close(self) -> None:
        """Write the sheet, if one is wanted."""
        if self.sheet is not None:
            save_png(self.sheet, grid(self._kept))


def refuse_existing(paths: Sequence[Path], *, force: bool) -> None:
    """Raise FileExistsError if a file would be replaced without `force`."""
    existing = [path for path in paths if path.exists()]
    folders = [path for path in existing if path.is_dir()]
    if folders:
        raise IsADirectoryError(f"{folders[0]} is a folder; a file is to be written there")
    if existing and not force:
        count = f"{len(existing)} outputs exist" if len(existing) > 1 else "the output exists"
        raise FileExistsError(f"{count} already: {existing[0]}; pass --force to overwrite")


def sample(args: argparse.Namespace) -> Iterator[str]:
    """Draw pictures of classes."""
    if args.out is None and args.grid is None:
        raise ValueError("sample wants --out DIR, --grid FILE, or both: where do the pictures go?")
    settings = {
        "num_sample_steps": args.steps,
        "guidance_scale": args.guidance,
        "guidance_interval": args.guidance_interval,
        "randomize_temperature": args.temperature,
        "schedule": args.schedule,
        "confidence": args.confidence,
    }
    SamplingConfig().but(**settings)
    _check_options(args)
    _tokens(_tokenizer_config(args))
    classes = _generator_config(args).condition_num_classes
    outside = [label for label in args.labels if not 0 <= label < classes]
    if outside:
        raise ValueError(f"labels lie in 0..{classes - 1}; got {outside[0]}")
    labels = [label for label in args.labels for _ in range(args.num)]
    names = [f"{i:06d}_{label}.png" for i, label in enumerate(labels)]
    album = Album(names, args.out, args.grid, force=args.force)
    pipe = _load(args)
    seeds, size = sample_seeds(args.seed, len(labels)), _batch_size(args, pipe)
    with _progress(args, len(labels)) as bar:
        for part in _chunks(len(labels), size):
            pictures = pipe(labels[part], seeds=seeds[part], batch_size=size, **settings)
            album.add(pictures)  # type: ignore[arg-type]  # "pil" gives a list
            bar.update(len(pictures))
        album.close()
    yield from _where(args, len(labels))


def reconstruct(args: argparse.Namespace) -> Iterator[str]:
    """Pictures through the tokenizer and back."""
    _check_options(args)
    config = _decodes(_tokenizer_config(args))
    paths = _pictures(args.inputs)
    names = [f"{i:06d}_{path.stem}.png" for i, path in enumerate(paths)]
    album = Album(names, args.out, args.grid, force=args.force)
    pipe = _load(args)
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
    _check_options(args)
    config = _tokens(_tokenizer_config(args))
    smallest = torch.int16 if config.codebook_size <= 2**15 else torch.int32
    dtype = getattr(torch, args.id_dtype) if args.id_dtype else smallest
    if config.codebook_size - 1 > torch.iinfo(dtype).max:
        raise ValueError(f"--id-dtype int16 is too small for {config.codebook_size} codes")
    paths = _pictures(args.inputs)
    refuse_existing([args.out], force=args.force)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pipe = _load(args)
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
    _check_options(args)
    config, record = _tokens(_decodes(_tokenizer_config(args))), read_ids(args.ids)
    wanted = (config.num_latent_tokens, config.codebook_size)
    if (record.ids.shape[1], record.codebook_size) != wanted:
        got = f"{record.ids.shape[1]} of {record.codebook_size}"
        raise ValueError(
            f"{args.ids} holds {got} codes, this tokenizer has {wanted[0]} of {wanted[1]}: "
            "use the one that made them"
        )
    names = [f"{i:06d}_{Path(name).stem}.png" for i, name in enumerate(record.files)]
    album = Album(names, args.out, args.grid, force=args.force)
    pipe = _load(args)
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


def _check_options(args: argparse.Namespace) -> None:
    """What argparse cannot say about the options that all working commands share."""
    try:
        device = torch.device(args.device) if args.device else None
    except RuntimeError as error:
        raise ValueError(f"--device wants cpu, cuda or cuda:1; got {args.device!r}") from error
    if device is not None and device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"--device {device}: torch sees {count} CUDA devices here")
    backend_name(args.attention)
    there, dtype = place(args)
    check_techniques(chosen(args.fast, there.type), there.type, dtype)
    weights = [args.tokenizer, getattr(args, "generator", None)]
    if args.random_weights and any(weights):
        raise ValueError("--random-weights and a place of weights exclude each other")
    if args.model is None and args.tokenizer is None:
        raise ValueError("name a published model with --model, or weights with --tokenizer")


def _tokenizer_config(args: argparse.Namespace) -> TokenizerConfig:
    if args.model is None:
        return TokenizerConfig.from_official(_config_file(args.tokenizer, "tokenizer"))
    known = preset(args.model)
    if not args.random_weights and not (args.tokenizer or known.tokenizer_hub):
        raise FileNotFoundError(f"no weights of {args.model} were published: pass --tokenizer")
    if args.tokenizer:
        fetch(args.tokenizer)
    return known.tokenizer


def _generator_config(args: argparse.Namespace) -> GeneratorConfig:
    known = preset(args.model) if args.model else None
    if known is None or known.generator is None:
        if args.generator is None:
            name = f"{args.model} has no generator" if args.model else "drawing wants a generator"
            raise ValueError(f"{name}: pass --generator")
        return GeneratorConfig.from_official(_config_file(args.generator, "generator"))
    if not args.random_weights and not (args.generator or known.generator_hub):
        raise FileNotFoundError(f"no generator of {args.model} was published: pass --generator")
    if args.generator:
        fetch(args.generator)
    return known.generator


def _config_file(source: str, part: str) -> Path:
    _, config = fetch(source)
    if config is None:
        raise FileNotFoundError(f"--{part} {source} has no config.json: name its preset by --model")
    return config


def _decodes(config: TokenizerConfig) -> TokenizerConfig:
    if config.is_legacy and not config.finetune_decoder:
        raise ValueError("a stage-1 tokenizer predicts proxy codes, not pixels")
    return config


def _tokens(config: TokenizerConfig) -> TokenizerConfig:
    if config.quantize_mode != "vq":
        raise ValueError("a VAE tokenizer has no token ids; `reconstruct` works")
    return config


def _load(args: argparse.Namespace) -> TiTokPipeline:
    pipe = _models(args)
    return pipe.compile(args.fast) if args.fast else pipe


def _models(args: argparse.Namespace) -> TiTokPipeline:
    device, dtype = place(args)
    options = {"device": device, "dtype": dtype, "attention": args.attention}
    if args.random_weights:
        sys.stderr.write("titok-fast: random weights, untrained: the pictures are noise\n")
        return TiTokPipeline.random(args.model, **options)
    if args.command == "sample":
        sources = {"tokenizer": args.tokenizer, "generator": args.generator}
        return TiTokPipeline.from_pretrained(args.model, **sources, **options)
    if args.model is None:
        return TiTokPipeline(TiTok.from_pretrained(args.tokenizer, **options))
    known = preset(args.model)  # its generator is left alone: nothing is drawn
    source = args.tokenizer or known.tokenizer_hub
    assert source is not None  # _tokenizer_config refused that
    return TiTokPipeline(TiTok.from_pretrained(source, config=known.tokenizer, **options))


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
