"""A preset's name or places of weights to models: what there is, found once, then loaded."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from titok_fast.config import GeneratorConfig, TokenizerConfig
from titok_fast.io.files import fetch
from titok_fast.models.generator import MaskedGenerator, generator_class
from titok_fast.models.tokenizer import TiTok
from titok_fast.presets import preset
from titok_fast.sampling_config import SamplingConfig


@dataclass(frozen=True)
class Sources:
    """Configurations of a system, and where its weights lie; the weights are not read yet.

    Attributes:
        tokenizer_config: of the tokenizer.
        tokenizer: weight file, directory or hub repository; None for random weights.
        generator_config, generator: the same; both None without a generator.
        sampling: the published settings of a preset, else upstream's defaults.
        classes: names of the generator's classes; empty if they are not known.
        name: of the preset, or None.
    """

    tokenizer_config: TokenizerConfig
    tokenizer: str | None = None
    generator_config: GeneratorConfig | None = None
    generator: str | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    classes: tuple[str, ...] = ()
    name: str | None = None


class Models(NamedTuple):
    """The arguments of TiTokPipeline."""

    tokenizer: TiTok
    generator: MaskedGenerator | None = None
    sampling: SamplingConfig | None = None
    classes: tuple[str, ...] = ()


def resolve(
    name: str | None = None,
    tokenizer: str | None = None,
    generator: str | None = None,
    *,
    draws: bool | None = None,
    random_weights: bool = False,
    revision: str | None = None,
) -> Sources:
    """Find configurations and weights. A preset's own hub repositories wait until `load`.

    Args:
        name: a preset; None takes the configurations that lie beside the weights.
        tokenizer: weight file, directory or hub repository; None takes the preset's.
        generator: the same.
        draws: True wants a generator, False leaves it out, None takes it where there is one.
        random_weights: no weights at all, to try an architecture.
        revision: of hub repositories.

    Raises:
        ValueError: unknown preset, neither a preset nor a tokenizer, random weights beside real
            ones, or no generator where one is wanted.
        FileNotFoundError: nothing there, no `config.json`, or weights that were never published.
    """
    known = preset(name) if name else None
    if random_weights and (known is None or tokenizer or generator):
        raise ValueError("--random-weights wants --model, and no weights beside it")
    if known is None and not tokenizer:
        raise ValueError("name a published model (--model), or weights (--tokenizer)")

    folder = known.folder if known else None

    def find(part: str, given: str | None, published: str | None, config: Any, kind: Any) -> Any:
        """The source of a part's weights, None for random ones, and its configuration."""
        if random_weights:
            return None, config
        if not (given or published):
            raise FileNotFoundError(f"no {part} weights of {name} were published: pass --{part}")
        source = str(given or published)
        if config is None or given or folder:
            source, config = _beside(source, part, config, kind, revision)
        return source, config

    t_config, g_config = (known.tokenizer, known.generator) if known else (None, None)
    t_published = known.tokenizer_source if known else None
    t_source, t_config = find("tokenizer", tokenizer, t_published, t_config, TokenizerConfig)
    found = Sources(t_config, t_source, name=name)
    if draws:
        t_config.check_has_ids()
    published = known.generator_source if known else None
    if draws is False or (draws is None and not (random_weights or generator or published)):
        return found
    if g_config is None and not generator:
        if draws is None:
            return found
        who = f"{name} has no generator" if name else "drawing wants a generator"
        raise ValueError(f"{who}: pass --generator")
    g_source, g_config = find("generator", generator, published, g_config, GeneratorConfig)
    sampling = known.sampling if known and known.sampling else SamplingConfig()
    classes = known.classes if known else ()
    return Sources(t_config, t_source, g_config, g_source, sampling, classes, name)


def _beside(source: str, part: str, config: Any, kind: Any, revision: str | None) -> Any:
    """The weight file of a source, and its `config.json` where no configuration is known."""
    weights, config_file = fetch(source, revision=revision)
    if config is None and config_file is None:
        raise FileNotFoundError(
            f"{source} has no config.json: name the preset of this {part} by --model, or load it "
            "by its class with config="
        )
    return str(weights), config or kind.from_official(config_file)


def generator_config_of(source: str) -> GeneratorConfig:
    """The configuration beside a generator's weights; errors as `resolve`."""
    return _beside(source, "generator", None, GeneratorConfig, None)[1]


def load(
    sources: Sources,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> Models:
    """Read the weights, or draw random ones.

    Args:
        sources: of `resolve`.
        device: where the weights go.
        dtype: floating type of the weights; codebooks stay float32.
        attention: back end, see models/attention.py.
        revision: of hub repositories.
        seed: of random weights.

    Raises:
        ValueError, FileNotFoundError: see `TiTok.from_pretrained`.
    """
    settings = (sources.sampling, sources.classes) if sources.generator_config else ()
    if sources.tokenizer is None:
        networks = _random(sources, seed, attention)
        for network in networks:
            if network is not None:
                network.to(device=device, dtype=dtype)
        return Models(*networks, *settings)
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "attention": attention,
        "revision": revision,
    }
    t = TiTok.from_pretrained(sources.tokenizer, config=sources.tokenizer_config, **options)
    if sources.generator_config is None:
        return Models(t)
    assert sources.generator is not None  # resolve found both or neither
    kind = generator_class(sources.generator_config)
    g = kind.from_pretrained(sources.generator, config=sources.generator_config, **options)
    return Models(t, g, *settings)


def load_tokenizer(name: str | None, source: str | None, options: dict[str, Any]) -> TiTok:
    """A tokenizer alone; arguments as those of `resolve` and `load`."""
    return load(resolve(name, source, draws=False), **options).tokenizer


def _random(
    sources: Sources, seed: int, attention: str | None
) -> tuple[TiTok, MaskedGenerator | None]:
    """The architectures with random weights, float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        t = TiTok(sources.tokenizer_config, attention=attention)
        if sources.tokenizer_config.finetune_decoder:
            # as large as trained ones: the norms after tiny codes would blow up rounding
            torch.nn.init.normal_(t.pixel_quantize.embedding.weight)
        g = None
        if sources.generator_config is not None:
            kind = generator_class(sources.generator_config)
            g = kind(sources.generator_config, attention=attention)
    return t, g
