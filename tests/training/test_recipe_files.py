"""Recipe files: the official ones are ours, every one reads back and builds, they fit together."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from support.official import CHECKOUT, needs_upstream
from support.tiny_models import on_meta

from titok_fast import (
    PRESETS,
    MaskGitVQGAN,
    SamplingConfig,
    TiTok,
    TokenizerConfig,
    generator_class,
)
from titok_fast.training.recipe.official import RECIPES
from titok_fast.training.recipe.recipe import Recipe, read_recipe

OURS = sorted(str(p.relative_to(RECIPES)) for p in RECIPES.rglob("*.yaml") if p.stem != "base")
OFFICIAL = Path(CHECKOUT) / "configs/training"


# official files


def official(name: str) -> Recipe:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "mixed_precision fp16")
        return read_recipe(OFFICIAL / name)


@needs_upstream
@pytest.mark.parametrize("size", ["l32", "b64", "s128"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_official_stage_files_are_our_recipes(stage: str, size: str) -> None:
    theirs = official(f"TiTok/{stage}/titok_{size}.yaml")
    ours = read_recipe(RECIPES / f"imagenet/{stage}/titok_{size}.yaml")
    assert theirs.stage == stage
    assert theirs.experiment.logging == "wandb"  # enable_wandb
    assert theirs.training.mixed_precision == "bf16"  # fp16
    assert replace(theirs, experiment=ours.experiment) == ours
    numbers = ("max_train_examples", "save_every", "eval_every", "generate_every", "log_every")
    for name in (*numbers, "log_grad_norm_every", "resume", "pretrained_tokenizer_weight"):
        assert getattr(theirs.experiment, name) == getattr(ours.experiment, name), name


@needs_upstream
def test_the_official_generator_file_is_our_recipe() -> None:
    theirs = official("generator/maskgit.yaml")
    ours = read_recipe(RECIPES / "imagenet/generator/maskgit_vit_b64.yaml")
    assert theirs.stage == "generator"
    assert theirs.experiment.output_dir == "titok_b64_maskgit"  # the file has none: the name
    assert theirs.experiment.tokenizer_checkpoint == "tokenizer_titok_b64.bin"
    # that file draws its images greedily; ours as the published model does
    assert theirs.sampling == replace(
        SamplingConfig.from_official(OFFICIAL / "generator/maskgit.yaml"), schedule="arccos"
    )
    assert replace(theirs, experiment=ours.experiment, sampling=ours.sampling) == ours


@needs_upstream
def test_official_fp16_is_said_to_be_read_as_bf16() -> None:
    with pytest.warns(UserWarning, match="fp16 is read as bf16"):
        read_recipe(OFFICIAL / "TiTok/stage1/titok_l32.yaml")


@needs_upstream
@pytest.mark.parametrize("name", ["tatitok_bl64_vae", "tatitok_bl128_vq"])
def test_models_that_read_text_are_refused_by_the_key_that_says_so(name: str) -> None:
    with pytest.raises(ValueError, match="dataset_with_text_label wants False"):
        official(f"TA-TiTok/{name}.yaml")


# our files


@pytest.mark.parametrize("name", OURS)
def test_every_recipe_reads_back_from_its_official_form_and_builds(name: str) -> None:
    recipe = read_recipe(RECIPES / name)
    assert Recipe.from_official(recipe.to_official()) == recipe
    if recipe.tokenizer is not None:
        on_meta(TiTok, recipe.tokenizer)
    if recipe.vqgan is not None:
        on_meta(MaskGitVQGAN, recipe.vqgan)
    if recipe.generator is not None:
        on_meta(generator_class(recipe.generator), recipe.generator)


def as_published(tokenizer: TokenizerConfig) -> TokenizerConfig:
    """Without settings of training alone, and without a VAE's unused codebook."""
    tokenizer = replace(tokenizer, commitment_cost=0.25)  # stage 2 has 0
    vae = tokenizer.quantize_mode == "vae"
    return replace(tokenizer, codebook_size=2, use_l2_norm=False) if vae else tokenizer


def test_there_is_a_recipe_for_every_published_model() -> None:
    made = [read_recipe(RECIPES / name) for name in OURS if name.startswith("imagenet")]
    final = [r.tokenizer for r in made if r.stage in ("stage2", "single_stage")]
    tokenizers = [as_published(tokenizer) for tokenizer in final if tokenizer is not None]
    generators = [(r.generator, r.sampling) for r in made if r.stage == "generator"]
    published = {name: known for name, known in PRESETS.items() if known.tokenizer_hub}
    assert len(published) == 9
    for name, known in published.items():
        assert as_published(known.tokenizer) in tokenizers, name
        if known.generator is not None:
            assert (known.generator, known.sampling) in generators, name


def test_the_fashion_recipes_fit_together() -> None:
    vqgan, stage1, stage2, generator, classifier = (
        read_recipe(RECIPES / f"fashion/{name}.yaml")
        for name in ("vqgan", "stage1", "stage2", "generator", "classifier")
    )
    assert stage1.tokenizer is not None
    assert stage2.tokenizer is not None
    assert generator.generator is not None
    assert stage1.tokenizer.pixel == vqgan.vqgan
    assert stage2.tokenizer == replace(stage1.tokenizer, finetune_decoder=True, commitment_cost=0.0)
    assert generator.tokenizer == replace(stage2.tokenizer, commitment_cost=0.25)
    assert generator.generator.condition_num_classes == 10
    for recipe, earlier in (
        (stage1.experiment.pretrained_tokenizer_weight, vqgan),
        (stage2.experiment.pretrained_tokenizer_weight, vqgan),
        (stage2.experiment.init_weight, stage1),
        (generator.experiment.tokenizer_checkpoint, stage2),
    ):
        assert recipe.startswith(earlier.experiment.output_dir + "/")
    assert {r.data.kind for r in (vqgan, stage1, stage2, classifier)} == {"fashion-mnist"}
    assert generator.data.kind == "tokens"


def test_the_preliminary_grid_is_a_matter_of_overrides() -> None:
    recipe = read_recipe(
        RECIPES / "imagenet/stage1/preliminary.yaml",
        [
            "model.vq_model.num_latent_tokens=64",
            "model.vq_model.vit_enc_model_size=base",
            "model.vq_model.vit_dec_model_size=base",
            "experiment.name=titok_b64_preliminary",
        ],
    )
    assert recipe.tokenizer == TokenizerConfig(
        64, 1024, 16, vit_enc_model_size="base", vit_dec_model_size="base", finetune_decoder=False
    )
    assert recipe.experiment.output_dir == "runs/titok_b64_preliminary"
    assert recipe.training.max_train_steps == 500_000
