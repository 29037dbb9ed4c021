"""Models by name: what they are, how they sample, where their weights live.

Numbers: upstream's configs/infer/TiTok and, for 512 px, appendix A of the paper; of the model that
comes with this package, recipes/fashion.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from titok_fast.config import GeneratorConfig, TokenizerConfig, VQGANConfig
from titok_fast.sampling_config import SamplingConfig

SHIPPED = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Preset:
    """One system.

    Attributes:
        tokenizer: its configuration.
        generator: None where only a tokenizer was published.
        sampling: settings of its generator.
        tokenizer_hub: repository of the published weights, if there are any.
        generator_hub: likewise.
        folder: weights on this disk instead, in sub-folders `tokenizer` and `generator`.
        classes: names of the generator's classes; empty for ImageNet's thousand.
    """

    tokenizer: TokenizerConfig
    generator: GeneratorConfig | None = None
    sampling: SamplingConfig | None = None
    tokenizer_hub: str | None = None
    generator_hub: str | None = None
    folder: Path | None = None
    classes: tuple[str, ...] = ()

    @property
    def tokenizer_source(self) -> str | None:
        """What `TiTok.from_pretrained` takes; None where no weights were published."""
        return str(self.folder / "tokenizer") if self.folder else self.tokenizer_hub

    @property
    def generator_source(self) -> str | None:
        """The same of the generator."""
        return str(self.folder / "generator") if self.folder else self.generator_hub


def _sampling(
    steps: int, scale: float, temperature: float, decay: str = "linear"
) -> SamplingConfig:
    return SamplingConfig(
        num_sample_steps=steps,
        guidance_scale=scale,
        guidance_decay=decay,
        randomize_temperature=temperature,
        softmax_temperature_annealing=True,
    )


def _two_stage(size: str, K: int, sampling: SamplingConfig, generator: GeneratorConfig) -> Preset:
    letter = size[0]
    return Preset(
        TokenizerConfig(num_latent_tokens=K, vit_enc_model_size=size, vit_dec_model_size=size),
        replace(generator, image_seq_len=K),
        sampling,
        tokenizer_hub=f"yucornetto/tokenizer_titok_{letter}{K}_imagenet",
        generator_hub=f"yucornetto/generator_titok_{letter}{K}_imagenet",
    )


def _single_stage(encoder: str, K: int, *, vae: bool = False) -> Preset:
    config = TokenizerConfig(
        num_latent_tokens=K,
        vit_enc_model_size=encoder,
        vit_dec_model_size="large",
        codebook_size=8192,
        token_size=16 if vae else 64,
        use_l2_norm=False,
        quantize_mode="vae" if vae else "vq",
        is_legacy=False,
        finetune_decoder=False,
    )
    kind = "vae_c16" if vae else "vq8k"
    return Preset(
        config, tokenizer_hub=f"yucornetto/tokenizer_titok_{encoder[0]}l{K}_{kind}_imagenet"
    )


def _at_512(size: str, K: int, *, steps: int, scale: float, temperature: float) -> Preset:
    """Never released. Patch 32 is the paper's; the head that fits it is ours (decoder.py)."""
    tokenizer = TokenizerConfig(
        num_latent_tokens=K,
        vit_enc_model_size=size,
        vit_dec_model_size=size,
        vit_enc_patch_size=32,
        vit_dec_patch_size=32,
        crop_size=512,
    )
    # the paper gives scale and temperature; the rest is as in the 256 px configs
    sampling = _sampling(steps, scale, temperature)
    return Preset(tokenizer, GeneratorConfig(image_seq_len=K), sampling)


_FASHION_CLASSES = (
    "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
)


def _fashion(K: int) -> Preset:
    """The small model in this package, as recipes/fashion trains it."""
    tokenizer = TokenizerConfig(
        num_latent_tokens=K,
        codebook_size=512,
        commitment_cost=0.0,
        vit_enc_model_size=(128, 5, 4),
        vit_dec_model_size=(160, 5, 5),
        vit_enc_patch_size=8,
        vit_dec_patch_size=8,
        crop_size=32,
        pixel=VQGANConfig(
            hidden_channels=32,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            z_channels=64,
            codebook_size=256,
        ),
    )
    generator = GeneratorConfig(
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=6,
        intermediate_size=768,
        image_seq_len=K,
        codebook_size=512,
        condition_num_classes=10,
    )
    return Preset(
        tokenizer,
        generator,
        _sampling(steps=8, scale=3.0, temperature=3.0),
        folder=SHIPPED / f"fashion-{K}",
        classes=tuple(_FASHION_CLASSES.split(", ")),
    )


_VIT = GeneratorConfig()
_UVIT = GeneratorConfig(
    model_type="UViT", hidden_size=1024, num_hidden_layers=20, intermediate_size=4096
)

PRESETS: dict[str, Preset] = {
    "titok-l-32": _two_stage(
        "large", 32, _sampling(steps=8, scale=4.5, temperature=9.5), generator=_VIT
    ),
    "titok-b-64": _two_stage(
        "base", 64, _sampling(steps=8, scale=3.0, temperature=11.0), generator=_VIT
    ),
    "titok-s-128": _two_stage(
        "small",
        128,
        _sampling(steps=64, scale=6.9, temperature=2.8, decay="power-cosine"),
        generator=_UVIT,
    ),
    "titok-bl-64-vq8k": _single_stage("base", 64),
    "titok-bl-128-vq8k": _single_stage("base", 128),
    "titok-sl-256-vq8k": _single_stage("small", 256),
    "titok-ll-32-vae": _single_stage("large", 32, vae=True),
    "titok-bl-64-vae": _single_stage("base", 64, vae=True),
    "titok-bl-128-vae": _single_stage("base", 128, vae=True),
    "titok-l-64-512": _at_512("large", 64, steps=8, scale=2.0, temperature=7.5),
    "titok-b-128-512": _at_512("base", 128, steps=64, scale=2.5, temperature=6.5),
    "fashion-16": _fashion(16),
}


def preset(name: str) -> Preset:
    """The system called `name`.

    Raises:
        ValueError: no such preset; the message lists all.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
