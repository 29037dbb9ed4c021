"""Side by side with a checkout of bytedance/1d-tokenizer, named by TITOK_UPSTREAM.

Both sides hold the golden files' weights, so that no id hangs on a rounding. The quick tests shrink
the official configurations; the slow ones take them as they are.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from support.official import CHECKOUT, needs_upstream, official
from support.tiny_models import on_meta, photographs, rebuilt
from test_golden import assert_ids_agree

from titok_fast import ImageBert, MaskGitVQGAN, TiTok, UViTBert
from titok_fast.models.weights import PretrainedModel, to_official

pytestmark = needs_upstream
PIXEL, LOGIT = 1e-3, 1e-3
ZOO = (
    "titok_s128",
    "titok_b64",
    "titok_l32",
    "titok_bl64_vq8k",
    "titok_bl128_vq8k",
    "titok_sl256_vq8k",
    "titok_bl64_vae_c16",
    "titok_bl128_vae_c16",
    "titok_ll32_vae_c16",
)
DECAYS = ("constant", "linear", "power-cosine")


@pytest.fixture(scope="module")
def upstream() -> Iterator[SimpleNamespace]:
    """The official classes."""
    with official("modeling.maskgit") as maskgit, official("modeling.titok") as titok:
        yield SimpleNamespace(
            TiTok=titok.TiTok,
            ViT=maskgit.ImageBert,
            UViT=maskgit.UViTBert,
            VQGAN=titok.PretrainedTokenizer,
        )


def official_config(name: str, **sizes: Any) -> DictConfig:
    """A configuration of the checkout, as it is or with some fields of its sections changed."""
    config = OmegaConf.load(Path(CHECKOUT) / "configs" / "infer" / "TiTok" / f"{name}.yaml")
    for section in ("vq_model", "generator"):
        for key, value in sizes.items():
            if key in config.model.get(section, {}):
                config.model[section][key] = value
    config.dataset.preprocessing.crop_size = sizes.get("crop_size", 256)
    assert isinstance(config, DictConfig)
    return config


def shrunk(name: str) -> DictConfig:
    """64 px and upstream's smallest ViT; the generator's sizes are free."""
    return official_config(
        name,
        vit_enc_model_size="small",
        vit_dec_model_size="small",
        num_latent_tokens=16,
        codebook_size=512,
        crop_size=64,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=384,
    )


def exchanged(ours: PretrainedModel, theirs: Any, folder: Path) -> Any:
    """Save ours, load it by the official class, save that, load it by ours; all bit for bit.

    Returns:
        The official model, holding our weights.
    """
    ours.save_pretrained(folder / "ours")
    theirs = theirs.from_pretrained(folder / "ours").eval()
    wanted, got = to_official(ours.state_dict(), ours.kind), theirs.state_dict()
    assert got.keys() == wanted.keys()  # their loader is not strict
    for key, tensor in wanted.items():
        assert torch.equal(got[key], tensor), key
    (folder / "ours" / "model.safetensors").unlink()

    theirs.save_pretrained(folder / "theirs")
    back = type(ours).from_pretrained(folder / "theirs")
    assert back.config == ours.config
    for key, tensor in back.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), key
    (folder / "theirs" / "model.safetensors").unlink()
    return theirs


@torch.no_grad()
def check_tokenizer(config: DictConfig, upstream: SimpleNamespace, folder: Path) -> None:
    ours = rebuilt(on_meta(TiTok, config))
    theirs = exchanged(ours, upstream.TiTok, folder)
    images = photographs(ours.config.crop_size)[:2]
    torch.manual_seed(3)
    zq, got = ours.encode(images)
    torch.manual_seed(3)
    want_zq, want = theirs.encode(images)
    assert zq.shape == want_zq.shape
    if ours.config.quantize_mode == "vae":
        assert (got.mean - want.mean).abs().max() < LOGIT
        assert (got.logvar - want.logvar).abs().max() < LOGIT
        assert (zq - want_zq).abs().max() < LOGIT  # the same noise, drawn in the same order
        tokens = want.mode()
    else:
        z = theirs.encoder(pixel_values=images, latent_tokens=theirs.latent_tokens)
        tokens = want["min_encoding_indices"]
        assert got["min_encoding_indices"].shape == tokens.shape
        assert_ids_agree(z, got["min_encoding_indices"], tokens, ours.quantize)
        assert got.keys() == want.keys()
        for name in ("quantizer_loss", "commitment_loss", "codebook_loss"):
            assert (got[name] - want[name]).abs() < 1e-5, name
    assert (ours.decode(want_zq) - theirs.decode(want_zq)).abs().max() < PIXEL
    assert (ours.decode_tokens(tokens) - theirs.decode_tokens(tokens)).abs().max() < PIXEL


@torch.no_grad()
def check_generator(config: DictConfig, upstream: SimpleNamespace, folder: Path) -> None:
    model_type = config.model.generator.model_type
    ours = rebuilt(on_meta({"ViT": ImageBert, "UViT": UViTBert}[model_type], config))
    theirs = exchanged(ours, getattr(upstream, model_type), folder)
    labels, K = torch.tensor([7, 985]), ours.image_seq_len
    ids = torch.randint(ours.mask_token_id + 1, (2, K))
    for drop in (0.0, 0.5, 1.0):
        torch.manual_seed(5)
        got = ours(ids, labels, cond_drop_prob=drop)
        torch.manual_seed(5)
        want = theirs(ids, labels.clone(), cond_drop_prob=drop)
        assert (got - want).abs().max() < LOGIT
    for decay in DECAYS:
        for annealing in (True, False) if K <= 16 else (True,):
            settings = (4.5, decay, 3.0, 9.5, annealing, 4)
            torch.manual_seed(1234)
            got = ours.generate(labels, *settings)
            torch.manual_seed(1234)
            assert torch.equal(got, theirs.generate(labels.clone(), *settings)), settings
    torch.manual_seed(7)
    got_ids, got_mask = ours.masking_input_tokens(got)
    torch.manual_seed(7)
    want_ids, want_mask = theirs.masking_input_tokens(got)
    assert torch.equal(got_ids, want_ids)
    assert torch.equal(got_mask, want_mask)


@pytest.mark.parametrize("name", ["titok_s128", "titok_bl64_vq8k", "titok_bl64_vae_c16"])
def test_shrunk_tokenizers(name: str, upstream: SimpleNamespace, tmp_path: Path) -> None:
    check_tokenizer(shrunk(name), upstream, tmp_path)


def test_shrunk_stage_1(upstream: SimpleNamespace, tmp_path: Path) -> None:
    config = shrunk("titok_s128")
    config.model.vq_model.finetune_decoder = False
    check_tokenizer(config, upstream, tmp_path)


@pytest.mark.parametrize("name", ["titok_l32", "titok_s128"])
def test_shrunk_generators(name: str, upstream: SimpleNamespace, tmp_path: Path) -> None:
    check_generator(shrunk(name), upstream, tmp_path)


def test_upstream_scripts_run_after_changing_the_import(upstream: SimpleNamespace) -> None:
    """Their way of loading: the class from the configuration, then a plain state dict, strictly."""
    config = shrunk("titok_s128")
    for ours, theirs in (
        (TiTok(config), upstream.TiTok(config)),
        (UViTBert(config), upstream.UViT(config)),
    ):
        ours.load_state_dict(theirs.state_dict())
        got = to_official(ours.state_dict(), ours.kind)
        for key, tensor in theirs.state_dict().items():
            assert torch.equal(got[key], tensor), key
        trained = {k for k, p in theirs.named_parameters() if p.requires_grad}
        ours_trained = {k: p for k, p in ours.named_parameters() if p.requires_grad}
        assert to_official(ours_trained, ours.kind).keys() == trained


@torch.no_grad()
def test_maskgit_vqgan(upstream: SimpleNamespace, tmp_path: Path) -> None:
    ours = rebuilt(on_meta(MaskGitVQGAN, None))
    torch.save(ours.state_dict(), tmp_path / "maskgit-vqgan.bin")
    theirs = upstream.VQGAN(tmp_path / "maskgit-vqgan.bin")
    images = photographs(64)
    want = theirs.encode(images)
    assert_ids_agree(theirs.encoder(images), ours.encode(images), want, ours.quantize)
    assert ours.encode(images).shape == want.shape
    assert (ours.decode(want) - theirs.decode(want)).abs().max() < PIXEL
    ours.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == theirs.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_zoo_tokenizers(name: str, upstream: SimpleNamespace, tmp_path: Path) -> None:
    check_tokenizer(official_config(name), upstream, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO[:3])
def test_zoo_generators(name: str, upstream: SimpleNamespace, tmp_path: Path) -> None:
    check_generator(official_config(name), upstream, tmp_path)
