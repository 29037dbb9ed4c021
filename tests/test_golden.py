"""Stored outputs of the official code, float32, under weights that any machine can rebuild.

Tolerances are the README's of those files: ids equal but for ties of 1e-6, latents and logits
within 1e-4 relative norm, pixels within 1e-3.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import GOLDEN, official_weights, on_meta, rebuilt, relative
from torch import Tensor, nn

from titok_fast import ImageBert, MaskGitVQGAN, TiTok, generator_class, preset
from titok_fast.models.generator import MaskedGenerator
from titok_fast.models.quantizer import DiagonalGaussian, VectorQuantizer
from titok_fast.models.weights import PretrainedModel, from_official, to_official

LATENT, PIXEL, TIE = 1e-4, 1e-3, 1e-6
TOKENIZERS = ("s128", "b64", "l32", "bl64_vq8k", "sl256_vq8k", "bl64_vae_c16", "ll32_vae_c16")


def split(names: tuple[str, ...], slow: tuple[str, ...]) -> list[Any]:
    """`names` as parameters, with those that take over 8 s marked."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names]


def read(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return read("inputs")["images_uint8"].float() / 255


@pytest.fixture(scope="module")
def configs() -> dict[str, Any]:
    return json.loads((GOLDEN / "configs.json").read_text())


def partly_rebuilt(model: PretrainedModel, *, without: tuple[str, ...]) -> Any:
    """Weights for all but the named parts, which stay on the meta device: half the time."""
    template = model.state_dict()
    template = {k: v for k, v in template.items() if not k.startswith(without)}
    weights = official_weights(to_official(template, model.kind))
    state = from_official(weights, template, model.kind)
    nn.Module.load_state_dict(model, state, strict=False, assign=True)
    return model.eval()


def assert_ids_agree(z: Tensor, got: Tensor, want: Tensor, quantizer: VectorQuantizer) -> None:
    """Where ids differ, both must be at the smallest distance, up to `TIE`."""
    got, want = got.flatten(), want.flatten()
    rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).double()
    codes = quantizer.embedding.weight.double()
    if quantizer.use_l2_norm:
        rows, codes = (nn.functional.normalize(t, dim=-1) for t in (rows, codes))
    distance = [((rows - codes[ids]) ** 2).sum(dim=1) for ids in (got, want)]
    differ = got != want
    assert not (differ & ((distance[0] - distance[1]).abs() > TIE * distance[1])).any()
    assert differ.double().mean() < 0.05  # ties are rare


def assert_pixels_agree(pixels: Tensor, golden: dict[str, Tensor]) -> None:
    error = (pixels[:, :, ::8, ::8] - golden["pixels_strided"]).abs().max()
    assert error < PIXEL
    mean, std = golden["pixels_mean_std"]
    assert (pixels.mean() - mean).abs() < PIXEL
    assert (pixels.std() - std).abs() < PIXEL


def check_encoder(model: TiTok, images: Tensor, golden: dict[str, Tensor]) -> None:
    z = model.encoder(images, model.latent_tokens)
    assert z.shape == golden["z"].shape
    assert relative(z, golden["z"]) < LATENT
    if model.config.quantize_mode == "vae":
        got = DiagonalGaussian(z)
        for name, value in (("mean", got.mean), ("logvar", got.logvar), ("kl", got.kl())):
            assert value.shape == golden[name].shape, name
            assert relative(value, golden[name]) < LATENT, name
        return
    zq, result = model.quantize(z)
    ids = result["min_encoding_indices"]
    assert ids.shape == golden["ids"].shape
    assert_ids_agree(z, ids, golden["ids"], model.quantize)
    same = (ids == golden["ids"]).unsqueeze(1)
    assert relative(zq * same, golden["zq"] * same) < LATENT
    for name in ("quantizer_loss", "commitment_loss", "codebook_loss"):
        assert relative(result[name], golden[name]) < LATENT, name


def check_decoder(model: TiTok, golden: dict[str, Tensor]) -> None:
    given = golden.get("decode_ids", golden.get("decode_latent"))
    assert given is not None
    codes = model.codes(given)
    if "proxy_logits_strided" in golden:
        logits = model.decoder(codes)[:, ::32, ::4, ::4]
        assert relative(logits, golden["proxy_logits_strided"]) < LATENT
    assert_pixels_agree(model.decode_tokens(given), golden)


@torch.no_grad()
@pytest.mark.parametrize("name", split(TOKENIZERS, slow=("l32", "ll32_vae_c16")))
def test_encoder(name: str, images: Tensor, configs: dict[str, Any]) -> None:
    model = partly_rebuilt(on_meta(TiTok, configs[name]), without=("decoder.", "pixel_"))
    check_encoder(model, images, read(f"tokenizer_{name}"))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS[1:])
def test_decoder(name: str, configs: dict[str, Any]) -> None:
    model = partly_rebuilt(on_meta(TiTok, configs[name]), without=("encoder.",))
    check_decoder(model, read(f"tokenizer_{name}"))


@torch.no_grad()
def test_whole_tokenizer_from_an_official_file(
    tmp_path: Path, images: Tensor, configs: dict[str, Any]
) -> None:
    layout = to_official(on_meta(TiTok, configs["s128"]).state_dict(), "tokenizer")
    torch.save(official_weights(layout), tmp_path / "tokenizer.bin")
    model = TiTok.from_pretrained(tmp_path / "tokenizer.bin", config=configs["s128"])
    golden = read("tokenizer_s128")
    check_encoder(model, images, golden)
    check_decoder(model, golden)


@pytest.fixture(scope="module")
def generator_l32() -> MaskedGenerator:
    return rebuilt(on_meta(ImageBert, preset("titok-l-32").generator))


def check_logits(model: MaskedGenerator, golden: dict[str, Tensor]) -> None:
    labels = torch.tensor([7, 985])
    for drop, key in ((0.0, "cond_logits_strided"), (1.0, "uncond_logits_strided")):
        logits = model(golden["input_ids"], labels, cond_drop_prob=drop)
        assert logits.shape == (2, model.config.image_seq_len, model.config.codebook_size)
        assert relative(logits[:, :, ::16], golden[key]) < LATENT, key


@torch.no_grad()
def test_generator_l32(generator_l32: MaskedGenerator) -> None:
    check_logits(generator_l32, read("generator_l32"))


@torch.no_grad()
@pytest.mark.parametrize("name", split(("titok-b-64", "titok-s-128"), slow=("titok-s-128",)))
def test_generator(name: str) -> None:
    config = preset(name).generator
    assert config is not None
    model = rebuilt(on_meta(generator_class(config), config))
    check_logits(model, read("generator_" + name.removeprefix("titok-").replace("-", "")))


@pytest.mark.parametrize(
    "decay", split(("linear", "constant", "power-cosine"), slow=("constant", "power-cosine"))
)
def test_generate_repeats_the_stored_ids(generator_l32: MaskedGenerator, decay: str) -> None:
    torch.manual_seed(1234)
    ids = generator_l32.generate(torch.tensor([7, 985]), 4.5, decay, 3.0, 9.5, True, 8)
    assert torch.equal(ids, read("generator_l32")[f"generate_{decay}"])


@pytest.fixture(scope="module")
def vqgan() -> MaskGitVQGAN:
    return rebuilt(on_meta(MaskGitVQGAN, None))


@torch.no_grad()
def test_maskgit_vqgan_encoder(vqgan: MaskGitVQGAN, images: Tensor) -> None:
    golden, hidden = read("maskgit_vqgan"), vqgan.encoder(images)
    assert relative(hidden[:, ::8, ::2, ::2], golden["hidden_strided"]) < LATENT
    rows = hidden.permute(0, 2, 3, 1).flatten(0, 2)
    ids = vqgan.quantize.nearest(rows).view(2, -1)
    assert_ids_agree(hidden, ids, golden["ids"], vqgan.quantize)
    assert torch.equal(vqgan.encode(images[:1]), ids[:1])


@torch.no_grad()
def test_maskgit_vqgan_decoder(vqgan: MaskGitVQGAN) -> None:
    golden = read("maskgit_vqgan")
    assert_pixels_agree(vqgan.decode_unclamped(golden["decode_ids"]), golden)
