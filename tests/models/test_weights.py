"""Weights in and out: every published name, every form of a source, and what does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from support.tiny_models import (
    TINY_KINDS,
    TINY_VQGAN,
    assert_same_weights,
    official_state,
    photographs,
    rebuilt,
    tiny_generator,
    tiny_generator_config,
    tiny_tokenizer,
    tiny_tokenizer_config,
)

from titok_fast import (
    ImageBert,
    MaskGitVQGAN,
    TiTok,
    UViTBert,
)
from titok_fast.io.files import WEIGHT_NAMES

KINDS = (*TINY_KINDS, "ViT", "UViT", "vqgan")


def tiny(kind: str) -> Any:
    if kind == "vqgan":
        return rebuilt(MaskGitVQGAN(TINY_VQGAN))
    return tiny_generator(kind) if kind in ("ViT", "UViT") else tiny_tokenizer(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path / "new" / "folder")
    written = tmp_path / "new" / "folder"
    assert sorted(p.name for p in written.iterdir()) == ["config.json", "model.safetensors"]
    loaded = type(model).from_pretrained(written)
    assert loaded.config == model.config
    assert not loaded.training
    assert_same_weights(model, loaded)
    tensors = load_file(written / "model.safetensors")
    assert tensors.keys() == official_state(model).keys()
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_saving_a_half_precision_model_writes_float32(tmp_path: Path) -> None:
    model = tiny_tokenizer().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    loaded = TiTok.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.quantize.embedding.weight.dtype == torch.float32
    assert_same_weights(model, loaded)


def test_directory_with_pytorch_model_bin(tmp_path: Path) -> None:
    model = tiny_generator("ViT")
    torch.save(official_state(model), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_official()))
    assert_same_weights(model, ImageBert.from_pretrained(tmp_path))
    assert WEIGHT_NAMES[0] == "model.safetensors"  # preferred where both lie
    other = rebuilt(UViTBert(tiny_generator_config("UViT")))
    save_file(official_state(other), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: \d+ tensors do not fit"):
        ImageBert.from_pretrained(tmp_path)
    assert_same_weights(model, ImageBert.from_pretrained(tmp_path, filename="pytorch_model.bin"))


@pytest.mark.parametrize("form", ["yaml file", "json file", "mapping", "omegaconf", "object"])
def test_plain_bin_with_a_configuration(form: str, tmp_path: Path) -> None:
    model, weights = tiny_tokenizer("legacy"), tmp_path / "tokenizer_titok.bin"
    torch.save(official_state(model), weights)
    official = model.config.to_official()
    OmegaConf.save(OmegaConf.create(official), tmp_path / "titok.yaml")
    (tmp_path / "titok.json").write_text(json.dumps(official))
    config = {
        "yaml file": tmp_path / "titok.yaml",
        "json file": str(tmp_path / "titok.json"),
        "mapping": official,
        "omegaconf": OmegaConf.create(official),
        "object": model.config,
    }[form]
    loaded = TiTok.from_pretrained(weights, config=config)
    assert loaded.config == model.config
    assert_same_weights(model, loaded)
    assert torch.equal(loaded.encode(photographs(32))[0], model.encode(photographs(32))[0])


def test_a_file_without_configuration_asks_for_one(tmp_path: Path) -> None:
    torch.save(official_state(tiny_tokenizer()), tmp_path / "weights.bin")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: pass config="):
        TiTok.from_pretrained(tmp_path / "weights.bin")


def test_vqgan_needs_no_configuration(tmp_path: Path) -> None:
    model = rebuilt(MaskGitVQGAN(TINY_VQGAN))
    torch.save(official_state(model), tmp_path / "vqgan.bin")
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.weight is .*, wanted \(512, 256"):
        MaskGitVQGAN.from_pretrained(tmp_path / "vqgan.bin")  # the published sizes by default
    assert_same_weights(
        model, MaskGitVQGAN.from_pretrained(tmp_path / "vqgan.bin", config=TINY_VQGAN)
    )


def test_generator_of_the_other_class_is_named() -> None:
    with pytest.raises(ValueError, match=r"ImageBert wants model_type 'ViT'.*'UViT'"):
        ImageBert(tiny_generator_config("UViT"))


def test_every_misfit_is_listed_in_one_error(tmp_path: Path) -> None:
    state = official_state(tiny_tokenizer())
    state.pop("latent_tokens")
    state.pop("encoder.ln_pre.weight")
    state["decoder.surplus"] = torch.zeros(3)
    state["decoder.mask_token"] = torch.zeros(1, 1, 5)
    torch.save(state, tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="4 tensors do not fit this model") as error:
        TiTok.from_pretrained(tmp_path / "weights.bin", config=tiny_tokenizer_config())
    for line in (
        "missing latent_tokens (8, 64)",
        "missing encoder.ln_pre.weight (64,)",
        "extra decoder.surplus (3,)",
        "decoder.mask_token is (1, 1, 5), wanted (1, 1, 64)",
    ):
        assert line in str(error.value)
    with pytest.raises(ValueError, match="4 tensors do not fit"):
        tiny_tokenizer().load_state_dict(state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    state = official_state(tiny_generator("ViT"))
    state["model.lm_head.bias"][3] = value
    save_file(state, tmp_path / "model.safetensors")
    config = tiny_generator_config("ViT")
    with pytest.raises(ValueError, match=r"1 tensors.*\n  model\.lm_head\.bias holds NaN or Inf"):
        ImageBert.from_pretrained(tmp_path, config=config)
    with pytest.raises(ValueError, match=r"model\.lm_head\.bias holds NaN or Inf"):
        ImageBert(config).load_state_dict(state)


def test_position_ids_of_old_files_are_ignored(tmp_path: Path) -> None:
    model = tiny_generator("ViT")
    state = official_state(model)
    state["model.embeddings.position_ids"] = torch.arange(9)[None]
    torch.save(state, tmp_path / "weights.bin")
    loaded = ImageBert.from_pretrained(tmp_path / "weights.bin", config=model.config)
    assert_same_weights(model, loaded)
    loaded.load_state_dict(state)
    assert_same_weights(model, loaded)


def test_load_state_dict_takes_our_names_too() -> None:
    model, other = tiny_generator("ViT"), ImageBert(tiny_generator_config("ViT"))
    other.load_state_dict(model.state_dict())
    assert_same_weights(model, other)
    state = model.state_dict()
    state.pop("pos_embed")
    with pytest.raises(RuntimeError, match="pos_embed"):
        other.load_state_dict(state)
