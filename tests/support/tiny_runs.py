"""What the tests of the training loop share: recipes of tiny runs, and data in memory."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from support.tiny_models import tiny_tokenizer_config
from torch.distributed.checkpoint import HuggingFaceStorageReader

from titok_fast import (
    GeneratorConfig,
    ImageBert,
    MaskGitVQGAN,
    SamplingConfig,
    TiTok,
    TokenizerConfig,
    VQGANConfig,
)
from titok_fast.data.config import DataConfig
from titok_fast.data.sources import ArraySource
from titok_fast.distributed import Ranks
from titok_fast.training import checkpoints, loop
from titok_fast.training.checkpoints import Checkpoint
from titok_fast.training.recipe.recipe import Recipe
from titok_fast.training.recipe.sections import (
    Experiment,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from titok_fast.training.trainer import Trainer

ALONE = Ranks(0, 1, torch.device("cpu"))
STAGES = ("vqgan", "stage1", "stage2", "single_stage", "generator", "classifier")
KINDS = (*STAGES, "vae")  # single_stage with codes, and as a VAE
SIDE, K, N, CLASSES = 16, 4, 16, 3
VQGAN = VQGANConfig(32, (1, 2), num_res_blocks=1, z_channels=8, codebook_size=24)
SIZE = (32, 1, 2)


def tokenizer_config(kind: str) -> TokenizerConfig:
    """Of "stage1", "stage2", "single_stage" or "vae": 32 wide, 1 layer, 16 px."""
    made = {"stage2": "legacy", "single_stage": "vq"}.get(kind, kind)
    return dataclasses.replace(
        tiny_tokenizer_config(made, K, N),
        token_size=4,
        vit_enc_model_size=SIZE,
        vit_dec_model_size=SIZE,
        vit_dec_patch_size=4,
        crop_size=SIDE,
        pixel=VQGAN,
    )


GENERATOR = GeneratorConfig(
    "ViT", 32, 1, 2, 64, image_seq_len=K, codebook_size=N, condition_num_classes=CLASSES
)


def data(count: int = 24, side: int = SIDE) -> ArraySource:
    """Smooth images with something to learn: the label moves a bright spot."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % CLASSES
    y, x = np.mgrid[:side, :side] / side
    centers = (labels + 0.5 + 0.3 * rng.random(count)) / CLASSES
    spots = np.exp(-(((x - centers[:, None, None]) ** 2 + (y - 0.5) ** 2) * 20))
    colours = rng.integers(100, 200, (count, 1, 1, 3))
    # some noise everywhere: where an image is flat, group norms divide by almost 0
    noise = rng.integers(0, 50, (count, side, side, 3))
    return ArraySource((spots[..., None] * colours + noise).astype(np.uint8), labels)


def make_weights(folder: Path) -> Path:
    """Starting weights of all stages, random but fixed."""
    torch.manual_seed(5)
    MaskGitVQGAN(VQGAN).save_pretrained(folder / "vqgan")
    for kind in ("stage1", "stage2"):
        TiTok(tokenizer_config(kind)).save_pretrained(folder / kind)
    ImageBert(GENERATOR).save_pretrained(folder / "generator")
    return folder


def recipe_of(kind: str, weights: Path, output: Path, steps: int = 6, **training: Any) -> Recipe:
    """A run of `steps` updates of 8 samples; GAN from update 2, no warm-up."""
    stage = "single_stage" if kind == "vae" else kind
    side = 32 if stage == "classifier" else SIDE
    tokenizer = {"generator": "stage2", "vqgan": None, "classifier": None}.get(kind, kind)
    settings = {"per_gpu_batch_size": 8, "mixed_precision": "no", "max_train_steps": steps}
    generates = stage == "generator"
    return Recipe(
        stage=stage,
        experiment=Experiment(
            name=kind,
            output_dir=str(output),
            save_every=2,
            eval_every=0,
            generate_every=0,
            log_every=1,
            log_grad_norm_every=0,
            init_weight=str(weights / "stage1") if stage == "stage2" else "",
            tokenizer_checkpoint=str(weights / "stage2") if generates else "",
            pretrained_tokenizer_weight=str(weights / "vqgan"),
        ),
        tokenizer=tokenizer_config(tokenizer) if tokenizer else None,
        generator=GENERATOR if generates else None,
        vqgan=VQGAN if stage == "vqgan" else None,
        sampling=SamplingConfig(2) if generates else None,
        losses=LossConfig(
            discriminator_start=2, discriminator_weight=0.1, discriminator_channels=32
        ),
        data=DataConfig(kind="folder", crop_size=side, random_crop=False),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        lr_scheduler=ScheduleConfig(warmup_steps=0),
        training=TrainingConfig(**{**settings, **training}),
    )


def updated(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """A copy with some fields of some sections changed."""
    changed = {
        name: dataclasses.replace(getattr(recipe, name), **fields)
        for name, fields in sections.items()
    }
    return dataclasses.replace(recipe, **changed)


def run(recipe: Recipe, sources: loop.Sources | None = None) -> str:
    """Train on this process alone, by default on data of the recipe's image size."""
    return loop.train(recipe, ALONE, sources or (source_of(recipe), None), bar=False)


def source_of(recipe: Recipe) -> ArraySource:
    """Data of the recipe's image size."""
    return data(side=recipe.data.crop_size)


def newest(output: Path) -> Checkpoint:
    """A run's newest checkpoint; there must be one."""
    found = checkpoints.newest(output)
    assert found is not None
    return found


def saved_tensors(output: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint, whole, whichever rank wrote which part."""
    found = newest(output)
    metadata = HuggingFaceStorageReader(str(found.folder)).read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(entry.size) for name, entry in metadata.items()}
    found.load(tensors, ALONE)
    return tensors


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Assert equal names and bits."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def final(output: Path) -> dict[str, torch.Tensor]:
    """Weights that a run exported."""
    return load_file(output / "final" / "model.safetensors")


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of everything that a checkpoint would hold."""
    return {name: t.detach().clone() for name, t in trainer.tensors().items()}
