"""Published models by name: what they are, how they sample, where their weights live.

Numbers: upstream's configs/infer/TiTok and, for 512 px, appendix A of the paper.
"""

from dataclasses import dataclass, replace

from titok_fast.config import GeneratorConfig, SamplingConfig, TokenizerConfig


@dataclass(frozen=True)
class Preset:
    """One published system. `generator` is None where only a tokenizer was published."""

    tokenizer: TokenizerConfig
    generator: GeneratorConfig | None = None
    sampling: SamplingConfig | None = None
    tokenizer_hub: str | None = None
    generator_hub: str | None = None


def _two_stage(size: str, K: int, sampling: SamplingConfig, generator: GeneratorConfig) -> Preset:
    letter = size[0]
    return Preset(
        TokenizerConfig(num_latent_tokens=K, vit_enc_model_size=size, vit_dec_model_size=size),
        replace(generator, image_seq_len=K),
        sampling,
        f"yucornetto/tokenizer_titok_{letter}{K}_imagenet",
        f"yucornetto/generator_titok_{letter}{K}_imagenet",
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


def _at_512(size: str, K: int, steps: int, scale: float, temperature: float) -> Preset:
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
    sampling = SamplingConfig(steps, scale, "linear", 3.0, temperature, True)
    return Preset(tokenizer, GeneratorConfig(image_seq_len=K), sampling)


_VIT = GeneratorConfig()
_UVIT = GeneratorConfig("UViT", hidden_size=1024, num_hidden_layers=20, intermediate_size=4096)

PRESETS: dict[str, Preset] = {
    "titok-l-32": _two_stage("large", 32, SamplingConfig(8, 4.5, "linear", 3.0, 9.5, True), _VIT),
    "titok-b-64": _two_stage("base", 64, SamplingConfig(8, 3.0, "linear", 3.0, 11.0, True), _VIT),
    "titok-s-128": _two_stage(
        "small", 128, SamplingConfig(64, 6.9, "power-cosine", 3.0, 2.8, True), _UVIT
    ),
    "titok-bl-64-vq8k": _single_stage("base", 64),
    "titok-bl-128-vq8k": _single_stage("base", 128),
    "titok-sl-256-vq8k": _single_stage("small", 256),
    "titok-ll-32-vae": _single_stage("large", 32, vae=True),
    "titok-bl-64-vae": _single_stage("base", 64, vae=True),
    "titok-bl-128-vae": _single_stage("base", 128, vae=True),
    "titok-l-64-512": _at_512("large", 64, 8, 2.0, 7.5),
    "titok-b-128-512": _at_512("base", 128, 64, 2.5, 6.5),
}


def preset(name: str) -> Preset:
    """The published system called `name`.

    Raises:
        ValueError: no such preset; the message lists all.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
