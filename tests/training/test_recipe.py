"""Recipes: keys, stages, values, names, bases, round trips, refusals."""

from dataclasses import fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
from omegaconf import OmegaConf

from titok_fast import GeneratorConfig, SamplingConfig, TokenizerConfig, VQGANConfig
from titok_fast.data.config import DataConfig
from titok_fast.training.recipe.official import RECIPES, convert
from titok_fast.training.recipe.recipe import SETTINGS, Recipe, read_recipe
from titok_fast.training.recipe.sections import TrainingConfig

SMALL = TokenizerConfig(
    num_latent_tokens=4,
    vit_enc_model_size=(64, 1, 2),
    vit_dec_model_size=(64, 1, 2),
    finetune_decoder=False,
)
VAE = replace(SMALL, is_legacy=False, quantize_mode="vae")
REVIVING = TrainingConfig(clustering_vq=True)
BARE: dict[str, Any] = {"tokenizer": None}


def written(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


STAGE1 = """
model:
    vq_model:
        num_latent_tokens: 4
        finetune_decoder: False
dataset:
    params:
        train_shards_path_or_url: train-{0000..0001}.tar
optimizer:
    params:
        learning_rate: 1e-4
lr_scheduler:
    params:
        learning_rate: ${optimizer.params.learning_rate}
"""


# keys


def other_value(kind: Any, value: Any, choices: Any) -> Any:
    """A valid value that is not `value`."""
    if choices:
        return next(c for c in choices if c != value)
    plain = [k for k in get_args(kind) if k is not NoneType] or [kind]
    if plain == [bool]:
        return not value
    if plain == [str]:
        return f"{value}x"
    if plain == [int]:
        return (value or 256) + 32
    return 0.5 if value is None else value / 2 + 0.125


@pytest.mark.parametrize(
    ("section", "name"),
    [
        pytest.param(section, f.name, id=f"{section}.{f.name}")
        for section, settings in SETTINGS.items()
        for f in fields(settings)
        if len(f.metadata.get("choices", "ab")) > 1
    ],
)
def test_every_setting_has_a_key_of_its_own(section: str, name: str, tmp_path: Path) -> None:
    """A changed setting comes back through a file, and nothing else changes with it."""
    start = Recipe(stage="stage1", tokenizer=SMALL, data=DataConfig(train="a.tar"))
    part = getattr(start, section)
    field = {f.name: f for f in fields(part)}[name]
    value = other_value(
        get_type_hints(type(part))[name], getattr(part, name), field.metadata.get("choices")
    )
    if (section, name) == ("data", "kind"):
        value = "folder"
    changes = {section: replace(part, **{name: value})}
    if name == "crop_size":  # one key for both
        changes["tokenizer"] = replace(SMALL, crop_size=value)
    changed = replace(start, **changes)
    assert changed != start
    path = tmp_path / "recipe.yaml"
    OmegaConf.save(OmegaConf.create(changed.to_official()), path)
    assert read_recipe(path) == changed


def test_models_come_back_whole() -> None:
    proxy = VQGANConfig(32, (1, 2), 1, 16, 48)
    sizes: dict[str, Any] = {"vit_enc_model_size": (64, 1, 2), "vit_dec_model_size": (96, 3, 4)}
    sizes |= {"vit_enc_patch_size": 8, "vit_dec_patch_size": 2, "crop_size": 32}
    tokenizer = TokenizerConfig(8, 64, 5, False, 0.5, **sizes, pixel=proxy)
    generator = GeneratorConfig("UViT", 64, 2, 2, 128, 0.2, 0.3, 8, 64, 10, 0.25)
    sampling = SamplingConfig(12, 2.5, "power-cosine", 2.0, 7.0, False, "cosine", "probability")
    data = DataConfig(kind="fashion-mnist", crop_size=32)
    models: dict[str, Any] = {"generator": generator, "sampling": sampling}
    for recipe in (
        Recipe("generator", tokenizer=tokenizer, **models, data=data),
        Recipe("generator", **models, data=DataConfig(kind="tokens", train="shards")),
        Recipe("stage2", tokenizer=tokenizer, data=data),
        Recipe("vqgan", vqgan=proxy, data=data),
        Recipe("classifier", data=data),
    ):
        assert Recipe.from_official(recipe.to_official()) == recipe


def test_unknown_keys_are_all_named_with_what_is_near(tmp_path: Path) -> None:
    path = written(tmp_path, STAGE1 + "training:\n    max_steps: 5\n    zzz: 1\n")
    with pytest.raises(ValueError, match="unknown keys") as error:
        read_recipe(path, ["optimizer.learning_rate=1e-3", "training=3"])
    text = str(error.value)
    assert str(path) in text
    assert "optimizer.learning_rate (near it: optimizer.params.learning_rate" in text
    assert "training (near it: training." in text
    with pytest.raises(ValueError, match=r"max_steps \(near it: .*training.max_train_steps") as two:
        read_recipe(path)
    assert "training.zzz (near it: nothing)" in str(two.value)


def test_a_model_that_the_stage_has_no_use_for_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, STAGE1)
    with pytest.raises(ValueError, match=r"stage1.* no use for model\.pixel\.z_channels"):
        read_recipe(path, ["model.pixel.z_channels=64", "stage=stage1"])
    with pytest.raises(ValueError, match=r"classifier.* no use for model\.vq_model"):
        read_recipe(path, ["stage=classifier"])


def test_keys_without_meaning_here_are_ignored(tmp_path: Path) -> None:
    path = written(tmp_path, STAGE1)
    plain = read_recipe(path)
    more = ["experiment.logging_dir=x", "dataset.params.dataset_with_class_label=True"]
    more += ["dataset.params.dataset_with_text_label=False", "training.enable_wandb=False"]
    assert read_recipe(path, more) == plain


def test_a_second_learning_rate_must_agree(tmp_path: Path) -> None:
    path = written(tmp_path, STAGE1)
    # the reference follows the override
    assert read_recipe(path, ["optimizer.params.learning_rate=3e-4"]).optimizer.learning_rate == (
        3e-4
    )
    with pytest.raises(ValueError, match=r"wants optimizer.params.learning_rate's 0.0001; got 0.5"):
        read_recipe(path, ["lr_scheduler.params.learning_rate=0.5"])


def test_wandb_is_asked_for_by_the_official_switch_unless_logging_says_otherwise(
    tmp_path: Path,
) -> None:
    path = written(tmp_path, STAGE1)
    wandb = read_recipe(path, ["training.enable_wandb=True"])
    assert wandb.experiment.logging == "wandb"
    both = read_recipe(path, ["training.enable_wandb=True", "experiment.logging=tensorboard"])
    assert both.experiment.logging == "tensorboard"


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("train_shards_path_or_url=folder/of/images", "folder"),
        ("train_shards_path_or_url=a-{00..99}.tar", "webdataset"),
        ("kind=folder", "folder"),
        ("kind=fashion-mnist train_shards_path_or_url=", "fashion-mnist"),
    ],
)
def test_the_kind_of_data_follows_from_its_path(tmp_path: Path, given: str, kind: str) -> None:
    overrides = [f"dataset.params.{override}" for override in given.split()]
    assert read_recipe(written(tmp_path, STAGE1), overrides).data.kind == kind


def test_pretokenised_data_are_read_as_tokens_and_need_no_tokenizer(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
model:
    vq_model: {codebook_size: 64, num_latent_tokens: 8}
    generator: {condition_num_classes: 10}
losses: {mask_schedule_strategy: linear}
dataset: {params: {pretokenization: tokens.jsonl, train_shards_path_or_url: x.tar}}
""",
    )
    recipe = read_recipe(path)
    assert (recipe.stage, recipe.tokenizer) == ("generator", None)
    assert (recipe.data.kind, recipe.data.train) == ("tokens", "tokens.jsonl")
    assert recipe.generator == GeneratorConfig(
        image_seq_len=8, codebook_size=64, condition_num_classes=10
    )
    assert recipe.sampling is not None
    assert recipe.sampling.schedule == "linear"  # sampling follows training
    assert read_recipe(path, ["model.generator.schedule=sqrt"]).sampling == replace(
        recipe.sampling, schedule="sqrt"
    )


# stages


@pytest.mark.parametrize(
    ("given", "stage"),
    [
        ([], "stage1"),
        (["model.vq_model.finetune_decoder=True"], "stage2"),
        (["model.vq_model.is_legacy=False"], "single_stage"),
        (["model.generator.model_type=ViT"], "generator"),
        (["stage=stage1", "losses.discriminator_weight=0.1"], "stage1"),
    ],
)
def test_stages_of_official_files(tmp_path: Path, given: list[str], stage: str) -> None:
    assert read_recipe(written(tmp_path, STAGE1), given).stage == stage


def test_a_stage_that_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    without = written(tmp_path, STAGE1.replace("finetune_decoder: False", "token_size: 12"))
    with pytest.raises(ValueError, match="stage cannot be inferred"):
        read_recipe(without)
    with pytest.raises(ValueError, match="stage cannot be inferred"):  # stage 1 has no GAN
        read_recipe(written(tmp_path, STAGE1), ["losses.discriminator_weight=0.1"])
    with pytest.raises(ValueError, match="stage wants one of vqgan, stage1"):
        read_recipe(without, ["stage=warmup"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "stage2"}, "finetune_decoder=True and quantize_mode=vq; got"),
        ({"stage": "single_stage"}, "is_legacy=False"),
        ({"stage": "vqgan"}, "wants the section model.pixel"),
        ({"stage": "generator"}, "wants the section model.generator"),
        ({"tokenizer": None}, r"wants the section model\.vq_model"),
        ({"tokenizer": replace(SMALL, quantize_mode="vae")}, "quantize_mode=vq"),
        ({"data": DataConfig(kind="tokens", train="x")}, "wants images"),
        ({"data": DataConfig(crop_size=128)}, "wants one crop_size; got 256"),
        (
            {"stage": "vqgan", "vqgan": VQGANConfig(), "data": DataConfig(crop_size=40)} | BARE,
            "multiple of 16; got 40",
        ),
        (
            {"stage": "generator", "generator": GeneratorConfig(image_seq_len=8)},
            r"wants image_seq_len .* \(4, 4096\); got \(8, 4096\)",
        ),
        (
            {"stage": "generator", "generator": GeneratorConfig()} | BARE,
            "wants model.vq_model to tokenise",
        ),
        ({"stage": "single_stage", "tokenizer": VAE, "training": REVIVING}, "a VAE has no codes"),
    ],
)
def test_models_and_data_must_fit_the_stage(changes: dict[str, Any], message: str) -> None:
    good = Recipe("stage1", tokenizer=SMALL)
    with pytest.raises(ValueError, match=message):
        replace(good, **changes)


# values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_train_steps=many", "training.max_train_steps wants int; got 'many'"),
        ("training.max_train_steps=1.5", "training.max_train_steps wants int"),
        ("training.use_ema=1", "training.use_ema wants bool; got 1"),
        ("training.per_gpu_batch_size=True", "per_gpu_batch_size wants int; got True"),
        ("experiment.name=[a]", r"experiment.name wants str; got \['a'\]"),
        ("optimizer.params.learning_rate=null", "learning_rate wants float; got None"),
        ("training.max_train_steps=0", "TrainingConfig.max_train_steps wants at least 1; got 0"),
        ("optimizer.params.beta2=.nan", "OptimizerConfig.beta2 wants a number"),
        ("training.mixed_precision=fp8", "mixed_precision wants one of no, bf16; got 'fp8'"),
        ("losses.mask_schedule_strategy=log", "mask_schedule_strategy wants one of arccos"),
        ("lr_scheduler.scheduler=step", "scheduler wants one of cosine, constant"),
        ("experiment.logging=mlflow", "wants one of none, tensorboard, wandb; got 'mlflow'"),
        ("optimizer.name=sgd", "name wants one of adamw"),
        ("model.vq_model.num_latent_tokens=0", "num_latent_tokens wants at least 1"),
        ("model.vq_model.vit_enc_model_size=[64,a,2]", "vit_enc_model_size wants int; got 'a'"),
        ("dataset.params.train_shards_path_or_url=", "wants the path of the data"),
        ("training.seed", "wants the form key=value; got 'training.seed'"),
        ("=3", "wants the form key=value"),
        ("training.seed=${nowhere}", "nowhere"),
    ],
)
def test_wrong_values_are_refused_by_name(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_recipe(written(tmp_path, STAGE1), [override])


def test_numbers_are_read_as_the_field_wants_them() -> None:
    assert convert(1e6, int, "n") == 1_000_000
    assert type(convert(1, float, "x")) is float
    assert convert(None, int | None, "n") is None
    assert convert([192, 6, 4], str | tuple[int, int, int], "size") == (192, 6, 4)
    assert convert("base", str | tuple[int, int, int], "size") == "base"


# files


def test_a_base_gives_what_the_file_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    written(tmp_path, STAGE1 + "training: {seed: 1, max_train_steps: 10}\n", "below.yaml")
    path = written(tmp_path / "in", "base: ../below.yaml\ntraining: {seed: 2}\n")
    recipe = read_recipe(path, ["training.max_train_steps=30"])
    assert (recipe.training.seed, recipe.training.max_train_steps) == (2, 30)
    assert recipe.stage == "stage1"


def test_bases_do_not_chain_and_must_exist(tmp_path: Path) -> None:
    written(tmp_path, STAGE1, "a.yaml")
    written(tmp_path, "base: a.yaml\n", "b.yaml")
    with pytest.raises(ValueError, match=r"b\.yaml is the base of .*c\.yaml"):
        read_recipe(written(tmp_path, "base: b.yaml\n", "c.yaml"))
    with pytest.raises(FileNotFoundError, match=r"no recipe at .*missing\.yaml"):
        read_recipe(written(tmp_path, "base: missing.yaml\n", "d.yaml"))


@pytest.mark.parametrize("name", ["fashion/stage1", "imagenet/generator/maskgit_vit_l32"])
def test_recipes_of_the_package_have_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)  # a folder is no recipe
    assert read_recipe(name, ["training.seed=3"]) == read_recipe(
        RECIPES / f"{name}.yaml", ["training.seed=3"]
    )


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fashion").mkdir()
    written(tmp_path / "fashion", STAGE1 + "training: {seed: 7}\n", "stage1")
    assert read_recipe("fashion/stage1").training.seed == 7


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("fashion/stag1", "fashion/stage1"),
        ("recipes/fashion/vqgan.yaml", "fashion/vqgan"),
        ("zzz", "fashion/classifier, fashion/generator"),
    ],
)
def test_an_unknown_name_is_refused_with_near_ones(name: str, known: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no recipe file or name '{name}'; .*{known}"):
        read_recipe(name)
    with pytest.raises(FileNotFoundError, match="no recipe file or name"):
        read_recipe("fashion/base")  # to start from, not to train


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not readable as YAML"):
        read_recipe(written(tmp_path, "a: [1\n"))
    with pytest.raises(ValueError, match="wants keys and values"):
        read_recipe(written(tmp_path, "- a\n- b\n"))
    with pytest.raises(ValueError, match="wants the path of the data"):
        read_recipe(written(tmp_path, ""))


def test_yaml_tags_execute_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    text = f"experiment: !!python/object/apply:os.system ['touch {mark}']\n"
    with pytest.raises(ValueError, match="not readable"):
        read_recipe(written(tmp_path, text))
    assert not mark.exists()


def test_a_plain_no_is_a_word() -> None:
    recipe = read_recipe("fashion/classifier", ["training.mixed_precision=no"])
    assert recipe.training.mixed_precision == "no"
