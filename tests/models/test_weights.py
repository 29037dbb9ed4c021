"""Weights in and out: every published name, every file form, and every way a file can be bad."""

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from support.processes import python
from support.records import Trap
from support.tiny_models import (
    TINY_KINDS,
    TINY_VQGAN,
    photographs,
    rebuilt,
    tiny_generator,
    tiny_generator_config,
    tiny_tokenizer,
    tiny_tokenizer_config,
)
from torch import Tensor

from titok_fast import (
    GeneratorConfig,
    ImageBert,
    MaskGitVQGAN,
    SamplingConfig,
    TiTok,
    TokenizerConfig,
    UViTBert,
)
from titok_fast.io.files import WEIGHT_NAMES, read_tensors, write_atomic
from titok_fast.models.weights import PretrainedModel, to_official
from titok_fast.settings import read_official

KINDS = (*TINY_KINDS, "ViT", "UViT", "vqgan")


def tiny(kind: str) -> Any:
    if kind == "vqgan":
        return rebuilt(MaskGitVQGAN(TINY_VQGAN))
    return tiny_generator(kind) if kind in ("ViT", "UViT") else tiny_tokenizer(kind)


def official_state(model: PretrainedModel) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in to_official(model.state_dict(), model.kind).items()}


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


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


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_truncated_and_damaged_files(form: str, tmp_path: Path) -> None:
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.bin")
    state = {"a.weight": torch.randn(40, 50), "b.bias": torch.randn(7)}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    shares = [0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.5, 0.9, 0.999]
    for cut in [int(len(content) * share) for share in shares]:
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"weights\.[a-z]+ .*(truncated|damaged)"):
            read_tensors(path)
    pick, refused = random.Random(0), 0
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(20):
            damaged[pick.randrange(min(500, len(content)))] = pick.randrange(256)
        path.write_bytes(damaged)
        try:
            read_tensors(path)
        except ValueError:  # any other exception fails the test
            refused += 1
    assert refused > 50


def test_unreadable_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.bin").touch()

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr("torch.load", refuse)
    with pytest.raises(PermissionError, match="not yours"):
        read_tensors(tmp_path / "weights.bin")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy_format", [False, True])
def test_pickles_with_code_are_refused_not_executed(legacy_format: bool, tmp_path: Path) -> None:
    canary, path = tmp_path / "executed", tmp_path / "weights.bin"
    state = {**official_state(tiny_generator("ViT")), "extra": Trap(canary)}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy_format)
    with pytest.raises(ValueError, match="Python objects beside tensors, which are never executed"):
        ImageBert.from_pretrained(path, config=tiny_generator_config("ViT"))
    assert not canary.exists()
    path.write_bytes(pickle.dumps(Trap(canary)))
    with pytest.raises(ValueError, match="refused"):
        ImageBert.from_pretrained(path, config=tiny_generator_config("ViT"))
    assert not canary.exists()
    pickle.loads(path.read_bytes())  # the canary does sing where code is executed
    assert canary.exists()


def test_file_that_is_no_flat_dictionary(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="flat dictionary from names to tensors"):
        TiTok.from_pretrained(tmp_path / "weights.bin", config=tiny_tokenizer_config())


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


def test_crash_in_writing_keeps_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tiny_generator("ViT")
    old.save_pretrained(tmp_path)
    new = ImageBert(tiny_generator_config("ViT"))

    def crash(tensors: dict[str, Tensor], path: Path, **options: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr("titok_fast.io.files.save_file", crash)
    with pytest.raises(OSError, match="no space left"):
        new.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same_weights(old, ImageBert.from_pretrained(tmp_path))


def test_crash_before_rename_keeps_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def crash(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        tiny_generator("ViT").save_pretrained(tmp_path / "file" / "model")
    if os.geteuid() == 0:  # root may write anywhere
        return
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        tiny_generator("ViT").save_pretrained(locked)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("folder", r"folder holds none of model\.safetensors, pytorch_model\.bin"),
        ("absent/with/slashes", "neither a directory, nor a file, nor a hub repository"),
        ("absent.bin", "neither a directory, nor a file, nor a hub repository"),
        ("./absent/absent.bin", "neither a directory, nor a file, nor a hub repository"),
    ],
)
def test_sources_that_do_not_exist(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        TiTok.from_pretrained(source, config=tiny_tokenizer_config())


def test_hub_offline_with_an_empty_cache(tmp_path: Path) -> None:
    """In another process: huggingface_hub reads its environment once."""
    code = (
        "from titok_fast import TiTok\n"
        "try: TiTok.from_pretrained('yucornetto/tokenizer_titok_l32_imagenet')\n"
        "except FileNotFoundError as error: print(error)"
    )
    done = python("-c", code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    said = "yucornetto/tokenizer_titok_l32_imagenet is no directory here"
    assert done.stdout.startswith(said), done.stderr
    assert "HF_HUB_OFFLINE=1" in done.stdout


def test_hub_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    model, asked = tiny_generator("UViT"), []
    model.save_pretrained(tmp_path)
    torch.save(official_state(model), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()

    def download(repository: str, name: str, *, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        if repository == "someone/private":
            raise OSError("401 Client Error")
        if not (tmp_path / name).is_file():
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    loaded = UViTBert.from_pretrained("someone/generator", revision="v1")
    assert_same_weights(model, loaded)
    assert asked == [
        ("someone/generator", "model.safetensors", "v1"),
        ("someone/generator", "pytorch_model.bin", "v1"),
        ("someone/generator", "config.json", "v1"),
    ]
    with pytest.raises(FileNotFoundError, match=r"cannot be had from the hub .*401 Client Error"):
        UViTBert.from_pretrained("someone/private")
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="hub repository someone/generator holds none of"):
        UViTBert.from_pretrained("someone/generator")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "RAR"}, "model_type wants one of ViT, UViT; got 'RAR'"),
        ({"num_attention_heads": 3}, "num_attention_heads wants a divisor of hidden_size 64"),
        ({"image_seq_len": 0}, "image_seq_len wants at least 1; got 0"),
        ({"codebook_size": 0}, "codebook_size wants at least 1; got 0"),
        ({"condition_num_classes": 0}, "condition_num_classes wants at least 1; got 0"),
        ({"dropout": 1.0}, r"dropout wants a share in \[0, 1\); got 1.0"),
        ({"attn_drop": -0.1}, r"attn_drop wants a share in \[0, 1\); got -0.1"),
        ({"class_label_dropout": 1.5}, r"class_label_dropout wants a number from 0 to 1; got 1.5"),
    ],
)
def test_unknown_configurations_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratorConfig(**{**vars(tiny_generator_config()), **change})  # type: ignore[arg-type]
