"""A preset's name, or places of weights, to models: what TiTokPipeline is made of."""

from typing import Any, NamedTuple

import torch

from titok_fast.config import GeneratorConfig, SamplingConfig
from titok_fast.io.files import fetch
from titok_fast.models.generator import MaskedGenerator, generator_class
from titok_fast.models.tokenizer import TiTok
from titok_fast.presets import Preset, preset


class Models(NamedTuple):
    """The arguments of TiTokPipeline; generator and settings are None where there are none."""

    tokenizer: TiTok
    generator: MaskedGenerator | None = None
    sampling: SamplingConfig | None = None
    classes: tuple[str, ...] = ()


def load_models(
    name: str | None, tokenizer: str | None, generator: str | None, options: dict[str, Any]
) -> Models:
    """Read weights.

    Args:
        name: of a preset, or None: then the configurations come with the weights.
        tokenizer: directory, weight file or hub repository; None takes the preset's.
        generator: the same.
        options: of `TiTok.from_pretrained`.

    Raises:
        ValueError, FileNotFoundError: as `load_tokenizer`.
    """
    known = preset(name) if name else None
    t = load_tokenizer(name, tokenizer, options)
    generator = generator or (known.generator_source if known else None)
    if generator is None:
        return Models(t)
    config = known.generator if known else None
    known_class = generator_class(config or config_beside(generator, options.get("revision")))
    g = known_class.from_pretrained(generator, config=config, **options)
    return Models(t, g, known.sampling, known.classes) if known else Models(t, g)


def load_tokenizer(name: str | None, place: str | None, options: dict[str, Any]) -> TiTok:
    """Read a tokenizer's weights.

    Args:
        name: of a preset, or None: then the configuration comes with the weights.
        place: directory, weight file or hub repository; None takes the preset's.
        options: of `TiTok.from_pretrained`.

    Raises:
        ValueError: unknown preset, or neither a preset nor a place.
        FileNotFoundError: nothing there, or a preset that was never published.
    """
    known = preset(name) if name else None
    place = place or (known.tokenizer_source if known else None)
    if place is None:
        if known is None:
            raise ValueError("name a published model, or the weights of a tokenizer")
        raise FileNotFoundError(f"no weights of {name} were published: pass those of a tokenizer")
    return TiTok.from_pretrained(place, config=known.tokenizer if known else None, **options)


def random_models(known: Preset, seed: int, attention: str | None) -> Models:
    """A preset's architecture with random weights, float32 on the CPU.

    Args:
        known: the preset.
        seed: of the weights.
        attention: back end, see attention.py.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        t = TiTok(known.tokenizer, attention=attention)
        if known.tokenizer.finetune_decoder:
            # as large as trained ones: the norms after tiny codes would blow up rounding
            torch.nn.init.normal_(t.pixel_quantize.embedding.weight)
        g = None
        if known.generator is not None:
            g = generator_class(known.generator)(known.generator, attention=attention)
    return Models(t, g, known.sampling, known.classes)


def config_beside(source: str, revision: str | None = None) -> GeneratorConfig:
    """The configuration of a generator's weights.

    Args:
        source: directory, weight file or hub repository.
        revision: hub revision.

    Raises:
        FileNotFoundError: nothing there, or weights without `config.json`.
    """
    _, config_file = fetch(source, revision=revision)
    if config_file is None:
        raise FileNotFoundError(f"{source} has no config.json: load the generator by its class")
    return GeneratorConfig.from_official(config_file)
