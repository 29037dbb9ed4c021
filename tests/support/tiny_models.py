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


def official_state(model: PretrainedModel) -> dict[str, Tensor]:
    """Copies of a model's weights under their official names."""
    return {k: v.clone() for k, v in to_official(model.state_dict(), model.kind).items()}


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Assert equal names and bits."""
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


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
