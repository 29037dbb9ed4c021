"""Configurations: read from official files, and refused by the name of what is wrong."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from support.tiny_models import tiny_generator, tiny_generator_config, tiny_tokenizer_config

from titok_fast import GeneratorConfig, ImageBert, SamplingConfig, TokenizerConfig
from titok_fast.sampling_config import MAX_STEPS
from titok_fast.settings import read_official


def test_references_in_configurations_are_resolved(tmp_path: Path) -> None:
    model = tiny_generator("ViT", K=8)
    official = model.config.to_official()
    official["model"]["generator"]["image_seq_len"] = "${model.vq_model.num_latent_tokens}"
    official["model"]["generator"]["mask_schedule_strategy"] = "arccos"  # unknown keys are ignored
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(official))
    loaded = ImageBert.from_pretrained(tmp_path)
    assert loaded.config.image_seq_len == 8
    assert ImageBert(OmegaConf.create(official)).config == model.config
    official["model"]["generator"]["image_seq_len"] = "${model.vq_model.tokens}"
    with pytest.raises(ValueError, match=r"unresolved reference.*model\.vq_model\.tokens"):
        GeneratorConfig.from_official(official)


def test_official_sampling_fields() -> None:
    section = {"num_steps": 16, "randomize_temperature": 2.8, "guidance_scale": 6.9}
    section["guidance_decay"] = "power-cosine"  # type: ignore[assignment]
    got = SamplingConfig.from_official({"model": {"generator": section}})
    assert got == SamplingConfig(16, 6.9, "power-cosine", 3.0, 2.8, True)


def test_official_defaults_of_absent_keys() -> None:
    section = {"codebook_size": 4096, "token_size": 12, "num_latent_tokens": 32}
    got = TokenizerConfig.from_official({"model": {"vq_model": section}})
    assert (got.quantize_mode, got.is_legacy, got.finetune_decoder) == ("vq", True, True)
    vae = {"quantize_mode": "vae", "token_size": 16, "is_legacy": False}
    assert not TokenizerConfig.from_official({"model": {"vq_model": vae}}).finetune_decoder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1,", "not readable as YAML or JSON"),
        ("dataset: {}", "top-level key 'model'"),
        ("model: {generator: {}}", r"model\.vq_model wants a tokenizer's section; got None"),
    ],
)
def test_unusable_configuration_files(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        TokenizerConfig.from_official(path)


def test_missing_configuration_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no configuration file at .*absent\.yaml"):
        read_official(tmp_path / "absent.yaml")


def test_interval_survives_a_file() -> None:
    config = SamplingConfig(guidance_interval=(0.25, 1))
    read = SamplingConfig(**json.loads(json.dumps(asdict(config))))
    assert read == config
    assert hash(read) == hash(config)
    assert SamplingConfig().guidance_interval == (0.0, 1.0)


def test_updated_keeps_what_is_none() -> None:
    config = SamplingConfig(16, 2.0)
    assert config.updated(num_sample_steps=None, guidance_scale=None) == config
    assert config.updated(guidance_scale=3.5) == SamplingConfig(16, 3.5)


WRONG_TOKENIZER: list[tuple[dict[str, Any], str]] = [
    ({"vit_enc_model_size": "huge"}, "vit_enc_model_size wants one of .*'huge'"),
    ({"vit_dec_model_size": (64, 2, 3)}, "heads dividing width"),
    ({"num_latent_tokens": 0}, "num_latent_tokens wants at least 1; got 0"),
    ({"codebook_size": 1}, "codebook_size wants at least 2; got 1"),
    ({"quantize_mode": "lfq"}, "quantize_mode wants one of vq, vae; got 'lfq'"),
    ({"vit_enc_patch_size": 5}, "vit_enc_patch_size wants a divisor of crop_size 32; got 5"),
    ({"vit_dec_patch_size": 1}, "vit_dec_patch_size wants a multiple of .* factor 2; got 1"),
    ({"is_legacy": False}, "finetune_decoder=True wants is_legacy=True"),
]
WRONG_GENERATOR: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "RAR"}, "model_type wants one of ViT, UViT; got 'RAR'"),
    ({"num_attention_heads": 3}, "num_attention_heads wants a divisor of hidden_size 64"),
    ({"image_seq_len": 0}, "image_seq_len wants at least 1; got 0"),
    ({"codebook_size": 0}, "codebook_size wants at least 1; got 0"),
    ({"condition_num_classes": 0}, "condition_num_classes wants at least 1; got 0"),
    ({"dropout": 1.0}, r"dropout wants a share in \[0, 1\); got 1.0"),
    ({"attn_drop": -0.1}, r"attn_drop wants a share in \[0, 1\); got -0.1"),
    ({"class_label_dropout": 1.5}, r"class_label_dropout wants a number from 0 to 1; got 1.5"),
]


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        *((tiny_tokenizer_config(), *row) for row in WRONG_TOKENIZER),
        *((tiny_generator_config(), *row) for row in WRONG_GENERATOR),
    ],
)
def test_unknown_configurations_are_named(
    config: Any, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_sample_steps": 0}, "num_sample_steps wants an integer from 1 to 1024; got 0"),
        ({"num_sample_steps": MAX_STEPS + 1}, "from 1 to 1024; got 1025"),
        ({"num_sample_steps": 8.0}, r"an integer from 1 to 1024; got 8\.0"),
        ({"guidance_decay": "cosine"}, "guidance_decay wants one of .*; got 'cosine'"),
        ({"schedule": "uniform"}, "schedule wants one of arccos, .*; got 'uniform'"),
        ({"confidence": "margin"}, "confidence wants one of logit, probability; got 'margin'"),
        ({"guidance_scale": float("nan")}, "guidance_scale wants a finite number; got nan"),
        ({"guidance_scale_pow": float("inf")}, "guidance_scale_pow wants a finite number"),
        ({"randomize_temperature": -1.0}, r"randomize_temperature wants at least 0; got -1\.0"),
        *(
            ({"guidance_interval": wrong}, r"guidance_interval wants \(low, high\) with 0 <= low")
            for wrong in ((0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 1.5), (0.5,), "01", 0.5)
        ),
        ({"guidance_interval": (float("nan"), 1.0)}, "guidance_interval wants"),
        ({"temperature": 1.0}, r"sampling setting wants one of .*; got \['temperature'\]"),
    ],
)
def test_settings_that_do_not_exist_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig().updated(**change)
