"""What the tests of the model layer share: small models, rebuildable weights, official layouts."""

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titok_fast import (
    GeneratorConfig,
    ImageBert,
    SamplingConfig,
    TiTok,
    TokenizerConfig,
    UViTBert,
    VQGANConfig,
)
from titok_fast.models.generator import MaskedGenerator, generator_class
from titok_fast.models.weights import PretrainedModel, to_official

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
Shapes = dict[str, tuple[int, ...]]

# 2x down, 48 codes of 16 channels: the published network in small
TINY_VQGAN = VQGANConfig(32, (1, 2), num_res_blocks=1, z_channels=16, codebook_size=48)
# two-stage, its first stage alone, and the two single-stage kinds
TINY_KINDS = ("legacy", "stage1", "vq", "vae")


# settings of both confidence rules
CONFIGS = (
    SamplingConfig(4, 4.5, "linear", 3.0, 9.5, True),
    SamplingConfig(4, 6.9, "power-cosine", 3.0, 2.8, True, "cosine", "probability"),
)


def tiny_tokenizer_config(kind: str = "legacy", K: int = 8, N: int = 64) -> TokenizerConfig:
    """A 32 px tokenizer of 2 layers, 64 wide."""
    legacy = kind in ("legacy", "stage1")
    return TokenizerConfig(
        num_latent_tokens=K,
        codebook_size=N,
        token_size=12,
        use_l2_norm=legacy,
        vit_enc_model_size=(64, 2, 2),
        vit_dec_model_size=(64, 2, 2),
        vit_enc_patch_size=8,
        vit_dec_patch_size=2 if legacy else 8,
        quantize_mode="vae" if kind == "vae" else "vq",
        is_legacy=legacy,
        finetune_decoder=kind == "legacy",
        crop_size=32,
        pixel=TINY_VQGAN,
    )


def tiny_tokenizer(kind: str = "legacy", K: int = 8, N: int = 64) -> TiTok:
    """In eval mode, under weights that make ids and pixels vary."""
    return rebuilt(TiTok(tiny_tokenizer_config(kind, K, N)))


def tiny_generator_config(model_type: str = "ViT", K: int = 8, N: int = 64) -> GeneratorConfig:
    """2 layers (U-ViT: 1 + 1 + 1), 64 wide."""
    return GeneratorConfig(
        model_type,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_seq_len=K,
        codebook_size=N,
    )


def tiny_generator(model_type: str = "ViT", K: int = 8, N: int = 64) -> ImageBert | UViTBert:
    """In eval mode, under weights that make its logits vary."""
    config = tiny_generator_config(model_type, K, N)
    return rebuilt(generator_class(config)(config))


def on_meta(cls: type[PretrainedModel], config: Any) -> Any:
    """A model of any size that takes no memory."""
    with torch.device("meta"):
        return cls(config)


def on_fake(cls: type[PretrainedModel], config: Any, device: str) -> Any:
    """A model of fake tensors: call inside FakeTensorMode. The device need not exist."""
    model = on_meta(cls, config)
    state = {k: torch.empty(t.shape, device=device) for k, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def official_weights(shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The golden files' weights: every tensor a function of its official name and shape."""
    weights = {}
    for key, like in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        r = torch.randn(like.shape, generator=generator)
        if like.ndim > 1:
            weights[key] = r / math.sqrt(like[0].numel())
        else:
            weights[key] = 0.02 * r if key.endswith("bias") else 1 + 0.1 * r
    return weights


def rebuilt(model: Any) -> Any:
    """Fill a model, on any device, with `official_weights`, through the project's own loader."""
    weights = official_weights(to_official(model.state_dict(), model.kind))
    if next(model.parameters()).is_meta:
        model = model.to_empty(device="cpu")
    model.load_state_dict(weights)
    return model.eval()


def photographs(size: int) -> Tensor:
    """Three of scikit-image's photographs, (3, 3, size, size) float32 in [0, 1]."""
    from skimage import data

    from titok_fast.io.images import to_tensor

    return to_tensor([data.astronaut(), data.chelsea(), data.coffee()], size)


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


class CountingForwards:
    """Counts the rows of each pass through a generator's trunk while inside `with`."""

    def __init__(self, generator: MaskedGenerator) -> None:
        self.generator, self.rows = generator, []  # type: ignore[var-annotated]

    def __enter__(self) -> "CountingForwards":
        trunk = self.generator.trunk

        def counted(tokens: Tensor) -> Tensor:
            self.rows.append(tokens.shape[0])
            return trunk(tokens)

        self.generator.trunk = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        del self.generator.trunk  # type: ignore[misc]


def _layer(stem: str, shapes: Shapes) -> Shapes:
    return {f"{stem}.{name}": shape for name, shape in shapes.items()}


def _affine(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def tokenizer_shapes(config: TokenizerConfig) -> Shapes:
    """Every tensor of a published tokenizer file, written from the format's description."""
    K, C, p = config.num_latent_tokens, config.token_size, config.vit_dec_patch_size
    (De, Le, _), (Dd, Ld, _) = config.encoder_size, config.decoder_size
    table: Shapes = {"latent_tokens": (K, De)}
    for side, D, layers, grid in (
        ("encoder", De, Le, config.encoder_grid),
        ("decoder", Dd, Ld, config.decoder_grid),
    ):
        part: Shapes = {
            "class_embedding": (1, D),
            "positional_embedding": (grid**2 + 1, D),
            "latent_token_positional_embedding": (K, D),
        }
        part |= _affine("ln_pre", D) | _affine("ln_post", D)
        block = _affine("ln_1", D) | _affine("ln_2", D) | _affine("attn.out_proj", D, D)
        block |= {"attn.in_proj_weight": (3 * D, D), "attn.in_proj_bias": (3 * D,)}
        block |= _affine("mlp.c_fc", 4 * D, D) | _affine("mlp.c_proj", D, 4 * D)
        for i in range(layers):
            part |= _layer(f"transformer.{i}", block)
        table |= _layer(side, part)
    channels = C if config.quantize_mode == "vq" else 2 * C
    p_enc = config.vit_enc_patch_size
    table |= _affine("encoder.patch_embed", De, 3, p_enc, p_enc)
    table |= _affine("encoder.conv_out", channels, De, 1, 1)
    table |= {"decoder.mask_token": (1, 1, Dd)} | _affine("decoder.decoder_embed", Dd, C)
    if config.is_legacy:
        table |= _affine("decoder.ffn.0", 2 * Dd, Dd, 1, 1)
        table |= _affine("decoder.ffn.2", 1024, 2 * Dd, 1, 1)
    else:
        table |= _affine("decoder.ffn.0", 3 * p * p, Dd, 1, 1)
        table |= _affine("decoder.conv_out", 3, 3, 3, 3)
    if config.quantize_mode == "vq":
        table["quantize.embedding.weight"] = (config.codebook_size, C)
    if config.finetune_decoder:
        pixel = {k: v for k, v in vqgan_shapes().items() if not k.startswith("encoder.")}
        table |= {f"pixel_{k}": v for k, v in pixel.items()}
    return table


def _resnet(stem: str, c_in: int, c_out: int) -> Shapes:
    block = _affine("norm1", c_in) | _affine("norm2", c_out)
    block |= {"conv1.weight": (c_out, c_in, 3, 3), "conv2.weight": (c_out, c_out, 3, 3)}
    if c_in != c_out:
        block["nin_shortcut.weight"] = (c_out, c_out, 1, 1)
    return _layer(stem, block)


def vqgan_shapes() -> Shapes:
    """Every tensor of the published MaskGIT-VQGAN file."""
    widths = (128, 128, 256, 256, 512)
    table: Shapes = {"quantize.embedding.weight": (1024, 256)}
    table["encoder.conv_in.weight"] = (128, 3, 3, 3)
    table |= _affine("decoder.conv_in", 512, 256, 3, 3)
    for side, key in (("encoder", "down"), ("decoder", "up")):
        entering = (128, *widths[:-1]) if side == "encoder" else (*widths[1:], 512)
        for level, (c_in, c_out) in enumerate(zip(entering, widths, strict=True)):
            table |= _resnet(f"{side}.{key}.{level}.block.0", c_in, c_out)
            table |= _resnet(f"{side}.{key}.{level}.block.1", c_out, c_out)
            if side == "decoder" and level > 0:
                table |= _affine(f"decoder.up.{level}.upsample_conv", c_out, c_out, 3, 3)
        table |= _resnet(f"{side}.mid.0", 512, 512) | _resnet(f"{side}.mid.1", 512, 512)
    table |= _affine("encoder.norm_out", 512) | _affine("encoder.conv_out", 256, 512, 1, 1)
    return table | _affine("decoder.norm_out", 128) | _affine("decoder.conv_out", 3, 128, 3, 3)


def generator_shapes(config: GeneratorConfig) -> Shapes:
    """Every tensor of a published generator file."""
    H, I, N = config.hidden_size, config.intermediate_size, config.codebook_size
    K, words = config.image_seq_len, config.codebook_size + 1002
    if config.model_type == "UViT":
        block = _affine("norm1", H) | _affine("norm2", H) | _affine("attn.proj", H, H)
        block |= _affine("mlp.fc1", I, H) | _affine("mlp.fc2", H, I)
        block["attn.qkv.weight"] = (3 * H, H)
        table: Shapes = {"embeddings.weight": (words, H), "pos_embed": (1, K + 1, H)}
        table |= _affine("norm", H) | _affine("lm_head", N, H) | _layer("mid_block", block)
        for i in range(config.num_hidden_layers // 2):
            table |= _layer(f"in_blocks.{i}", block)
            table |= _layer(f"out_blocks.{i}", block | _affine("skip_linear", H, 2 * H))
        return table
    table = {
        "embeddings.word_embeddings.weight": (words, H),
        "embeddings.position_embeddings.weight": (K + 1, H),
        "embeddings.token_type_embeddings.weight": (2, H),
    }
    table |= _affine("embeddings.LayerNorm", H) | _affine("lm_head", N, H)
    for i in range(config.num_hidden_layers):
        layer = _affine("attention.output.dense", H, H) | _affine("attention.output.LayerNorm", H)
        for name in ("query", "key", "value"):
            layer |= _affine(f"attention.self.{name}", H, H)
        layer |= _affine("intermediate.dense", I, H) | _affine("output.dense", H, I)
        table |= _layer(f"encoder.layer.{i}", layer | _affine("output.LayerNorm", H))
    return _layer("model", table)
