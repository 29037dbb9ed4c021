"""Objects of bytedance/1d-tokenizer, from the checkout that TITOK_UPSTREAM names, accelerated."""

from typing import Any

import pytest
import torch
from support.official import needs_upstream, official
from support.round_trips import kernel_calls, round_trip
from support.tiny_models import official_weights
from torch import nn

from titok_fast import GeneratorConfig, TokenizerConfig
from titok_fast.integrations import accelerate, upstream
from titok_fast.integrations._swap import Fast
from titok_fast.models import quantizer
from titok_fast.models import vqgan as maskgit_vqgan

pytestmark = needs_upstream


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return kernel_calls(monkeypatch, upstream, quantizer, maskgit_vqgan)


def build(module: str, name: str, config: Any) -> Any:
    """A model of upstream under weights that make its outputs vary."""
    with official(f"modeling.{module}") as found:
        model = getattr(found, name)(config.to_official())
    model.load_state_dict(official_weights(model.state_dict()))
    return model.eval()


def titok(**options: Any) -> Any:
    small = {"vit_enc_model_size": "small", "vit_dec_model_size": "small", "crop_size": 64}
    return build("titok", "TiTok", TokenizerConfig(**small | {"codebook_size": 512} | options))


SINGLE_STAGE = {"is_legacy": False, "finetune_decoder": False, "use_l2_norm": False}


def test_titok(calls: list[str]) -> None:
    model, images = titok(), torch.rand(2, 3, 64, 64)

    @torch.no_grad()
    def run() -> Any:
        codes, result = model.encode(images)
        ids = result["min_encoding_indices"]
        return codes, result, model.decode(codes), model.decode_tokens(ids), model(images)

    round_trip(model, run, atol=1e-3)
    norms = sum(isinstance(part, nn.GroupNorm) for part in model.pixel_decoder.modules())
    # three pictures are decoded, on the CPU one at a time
    assert sorted(set(calls)) == ["group_norm_silu", "nearest_code_stats", "soft_codes"]
    assert calls.count("group_norm_silu") == norms * 6
    model.pixel_decoder.up[0].block[0].dropout.p = 0.1
    with pytest.raises(
        ValueError, match=r"this Decoder: up\.0\.block\.0\.dropout has dropout 0\.1"
    ):
        accelerate(model)
    model.pixel_decoder.up[0].block[0].dropout = nn.Identity()
    with pytest.raises(ValueError, match="dropout is a Identity"):
        accelerate(model)
    model.pixel_decoder.conv_in.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="conv_in has hooks"):
        accelerate(model)
    assert not any(isinstance(part, Fast) for part in model.modules())


def test_titok_gradients_of_the_second_stage() -> None:
    model = titok().train()
    codes = torch.randn(1, 12, 1, 32)
    weights = [*model.pixel_decoder.parameters(), *model.pixel_quantize.parameters()]

    def gradients() -> Any:
        loss = model.decode(codes).square().mean()
        grads = torch.autograd.grad(loss, weights)
        return [g.contiguous() / g.norm() for g in grads]

    round_trip(model, gradients, atol=1e-4)


@pytest.mark.parametrize("options", [{"finetune_decoder": False}, SINGLE_STAGE], ids=["1", "vq"])
def test_titok_quantizer_trains(options: dict[str, Any], calls: list[str]) -> None:
    model = titok(**options).train()
    images = torch.rand(2, 3, 64, 64)
    round_trip(model, lambda: model(images), atol=1e-4)
    assert calls == ["nearest_code_stats"]
    z = torch.randn(2, 12, 1, 32, requires_grad=True)

    def gradients() -> Any:
        codes, result = model.quantize(z)
        total = result["quantizer_loss"] + codes.square().sum()
        return torch.autograd.grad(total, [z, model.quantize.embedding.weight])

    round_trip(model.quantize, gradients)
    model.quantize.clustering_vq = True
    with pytest.raises(ValueError, match="clustering_vq=True"):
        accelerate(model)
    with pytest.raises(ValueError, match="clustering_vq=True"):
        accelerate(model.quantize)


def test_titok_quantizer_takes_a_nan(calls: list[str]) -> None:
    quantize, z = titok(**SINGLE_STAGE).train().quantize, torch.randn(2, 12, 1, 32)
    z[1, 4, 0, 2] = float("nan")

    def run() -> Any:
        codes, result = quantize(z)
        assert result["quantizer_loss"].isnan()
        return codes, result

    round_trip(quantize, run)
    assert calls == ["nearest_code_stats"]


def test_titok_vae_is_refused() -> None:
    model = titok(quantize_mode="vae", **SINGLE_STAGE)
    with pytest.raises(ValueError, match="quantize_mode='vae' has no codes"):
        accelerate(model)


@pytest.mark.parametrize("kind", ["ViT", "UViT"])
def test_generator(kind: str, calls: list[str]) -> None:
    config = GeneratorConfig(kind, 64, 4, 2, 128, image_seq_len=16, codebook_size=128)
    model = build("maskgit", "ImageBert" if kind == "ViT" else "UViTBert", config)
    labels = torch.tensor([1, 7, 282, 604, 999])
    runs: list[dict[str, Any]] = [
        {"guidance_decay": decay, "softmax_temperature_annealing": annealing, "guidance_scale": g}
        for decay in ("constant", "linear", "power-cosine")
        for annealing, g in ((True, 4.5), (False, 0.0))
    ]
    for options in [*runs, {"randomize_temperature": 0.0}, {"num_sample_steps": 1}]:
        round_trip(model, lambda: model.generate(labels, **options))  # noqa: B023
    assert calls.count("guided_sample") == 7 * 8 + 1
    assert calls.count("remask") == 7 * 7
    few = {"num_sample_steps": 3, "guidance_decay": "power-cosine"}
    round_trip(model, lambda: model.generate(labels[:2], **few), interpreted=True)
    calls.clear()
    model.train()
    round_trip(model, lambda: model.generate(labels))
    with torch.autocast("cpu", torch.bfloat16):
        round_trip(model.eval(), lambda: model.generate(labels))
    round_trip(model, lambda: model(torch.full((5, 16), 128), labels))  # forward is its own
    assert calls == []
    with pytest.raises(ValueError, match=r"its weights are torch\.bfloat16"):
        accelerate(model.bfloat16())
