"""Which weights a command works on, and where: checked by the options alone, then loaded."""

import argparse
import sys
from pathlib import Path

import torch

from titok_fast.backends.techniques import check_techniques, resolve_fast
from titok_fast.cli.options import place
from titok_fast.config import GeneratorConfig, TokenizerConfig
from titok_fast.io.files import fetch
from titok_fast.loading import load_tokenizer
from titok_fast.models.attention import backend_name
from titok_fast.pipeline import TiTokPipeline
from titok_fast.presets import Preset, preset


def check_options(args: argparse.Namespace) -> None:
    """What argparse cannot say about the options that all working commands share.

    Raises:
        ValueError: an option's value does not exist here, or two do not go together.
        BackendError: the attention back end cannot work here.
    """
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
    check_techniques(resolve_fast(args.fast, there.type), there.type, dtype)
    weights = [args.tokenizer, getattr(args, "generator", None)]
    if args.random_weights and any(weights):
        raise ValueError("--random-weights and a place of weights exclude each other")
    if args.model is None and args.tokenizer is None:
        raise ValueError("name a published model with --model, or weights with --tokenizer")


def tokenizer_config(args: argparse.Namespace) -> TokenizerConfig:
    """The tokenizer's configuration; its weights are found, and not read.

    Raises:
        FileNotFoundError: there are none.
    """
    if args.model is None:
        return TokenizerConfig.from_official(_config_file(args.tokenizer, "tokenizer"))
    known = preset(args.model)
    _find(args, "tokenizer", args.tokenizer, known.tokenizer_source, known)
    return known.tokenizer


def generator_config(args: argparse.Namespace) -> GeneratorConfig:
    """The same of the generator.

    Raises:
        ValueError: the model has none.
        FileNotFoundError: there are no weights.
    """
    known = preset(args.model) if args.model else None
    if known is None or known.generator is None:
        if args.generator is None:
            name = f"{args.model} has no generator" if args.model else "drawing wants a generator"
            raise ValueError(f"{name}: pass --generator")
        return GeneratorConfig.from_official(_config_file(args.generator, "generator"))
    _find(args, "generator", args.generator, known.generator_source, known)
    return known.generator


def _find(
    args: argparse.Namespace, part: str, given: str | None, published: str | None, known: Preset
) -> None:
    if args.random_weights:
        return
    if not (given or published):
        what = "weights of {} were" if part == "tokenizer" else "generator of {} was"
        raise FileNotFoundError(f"no {what.format(args.model)} published: pass --{part}")
    # those of a hub preset come later, with the loading
    if given or known.folder is not None:
        fetch(given or str(published))


def _config_file(source: str, part: str) -> Path:
    _, config = fetch(source)
    if config is None:
        raise FileNotFoundError(f"--{part} {source} has no config.json: name its preset by --model")
    return config


def decodes(config: TokenizerConfig) -> TokenizerConfig:
    """The configuration, unless the model gives proxy codes instead of pixels (ValueError)."""
    if config.is_legacy and not config.finetune_decoder:
        raise ValueError("a stage-1 tokenizer predicts proxy codes, not pixels")
    return config


def has_tokens(config: TokenizerConfig) -> TokenizerConfig:
    """The configuration, unless the model is a VAE (ValueError)."""
    if config.quantize_mode != "vq":
        raise ValueError("a VAE tokenizer has no token ids; `reconstruct` works")
    return config


def load(args: argparse.Namespace) -> TiTokPipeline:
    """The models that `check_options` and the configurations were asked about, fast if wanted."""
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
    # without the preset's generator: nothing is drawn
    return TiTokPipeline(load_tokenizer(args.model, args.tokenizer, options))
