"""Load and save weights, and convert parameter names between upstream's and ours.

Only this file knows upstream's parameter names. Nothing here executes code from a file.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from titok_fast.config import GeneratorConfig, TokenizerConfig, VQGANConfig
from titok_fast.io.files import fetch, read_tensors, write_atomic, write_tensors
from titok_fast.models.blocks import set_attention
from titok_fast.settings import read_official

State = dict[str, Tensor]
Model = TypeVar("Model", bound="PretrainedModel")

# ours -> upstream, as (pattern, replacement) pairs applied to whole names
_VIT = r"^((?:en|de)coder\.transformer\.\d+)"  # pixel_decoder has a norm1 of its own
_TOKENIZER_RULES = (
    (_VIT + r"\.norm1\.", r"\1.ln_1."),
    (_VIT + r"\.norm2\.", r"\1.ln_2."),
    (_VIT + r"\.attn\.qkv\.(weight|bias)$", r"\1.attn.in_proj_\2"),
    (_VIT + r"\.attn\.proj\.", r"\1.attn.out_proj."),
    (_VIT + r"\.mlp\.fc1\.", r"\1.mlp.c_fc."),
    (_VIT + r"\.mlp\.fc2\.", r"\1.mlp.c_proj."),
)
_BERT_RULES = (
    (r"^embeddings\.weight$", "model.embeddings.word_embeddings.weight"),
    (r"^pos_embed$", "model.embeddings.position_embeddings.weight"),
    (r"^type_embed$", "model.embeddings.token_type_embeddings.weight"),
    (r"^norm_in\.", "model.embeddings.LayerNorm."),
    (r"^lm_head\.", "model.lm_head."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"model.encoder.layer.\1.attention.output.dense."),
    (r"^blocks\.(\d+)\.norm1\.", r"model.encoder.layer.\1.attention.output.LayerNorm."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"model.encoder.layer.\1.intermediate.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"model.encoder.layer.\1.output.dense."),
    (r"^blocks\.(\d+)\.norm2\.", r"model.encoder.layer.\1.output.LayerNorm."),
)
_BERT_QKV = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")
# upstream stores these Linear layers as 1x1 convolutions
_AS_CONV = ("encoder.conv_out.weight", "decoder.ffn.0.weight", "decoder.ffn.2.weight")
# buffers that old transformers releases wrote into generator files
_IGNORED = ("model.embeddings.position_ids", "model.embeddings.token_type_ids")


def to_official(state: Mapping[str, Tensor], kind: str) -> State:
    """Our state dict under upstream's names and shapes; `kind` as in `PretrainedModel.kind`."""
    official: State = {}
    rules = {"tokenizer": _TOKENIZER_RULES, "ViT": _BERT_RULES}.get(kind, ())
    for name, tensor in state.items():
        qkv = _BERT_QKV.match(name) if kind == "ViT" else None
        if qkv:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                stem = f"model.encoder.layer.{qkv[1]}.attention.self"
                official[f"{stem}.{part}.{qkv[2]}"] = rows
            continue
        if kind == "tokenizer" and name in _AS_CONV:
            tensor = tensor[:, :, None, None]
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        official[name] = tensor
    return official


def from_official(
    official: Mapping[str, Tensor], template: Mapping[str, Tensor], kind: str
) -> State:
    """Upstream's state dict under the names and shapes of our state dict `template`.

    The names in `official` have been checked against `to_official(template)`.
    """
    state: State = {}
    for name, ours in template.items():
        parts = [official[key] for key in to_official({name: ours}, kind)]
        state[name] = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(ours.shape)
    return state


def check_tensors(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: object
) -> None:
    """Raise a ValueError that lists every missing, extra, misshapen and non-finite tensor."""
    missing = [
        f"missing {name} {tuple(t.shape)}" for name, t in wanted.items() if name not in found
    ]
    extra = [f"extra {name} {tuple(t.shape)}" for name, t in found.items() if name not in wanted]
    misshapen = [
        f"{name} is {tuple(found[name].shape)}, wanted {tuple(t.shape)}"
        for name, t in wanted.items()
        if name in found and found[name].shape != t.shape
    ]
    problems = missing + extra + misshapen
    if not problems:
        problems = [
            f"{name} holds NaN or Inf"
            for name, t in found.items()
            if t.is_floating_point() and not t.is_meta and not bool(torch.isfinite(t).all())
        ]
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(
            f"{source}: {len(problems)} tensors do not fit this model. Is the configuration the "
            f"one of these weights?\n  {listing}"
        )


def write_model(
    directory: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Write `config.json` and `model.safetensors` (float32), each atomically."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in state.items()}
    write_tensors(directory / "model.safetensors", tensors)
    write_atomic(directory / "config.json", (json.dumps(config, indent=4) + "\n").encode())


class PretrainedModel(nn.Module):
    """A model that loads published weights and writes what upstream's classes load."""

    config_class: ClassVar[type]
    config: Any
    inference_only = False  # True after `pack` has replaced layers by ones without parameters

    @property
    def kind(self) -> str:
        """Which table of upstream's names applies: "tokenizer", "ViT", "UViT" or "vqgan"."""
        if isinstance(self.config, TokenizerConfig):
            return "tokenizer"
        return self.config.model_type if isinstance(self.config, GeneratorConfig) else "vqgan"

    @classmethod
    def from_pretrained(
        cls: type[Model],
        source: str | Path,
        *,
        config: Any = None,
        filename: str | None = None,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        attention: str | None = None,
    ) -> Model:
        """Load published or saved weights, in eval mode.

        Args:
            source: a directory (`config.json` and `model.safetensors` or `pytorch_model.bin`), a
                weight file, or a hub repository "owner/name". HF_HUB_OFFLINE is honoured.
            config: for sources without `config.json`: a configuration, an official YAML or JSON
                file, or a mapping of that form.
            filename: the weight file inside the directory or repository.
            revision: hub revision.
            device: of the weights.
            dtype: floating type of the weights; codebooks stay float32.
            attention: back end, see attention.py.

        Raises:
            FileNotFoundError: no such directory, file or repository (or offline and not cached).
            ValueError: unreadable file, one with code in it, or tensors that do not fit.
        """
        weights, config_file = fetch(source, filename, revision)
        if config is None and config_file is None and cls.config_class is not VQGANConfig:
            raise FileNotFoundError(
                f"{source} has no config.json: pass config= (a configuration, an official YAML "
                "file, or a mapping)"
            )
        config = config if config is not None else config_file
        with torch.device("meta"):
            model = cls(cls._as_config(config))
        set_attention(model, attention)
        template = model.state_dict()
        official = {k: v for k, v in read_tensors(weights).items() if k not in _IGNORED}
        check_tensors(official, to_official(template, model.kind), weights)
        state = from_official(official, template, model.kind)
        nn.Module.load_state_dict(model, {k: v.float() for k, v in state.items()}, assign=True)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model.eval().to(device=device, dtype=dtype)

    @classmethod
    def _as_config(cls, config: Any) -> Any:
        if config is None or isinstance(config, cls.config_class):
            return config if config is not None else cls.config_class()
        if cls.config_class is VQGANConfig:
            section = read_official(config)["model"].get("pixel") or {}
            return VQGANConfig(**section)
        return cls.config_class.from_official(config)  # type: ignore[attr-defined]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (upstream's names, float32), each atomically.

        Raises:
            ValueError: the fast mode has replaced layers.
            OSError: the directory cannot be written; files already there stay as they were.
        """
        if self.inference_only:
            raise ValueError(
                "a compiled model has no weights to save: save it before compile, or load it again"
            )
        if isinstance(self.config, VQGANConfig):
            config = {"model": {"pixel": dict(vars(self.config))}}
        else:
            config = self.config.to_official()
        write_model(directory, to_official(self.state_dict(), self.kind), config)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's; a dictionary under upstream's names is understood too.

        Raises:
            ValueError: upstream's names, but tensors are missing, extra, misshapen or not finite.
        """
        template = self.state_dict()
        wanted = to_official(template, self.kind)
        found = {k: v for k, v in state_dict.items() if k not in _IGNORED}
        if strict and wanted.keys() != template.keys() and not found.keys() <= template.keys():
            check_tensors(found, wanted, "state dict")
            found = from_official(found, template, self.kind)
        return super().load_state_dict(found, strict=strict, assign=assign)
