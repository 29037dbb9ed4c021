"""The cost model against the published table, a FLOP counter, and the models themselves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from titok_fast.config import GeneratorConfig, TokenizerConfig, VQGANConfig
from titok_fast.costs import (
    Cost,
    decoding_costs,
    generation_costs,
    generator_cost,
    generator_passes,
    parameters,
    pixel_decoder_cost,
    pixel_encoder_cost,
    speed_of_light,
    tokenizer_costs,
)
from titok_fast.models import tokenizer
from titok_fast.models import vqgan as maskgit_vqgan
from titok_fast.models.generator import generator_class
from titok_fast.models.tokenizer import TiTok
from titok_fast.presets import PRESETS, preset
from titok_fast.sampling_config import SamplingConfig

# GFLOPs per image of upstream's modules: encoder, ViT decoder with head, one generator forward.
# Both 512 px tokenizers were never released, so there is nothing published to compare with.
GFLOPS = {
    "titok-s-128": ("22.0", "22.6", "76.1"),
    "titok-b-64": ("58.6", "59.7", "22.8"),
    "titok-l-32": ("183.2", "184.9", "11.5"),
    "titok-bl-64-vq8k": ("58.6", "204.4", None),
    "titok-bl-64-vae": ("58.6", "204.4", None),
    "titok-bl-128-vq8k": ("71.2", "247.5", None),
    "titok-bl-128-vae": ("71.2", "247.5", None),
    "titok-sl-256-vq8k": ("30.4", "336.2", None),
    "titok-ll-32-vae": ("183.2", "183.2", None),
}
# parameters of upstream's modules by part
PARTS = {
    "titok-s-128": (65_536, 25_818_636, 27_000_832, 49_152, 262_144, 30_478_339),
    "titok-b-64": (49_152, 85_904_652, 88_070_656, 49_152, 262_144, 30_478_339),
    "titok-l-32": (32_768, 303_410_188, 306_822_144, 49_152, 262_144, 30_478_339),
    "titok-bl-64-vq8k": (49_152, 85_944_640, 303_498_068, 524_288),
    "titok-bl-128-vq8k": (98_304, 85_993_792, 303_563_604, 524_288),
    "titok-sl-256-vq8k": (131_072, 25_910_848, 303_694_676, 524_288),
    "titok-ll-32-vae": (32_768, 303_430_688, 303_416_148),
    "titok-bl-64-vae": (49_152, 85_920_032, 303_448_916),
    "titok-bl-128-vae": (98_304, 85_969_184, 303_514_452),
}
PART_NAMES = ("latent_tokens", "encoder", "decoder", "quantize", "pixel_quantize", "pixel_decoder")


def giga(flops: float) -> str:
    return f"{flops / 1e9:.1f}"


def counted(work: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture
def unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks as published: every matmul done, none folded into another kernel."""

    def forward(self: maskgit_vqgan.ResnetBlock, x: Tensor) -> Tensor:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return x + h if self.nin_shortcut is None else h + self.nin_shortcut(h)

    def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)

    def soft_codes(logits: Tensor, table: Tensor) -> Tensor:
        return logits.softmax(dim=-1) @ table  # ours asks for an autocast state, meta has none

    monkeypatch.setattr(tokenizer, "soft_codes", soft_codes)
    monkeypatch.setattr(maskgit_vqgan.ResnetBlock, "forward", forward)
    monkeypatch.setattr(maskgit_vqgan, "upsample_conv", upsample_conv)


@pytest.mark.parametrize("name", GFLOPS)
def test_flops_print_as_published(name: str) -> None:
    known, (encoder, decoder, generator) = preset(name), GFLOPS[name]
    costs = tokenizer_costs(known.tokenizer)
    assert giga(costs["encoder"].flops) == encoder
    assert giga(costs["vit_decoder"].flops) == decoder
    assert (known.generator is None) == (generator is None)
    if known.generator is not None:
        assert giga(generator_cost(known.generator).flops) == generator


def test_pixel_networks() -> None:
    costs = tokenizer_costs(preset("titok-l-32").tokenizer)
    assert f"{costs['pixel_codebook'].flops / 1e9:.2f}" == "0.13"
    # upstream's decoder on the meta device counts exactly this
    assert costs["pixel_decoder"].flops == 186_545_864_704
    assert giga(pixel_encoder_cost(VQGANConfig()).flops) == "128.6"


@pytest.mark.parametrize(
    ("name", "steps", "decay", "passes", "generator", "decoding", "total"),
    [
        ("titok-l-32", 8, "linear", 15, 172, 372, 544),
        ("titok-b-64", 8, "linear", 15, 342, 246, 588),
        ("titok-s-128", 8, "linear", 15, 1141, 209, 1351),
        ("titok-s-128", 8, "power-cosine", 16, 1217, 209, 1427),
        ("titok-s-128", 64, "power-cosine", 128, 9740, 209, 9949),
    ],
)
def test_whole_generation_prints_as_published(
    name: str, steps: int, decay: str, passes: int, generator: int, decoding: int, total: int
) -> None:
    known = preset(name)
    assert known.generator is not None
    assert known.sampling is not None
    sampling = known.sampling.updated(num_sample_steps=steps, guidance_decay=decay)
    assert generator_passes(sampling) == passes
    costs = generation_costs(known.tokenizer, known.generator, sampling)
    drawing = costs.pop("generator")
    assert costs == decoding_costs(known.tokenizer)
    rest = sum(cost.flops for cost in costs.values())
    assert round(drawing.flops / 1e9) == generator
    assert round(rest / 1e9) == decoding
    assert round((drawing.flops + rest) / 1e9) == total


@pytest.mark.parametrize("name", PRESETS)
def test_counter_and_models_agree(name: str, unfolded: None) -> None:
    known = preset(name)
    cfg, costs = known.tokenizer, tokenizer_costs(known.tokenizer)
    with torch.device("meta"):
        model, pixels = TiTok(cfg).eval(), torch.empty(1, 3, cfg.crop_size, cfg.crop_size)
        codes = torch.empty(1, cfg.token_size, 1, cfg.num_latent_tokens)
    assert counted(lambda: model.encoder(pixels, model.latent_tokens)) == costs["encoder"].flops
    assert counted(lambda: model.decoder(codes)) == costs["vit_decoder"].flops
    decoding = sum(cost.flops for cost in decoding_costs(cfg).values())
    assert counted(lambda: model.decode(codes)) == decoding

    found = dict.fromkeys(parameters(cfg), 0)
    for key, tensor in model.state_dict().items():
        found[key.split(".")[0]] += tensor.numel()
    assert parameters(cfg) == found
    if known.generator is None:
        return
    with torch.device("meta"):
        generator = generator_class(known.generator)(known.generator).eval()
        ids = torch.empty(1, known.generator.image_seq_len, dtype=torch.int64)
        label = torch.empty(1, dtype=torch.int64)
    cost = generator_cost(known.generator)
    assert counted(lambda: generator.lm_head(generator.hidden(ids, label))) == cost.flops
    assert sum(p.numel() for p in generator.parameters()) == cost.parameters


def test_pixel_encoder_agrees_with_the_counter(unfolded: None) -> None:
    config = VQGANConfig(64, (1, 2, 2), 3, 96, 128)
    with torch.device("meta"):
        model, pixels = maskgit_vqgan.MaskGitVQGAN(config), torch.empty(1, 3, 48, 48)
        codes = torch.empty(1, 96, 12, 12)
    encoder, decoder = pixel_encoder_cost(config, 48), pixel_decoder_cost(config, 48)
    assert counted(lambda: model.encoder(pixels)) == encoder.flops
    assert counted(lambda: model.decoder(codes)) == decoder.flops
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder.parameters
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder.parameters


@pytest.mark.parametrize("name", PARTS)
def test_parameters_are_the_published_ones(name: str) -> None:
    found = parameters(preset(name).tokenizer)
    assert found == dict(zip(PART_NAMES, PARTS[name], strict=False))


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 16),
        ({"guidance_scale": 0.0}, 8),
        ({"guidance_decay": "linear", "num_sample_steps": 1}, 1),
        ({"guidance_decay": "linear", "guidance_scale": 0.0}, 8),
        ({"guidance_decay": "power-cosine", "guidance_scale": 1.0}, 16),
        ({"guidance_interval": (0.25, 0.75)}, 12),
        ({"guidance_decay": "power-cosine", "guidance_interval": (0.0, 0.5)}, 12),
    ],
)
def test_passes(changes: dict[str, Any], passes: int) -> None:
    assert generator_passes(SamplingConfig().updated(**changes)) == passes


def test_bytes_of_a_stage() -> None:
    cost = Cost(parameters=100, float32_parameters=10, lookups=40, boundary=7, activations=70)
    assert cost.weight_bytes() == 400
    assert cost.weight_bytes("bfloat16") == 90 * 2 + 10 * 4
    # the table of 40 is not streamed; boundary and activations grow with the batch
    assert cost.minimal_bytes("bfloat16", 3) == 50 * 2 + 10 * 4 + 3 * 7 * 2
    assert cost.layerwise_bytes("tf32", 3) == 60 * 4 + 3 * 70 * 4


def test_weights_take_what_the_state_dict_takes() -> None:
    cfg = TokenizerConfig(vit_enc_model_size=(64, 2, 2), vit_dec_model_size=(32, 1, 2))
    with torch.device("meta"):
        model = TiTok(cfg).to(torch.bfloat16)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    latent_tokens = model.latent_tokens.numel() * 2
    stages = sum(cost.weight_bytes("bfloat16") for cost in tokenizer_costs(cfg).values())
    assert stages + latent_tokens == size


def test_minimum_lies_below_the_layers() -> None:
    known = preset("titok-b-128-512")
    assert known.generator is not None
    assert known.sampling is not None
    costs = tokenizer_costs(known.tokenizer) | generation_costs(
        known.tokenizer, known.generator, known.sampling
    )
    for cost in costs.values():
        assert cost.minimal_bytes("bfloat16", 8) <= cost.layerwise_bytes("bfloat16", 8)


def test_one_block_by_hand() -> None:
    shape = {"image_seq_len": 2, "codebook_size": 5, "condition_num_classes": 3}
    cost = generator_cost(GeneratorConfig("ViT", 4, 1, 2, 8, **shape))
    # L = 3, D = 4: qkv, scores and sums, projection, two of the MLP; then the head on K = 2
    assert cost.flops == 2 * (3 * 4 * 12 + 2 * 3 * 3 * 4 + 3 * 4 * 4 + 2 * 3 * 4 * 8 + 2 * 4 * 5)
    moved = 3 * (4 + 12) + 4 * 3 * 4 + 3 * (4 + 4) + 2 * 3 * (4 + 8) + 2 * (4 + 5)
    assert (cost.activations, cost.boundary) == (moved, 1 + 2 + 2 * 5)
    assert cost.lookups == 10 * 4


def test_speed_of_light_is_compute_or_memory() -> None:
    costs = tokenizer_costs(preset("titok-l-32").tokenizer)
    many = speed_of_light("titok-l-32", "a100-sxm-80gb", "bfloat16", 128)
    assert many["vit_decoder"] == 128 * costs["vit_decoder"].flops / 312e12
    one = speed_of_light(preset("titok-l-32"), "a100-sxm-80gb")
    assert one["pixel_codebook"] == costs["pixel_codebook"].minimal_bytes("bfloat16") / 2039e9
    weights = 8 * 2 * (177_202_432 - 768 * 5098)  # 8 steps, without the embedding table
    assert one["generator"] == (weights + 2 * 33) / 2039e9
    slow = speed_of_light("titok-l-32", "a100-sxm-80gb", "float32", 128)
    assert slow["vit_decoder"] == pytest.approx(16 * many["vit_decoder"])
    assert slow["code_search"] == many["code_search"]  # float32 in both
    assert set(one) == {*costs, "generator"}
    assert set(speed_of_light("titok-ll-32-vae", "h100-sxm")) == {"encoder", "vit_decoder"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("titok-l-33", "h100-sxm"), "unknown preset 'titok-l-33'"),
        (("titok-l-32", "h101"), "device wants one of a100-sxm-40gb.*got 'h101'"),
        (("titok-l-32", "h100-sxm", "int8"), "dtype wants one of float32.*got 'int8'"),
        (("titok-l-32", "h100-sxm", "tf32", 0), "batch wants at least 1; got 0"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        speed_of_light(*arguments)
