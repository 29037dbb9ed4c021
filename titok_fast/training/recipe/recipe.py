"""The settings of a training run: one frozen `Recipe`, read from YAML under upstream's names.

sections.py defines the settings; official.py maps them to the keys of upstream's files. A key of a
file is used, listed as meaningless, or an error.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from titok_fast.config import GeneratorConfig, TokenizerConfig, VQGANConfig
from titok_fast.data.config import DataConfig
from titok_fast.sampling_config import SamplingConfig
from titok_fast.training.recipe import official
from titok_fast.training.recipe.sections import (
    Experiment,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)

STAGES = ("vqgan", "stage1", "stage2", "single_stage", "generator", "classifier")


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        stage: "vqgan", "stage1" (proxy codes), "stage2" (decoder), "single_stage", "generator" or
            "classifier".
        tokenizer: stages 1, 2 and single; generator: the tokenizer that makes tokens and images,
            None where tokens are read from files and no images are wanted.
        generator, sampling: stage "generator".
        vqgan: stage "vqgan". Stages 1 and 2 have it as `tokenizer.pixel`.
    """

    stage: str
    experiment: Experiment = field(default_factory=Experiment)
    tokenizer: TokenizerConfig | None = None
    generator: GeneratorConfig | None = None
    vqgan: VQGANConfig | None = None
    sampling: SamplingConfig | None = None
    losses: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage wants one of {', '.join(STAGES)}; got {self.stage!r}")
        problem = _problem_with_models(self) or _problem_with_data(self)
        if problem:
            raise ValueError(f"stage {self.stage!r} {problem}")

    @classmethod
    def from_official(cls, config: Mapping[str, Any]) -> "Recipe":
        """Read a whole file given as nested dictionaries, references resolved.

        Raises:
            ValueError: unknown keys (with near matches), values of a wrong type or out of range,
                models that do not fit the stage, or a stage that cannot be inferred.
        """
        flat = official.flatten(config)
        known = official.table(_SECTIONS)
        official.check_names(flat, known)
        found: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
        for key, (section, name, kind) in known.items():
            if key in flat:
                found[section][name] = official.convert(flat[key], kind, key)
        _read_special(flat, found)
        stage = flat.get("stage") or _infer_stage(found)
        settings = {name: kind(**found[name]) for name, kind in SETTINGS.items()}
        return cls(stage=stage, **_models(stage, found), **settings)

    def to_official(self) -> dict[str, Any]:
        """The whole file as nested dictionaries of YAML's types; `from_official` reads it back."""
        flat: dict[str, Any] = {"stage": self.stage}
        for section in _SECTIONS:
            part: Any = getattr(self, section, None)
            if section == "tokenizer.pixel" and self.tokenizer and self.tokenizer.is_legacy:
                part = self.tokenizer.pixel
            for name, value in asdict(part).items() if part is not None else ():
                if f"{section}.{name}" not in official.DERIVED:
                    key = official.official_name(section, name)
                    flat[key] = list(value) if isinstance(value, tuple) else value
        if self.generator is not None:
            flat["model.vq_model.codebook_size"] = self.generator.codebook_size
        return official.nest(flat)


# by section, in the order of a file; models are optional, and only some stages have them
_MODELS = {
    "tokenizer": TokenizerConfig,
    "tokenizer.pixel": VQGANConfig,
    "generator": GeneratorConfig,
    "sampling": SamplingConfig,
    "vqgan": VQGANConfig,
}
SETTINGS: dict[str, Any] = {
    f.name: f.default_factory for f in fields(Recipe) if f.default_factory is not MISSING
}
_SECTIONS: dict[str, type] = {**_MODELS, **SETTINGS}
# models that a stage uses
_USED = {
    "vqgan": ("vqgan",),
    "stage1": ("tokenizer", "tokenizer.pixel"),
    "stage2": ("tokenizer", "tokenizer.pixel"),
    "single_stage": ("tokenizer",),
    "generator": ("tokenizer", "tokenizer.pixel", "generator", "sampling"),
    "classifier": (),
}


def read_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe or an official configuration file.

    Args:
        name_or_path: a YAML or JSON file, or a recipe of the package by name, such as
            "fashion/stage1"; a file that exists comes first. Its key `base` may name a file
            (relative to this one) to start from.
        overrides: "dotted.key=value" under the file's own names, such as "training.seed=1".

    Raises:
        FileNotFoundError: no such file or name, or no such base.
        ValueError: as `Recipe.from_official`; the message names the file.
    """
    path = official.find(name_or_path)
    config = official.load(path, overrides)
    try:
        return Recipe.from_official(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_special(flat: Mapping[str, Any], found: dict[str, dict[str, Any]]) -> None:
    """Check the keys that fill no single field, and put their effect into `found`."""
    for key, (wanted, reason) in official.FIXED.items():
        if flat.get(key, wanted) != wanted:
            raise ValueError(f"{key} wants {wanted}: {reason}; got {flat[key]!r}")
    special = {
        key: official.convert(flat[key], kind, key)
        for key, kind in official.SPECIAL.items()
        if flat.get(key) is not None
    }
    experiment, data = found["experiment"], found["data"]
    if special.get("training.enable_wandb"):
        experiment.setdefault("logging", "wandb")
    if special.get("dataset.params.pretokenization"):
        data |= {"kind": "tokens", "train": special["dataset.params.pretokenization"]}
    elif "kind" not in data:
        shards = ".tar" in (data.get("train") or ".tar")
        data["kind"] = "webdataset" if shards else "folder"
    if not data.get("train") and data["kind"] != "fashion-mnist":
        raise ValueError(
            f"dataset.params.train_shards_path_or_url wants the path of the data (kind "
            f"{data['kind']!r}); got nothing"
        )
    if found["training"].get("mixed_precision") == "fp16":
        warnings.warn("mixed_precision fp16 is read as bf16: no loss scaling", stacklevel=4)
        found["training"]["mixed_precision"] = "bf16"
    shown = special.get("lr_scheduler.params.learning_rate")
    rate = found["optimizer"].get("learning_rate", OptimizerConfig.learning_rate)
    if shown is not None and shown != rate:
        raise ValueError(
            f"lr_scheduler.params.learning_rate wants optimizer.params.learning_rate's {rate}; got "
            f"{shown}: leave it out"
        )


def _infer_stage(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The stage of an official file, which does not name it."""
    tokenizer = found["tokenizer"]
    if found["generator"]:
        return "generator"
    if tokenizer.get("is_legacy") is False:
        return "single_stage"
    if tokenizer.get("finetune_decoder") is True:
        return "stage2"
    # stage 1 has no discriminator
    if tokenizer.get("finetune_decoder") is False and "discriminator_weight" not in found["losses"]:
        return "stage1"
    raise ValueError(
        f"stage cannot be inferred from these keys: add `stage:` with one of {', '.join(STAGES)}"
    )


def _models(stage: str, found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The model sections of a stage, or None for each."""
    if stage not in STAGES:
        return {}  # Recipe raises
    for section in _MODELS:
        if found[section] and section not in _USED[stage]:
            key = official.official_name(section, next(iter(found[section])))
            raise ValueError(f"stage {stage!r} has no use for {key}")
    made: dict[str, Any] = {}
    tokens = dict(found["tokenizer"])
    if found["vqgan"] or stage == "vqgan":
        made["vqgan"] = VQGANConfig(**found["vqgan"])
    if found["generator"] or stage == "generator":
        shared = {"codebook_size": "codebook_size", "num_latent_tokens": "image_seq_len"}
        given = {ours: tokens[key] for key, ours in shared.items() if key in tokens}
        made["generator"] = GeneratorConfig(**given | found["generator"])
        schedule = found["losses"].get("mask_schedule_strategy", LossConfig.mask_schedule_strategy)
        # annealing: what upstream's sampling script does for these files
        defaults = {"softmax_temperature_annealing": True, "schedule": schedule}
        made["sampling"] = SamplingConfig(**defaults | found["sampling"])
        if tokens.keys() <= shared.keys():
            tokens = {}  # sizes of token files, not a tokenizer
    if tokens:
        tokens["pixel"] = VQGANConfig(**found["tokenizer.pixel"])
        tokens["crop_size"] = found["data"].get("crop_size", DataConfig.crop_size)
        if tokens.get("quantize_mode") == "vae":
            tokens.setdefault("finetune_decoder", False)  # upstream's VAE files leave it out
        made["tokenizer"] = TokenizerConfig(**tokens)
    return made


def _problem_with_models(recipe: Recipe) -> str:
    """Why the models do not fit the stage, or an empty string."""
    stage, tokenizer, generator = recipe.stage, recipe.tokenizer, recipe.generator
    needed = stage if stage in ("vqgan", "generator") else "tokenizer"
    if stage != "classifier" and getattr(recipe, needed) is None:
        return f"wants the section {official.PREFIXES[needed]}"
    if stage in ("stage1", "stage2", "single_stage"):
        assert tokenizer is not None
        wanted = stage != "single_stage", stage == "stage2"
        got = (tokenizer.is_legacy, tokenizer.finetune_decoder)
        if got != wanted or (stage != "single_stage" and tokenizer.quantize_mode != "vq"):
            return (
                f"wants model.vq_model with is_legacy={wanted[0]}, finetune_decoder={wanted[1]}"
                f"{'' if stage == 'single_stage' else ' and quantize_mode=vq'}; got is_legacy="
                f"{got[0]}, finetune_decoder={got[1]}, quantize_mode={tokenizer.quantize_mode}"
            )
    if stage == "generator" and tokenizer is not None:
        assert generator is not None
        ids = (tokenizer.num_latent_tokens, tokenizer.codebook_size)
        if tokenizer.quantize_mode != "vq":
            return "wants a tokenizer with quantize_mode=vq"
        if ids != (generator.image_seq_len, generator.codebook_size):
            return (
                f"wants image_seq_len and codebook_size of its tokenizer, {ids}; got "
                f"{(generator.image_seq_len, generator.codebook_size)}"
            )
    return ""


def _problem_with_data(recipe: Recipe) -> str:
    """Why the data do not fit stage and models, or an empty string."""
    stage, tokenizer, S = recipe.stage, recipe.tokenizer, recipe.data.crop_size
    if recipe.data.kind == "tokens" and stage != "generator":
        return "wants images; got dataset.params.kind=tokens"
    if stage == "generator" and tokenizer is None and recipe.data.kind != "tokens":
        return "wants model.vq_model to tokenise images, or dataset.params.kind=tokens"
    if tokenizer is not None and tokenizer.crop_size != S:
        return f"wants one crop_size; got {tokenizer.crop_size} (tokenizer) and {S} (data)"
    if recipe.vqgan is not None and S % recipe.vqgan.downsampling:
        return f"wants crop_size a multiple of {recipe.vqgan.downsampling}; got {S}"
    if recipe.training.clustering_vq and tokenizer is not None and tokenizer.quantize_mode == "vae":
        return "wants clustering_vq=False: a VAE has no codes"
    return ""
