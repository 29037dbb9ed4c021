"""The tokenizer: the published zoo's sizes, its quirks, its round trip and its errors."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.tiny_models import (
    TINY_KINDS,
    TINY_VQGAN,
    on_fake,
    on_meta,
    photographs,
    rebuilt,
    relative,
    tiny_tokenizer,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from titok_fast import PRESETS, MaskGitVQGAN, TiTok, TokenizerConfig, preset
from titok_fast.models import vqgan as vqgan_module
from titok_fast.models.decoder import unfold_tokens
from titok_fast.models.quantizer import DiagonalGaussian, VectorQuantizer
from titok_fast.models.vqgan import ResnetBlock, upsample_conv
from titok_fast.models.weights import to_official

# parameters (by part in tests/test_costs.py), tensors in the published file
ZOO = {
    "titok-s-128": (83_674_639, 308),
    "titok-b-64": (204_814_095, 404),
    "titok-l-32": (641_054_735, 692),
    "titok-bl-64-vq8k": (390_016_148, 459),
    "titok-bl-128-vq8k": (390_179_988, 459),
    "titok-sl-256-vq8k": (330_260_884, 411),
    "titok-ll-32-vae": (606_879_604, 602),
    "titok-bl-64-vae": (389_418_100, 458),
    "titok-bl-128-vae": (389_581_940, 458),
}
# what upstream's class has at 512 px, where its head gives a quarter of the proxy codes
UPSTREAM_512 = {"titok-l-64-512": 643_512_335, "titok-b-128-512": 206_731_023}
STAGE_1 = {"titok-s-128": 52_934_156, "titok-b-64": 174_073_612, "titok-l-32": 610_314_252}


def count(module: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


@pytest.mark.parametrize("name", ZOO)
def test_zoo_has_the_published_sizes_and_tensors(name: str) -> None:
    model = on_meta(TiTok, preset(name).tokenizer)
    official = to_official(model.state_dict(), "tokenizer")
    assert (count(model), len(official)) == ZOO[name]
    assert TokenizerConfig.from_official(model.config.to_official()) == model.config


def test_presets_are_the_zoo_and_the_two_at_512() -> None:
    assert set(PRESETS) == set(ZOO) | set(UPSTREAM_512) | {"fashion-16"}


@pytest.mark.parametrize("name", STAGE_1)
def test_stage_1_is_the_same_without_the_pixel_parts(name: str) -> None:
    stage_1 = on_meta(TiTok, replace(preset(name).tokenizer, finetune_decoder=False))
    assert count(stage_1) == STAGE_1[name]
    assert count(stage_1, trainable=True) == STAGE_1[name]


def test_stage_2_freezes_what_makes_the_codes() -> None:
    assert count(on_meta(TiTok, preset("titok-l-32").tokenizer), trainable=True) == 337_562_627
    assert count(on_meta(TiTok, preset("titok-s-128").tokenizer), trainable=True) == 57_741_315


@pytest.mark.parametrize(
    ("size", "base", "per_token"),
    [("small", 52_733_456, 1_536), ("base", 173_936_400, 2_304), ("large", 610_240_528, 3_072)],
)
def test_preliminary_grid(size: str, base: int, per_token: int) -> None:
    for K in (16, 256):
        config = TokenizerConfig(K, 1024, 16, True, 0.25, size, size, finetune_decoder=False)
        assert count(on_meta(TiTok, config)) == base + per_token * (K - 16)


@pytest.mark.parametrize("name", UPSTREAM_512)
def test_512_px_decodes_to_512_px(name: str) -> None:
    config = preset(name).tokenizer
    with FakeTensorMode(), torch.no_grad():
        model = on_fake(TiTok, config, "cpu")
        z, result = model.encode(torch.rand(2, 3, 512, 512))
        assert result["min_encoding_indices"].shape == (2, 1, config.num_latent_tokens)
        assert model.decoder(z).shape == (2, 1024, 32, 32)  # MaskGIT-VQGAN codes of a 512 px image
        assert model.decode(z).shape == (2, 3, 512, 512)
    # our head gives four proxy codes per token: three more rows of 1024 logits than upstream's
    D = config.decoder_size[0]
    assert count(model) - UPSTREAM_512[name] == 3 * 1024 * (2 * D + 1)


def test_maskgit_vqgan_has_the_published_sizes() -> None:
    model = on_meta(MaskGitVQGAN, None)
    assert len(model.state_dict()) == 168
    sizes = (count(model.encoder), count(model.decoder), count(model.quantize))
    assert sizes == (23_775_104, 30_478_339, 262_144)


@torch.no_grad()
@pytest.mark.parametrize("kind", TINY_KINDS)
def test_official_signatures_and_return_values(kind: str) -> None:
    model, images = tiny_tokenizer(kind), photographs(32)
    z, result = model.encode(images)
    assert (z.shape, z.dtype) == ((3, 12, 1, 8), torch.float32)
    decoded, _ = model(images)
    if kind == "vae":
        assert isinstance(result, DiagonalGaussian)
        assert result.mode().shape == z.shape
        assert result.kl().shape == (3, 8)
        torch.testing.assert_close(model.decode_tokens(result.mode()), model.decode(result.mean))
    else:
        ids = result["min_encoding_indices"]
        assert (ids.shape, ids.dtype) == ((3, 1, 8), torch.int64)
        assert torch.equal(decoded, model(images)[0])
        by_ids = model.decode_tokens(ids)
        torch.testing.assert_close(by_ids, decoded, atol=1e-4, rtol=1e-4)
        assert torch.equal(by_ids, model.decode_tokens(ids.squeeze(1)))
        assert torch.equal(by_ids, model.decode_tokens(ids.to(torch.int16)))
    assert decoded.shape == ((3, 48, 16, 16) if kind == "stage1" else (3, 3, 32, 32))


@pytest.mark.parametrize("kind", ["legacy", "stage1", "vq"])
def test_losses_are_zero_only_where_the_encoder_is_frozen(kind: str) -> None:
    model = tiny_tokenizer(kind)
    _, result = model.encode(photographs(32))
    _, direct = model.quantize(model.encoder(photographs(32), model.latent_tokens))
    for name in ("quantizer_loss", "commitment_loss", "codebook_loss"):
        assert direct[name] > 0
        assert result[name] == (0 if kind == "legacy" else direct[name])
    assert result["quantizer_loss"].requires_grad == (kind != "legacy")


def test_unfold_keeps_colour_fastest() -> None:
    grid, p, c = 2, 2, 3
    x = torch.randn(1, grid * grid, p * p * c)
    got = unfold_tokens(x, grid, p)
    for h, w, p1, p2, colour in torch.cartesian_prod(*map(torch.arange, (2, 2, 2, 2, 3))).tolist():
        want = x[0, h * grid + w, (p1 * p + p2) * c + colour]
        assert got[0, colour, h * p + p1, w * p + p2] == want


def test_gaussian_clamps_and_measures() -> None:
    parameters = torch.full((1, 4, 1, 3), 0.5)
    parameters[:, 2], parameters[:, 3] = -99.0, 99.0
    got = DiagonalGaussian(parameters)
    assert got.logvar[0, :, 0, 0].tolist() == [-30.0, 20.0]
    mean, logvar = got.mean.double(), got.logvar.double()
    want = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2))
    torch.testing.assert_close(got.kl().double(), want)
    draws = DiagonalGaussian(torch.zeros(20_000, 2, 1, 1)).sample()
    assert abs(draws.mean()) < 0.05
    assert abs(draws.std() - 1) < 0.05


def plain_block(block: ResnetBlock, x: Tensor) -> Tensor:
    """As published: the shortcut convolution acts on the block's own result."""
    h = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        h = conv(F.silu(F.group_norm(h, 32, norm.weight, norm.bias, 1e-6)))
    return x + h if block.nin_shortcut is None else h + block.nin_shortcut(h)


@torch.no_grad()
@pytest.mark.parametrize("c_out", [32, 64], ids=["same", "changes"])
@pytest.mark.parametrize("seed", range(3))
def test_folded_block_equals_the_plain_one(c_out: int, seed: int) -> None:
    torch.manual_seed(seed)
    block, x = ResnetBlock(32, c_out), torch.randn(2, 32, 9, 7)
    assert (block.nin_shortcut is not None) == (c_out != 32)
    assert relative(block(x), plain_block(block, x)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(32, 32), (33, 40), (64, 17)])
def test_phases_equal_upsampling(
    dtype: torch.dtype, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 5, *size, dtype=dtype)
    weight, bias = torch.randn(7, 5, 3, 3, dtype=dtype), torch.randn(7, dtype=dtype)
    want = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    for threshold in (0, 10**9):  # always in phases, never in phases
        monkeypatch.setattr(vqgan_module, "PHASES_FROM_PIXELS", threshold)
        got = upsample_conv(x, weight, bias)
        assert (got.shape, got.dtype) == (want.shape, dtype)
        assert relative(got, want) < (1e-6 if dtype == torch.float32 else 1e-12)


@torch.no_grad()
def test_maskgit_vqgan_round_trip_and_errors() -> None:
    model = rebuilt(MaskGitVQGAN(TINY_VQGAN))
    codes = model.encode(photographs(32))
    assert (codes.shape, codes.dtype) == ((3, 256), torch.int64)
    pixels = model.decode(codes)
    assert pixels.shape == (3, 3, 32, 32)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert torch.equal(pixels, model.decode_tokens(codes.view(3, 16, 16)))
    assert model.decode_unclamped(codes).abs().max() > 1  # else the clamp was not tested
    assert model.decode(torch.zeros(1, 4, 6, dtype=torch.int64)).shape == (1, 3, 8, 12)
    with pytest.raises(ValueError, match=r"images \(B, 3, H, W\), sides multiples of 2; got"):
        model.encode(torch.rand(1, 3, 31, 32))
    with pytest.raises(ValueError, match=r"codes \(B, G\*G\) or \(B, h, w\); got \(2, 5\)"):
        model.decode(torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes lie in 0\.\.47; got 0\.\.48"):
        model.decode(torch.tensor([[0, 1, 2, 48]]))


@pytest.mark.parametrize("shape", [(1, 3, 31, 32), (1, 1, 32, 32), (3, 32, 32), (1, 4, 32, 32)])
def test_wrong_images_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"TiTok wants images \(B, 3, 32, 32\); got .*to_tensor"):
        tiny_tokenizer().encode(torch.rand(shape))


def test_wrong_codes_and_ids_are_named() -> None:
    model = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"wants codes \(B, 12, 1, 8\); got \(1, 12, 1, 9\)"):
        model.decode(torch.zeros(1, 12, 1, 9))
    for tokens in (torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 8)):
        with pytest.raises(ValueError, match=r"wants integer ids \(B, 8\); got"):
            model.decode_tokens(tokens)
    with pytest.raises(ValueError, match=r"token ids lie in 0\.\.63; got -1\.\.-1"):
        model.decode_tokens(torch.full((1, 8), -1))
    with pytest.raises(ValueError, match=r"got 64\.\.64 \(64 is the mask: was sampling finished"):
        model.decode_tokens(torch.full((1, 8), 64))


@torch.no_grad()
def test_empty_batch() -> None:
    model = tiny_tokenizer()
    z, result = model.encode(torch.empty(0, 3, 32, 32))
    assert result["min_encoding_indices"].shape == (0, 1, 8)
    assert model.decode(z).shape == (0, 3, 32, 32)


@torch.no_grad()
@pytest.mark.parametrize("kind", TINY_KINDS)
def test_bfloat16_keeps_codebooks_in_float32(kind: str) -> None:
    model = tiny_tokenizer(kind).to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    tables = [m for m in model.modules() if isinstance(m, VectorQuantizer)]
    assert len(tables) == {"legacy": 2, "stage1": 1, "vq": 1, "vae": 0}[kind]
    assert all(m.embedding.weight.dtype == torch.float32 for m in tables)
    z, _ = model.encode(photographs(32))
    assert z.dtype == torch.float32
    exact = tiny_tokenizer(kind).decode(z)
    got = model.decode(z)
    assert got.dtype == torch.bfloat16
    assert relative(got, exact) < 0.05
