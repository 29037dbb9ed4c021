"""Run the update of `titok-fast train` under random weights, for the training benchmark."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from lib import weights
from torch import Tensor

from titok_fast.backends.cpu_training import keep_freed_memory
from titok_fast.distributed import Ranks
from titok_fast.models.weights import PretrainedModel
from titok_fast.training.recipe.recipe import Recipe, read_recipe
from titok_fast.training.tasks.base import Task
from titok_fast.training.tasks.registry import build_task
from titok_fast.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {
    "titok-l-32": ("titok_l32", "maskgit_vit_l32"),
    "titok-b-64": ("titok_b64", "maskgit_vit_b64"),
    "titok-s-128": ("titok_s128", "maskgit_uvit_s128"),
}


def recipe_of(model: str, stage: str, batch: int, bf16: bool, *, compiled: bool = False) -> Recipe:
    """The committed recipe of a model's stage at a batch, all losses acting from the first update.

    Averaged weights are off, and the learning rate is that of the end of the warm-up.
    """
    tokenizer, generator = RECIPES[model]
    name = f"generator/{generator}" if stage == "generator" else f"{stage}/{tokenizer}"
    changes = [
        f"training.per_gpu_batch_size={batch}",
        f"training.mixed_precision={'bf16' if bf16 else 'no'}",
        f"training.compile={compiled}",
        "training.use_ema=False",
        "lr_scheduler.params.warmup_steps=0",
    ]
    if stage == "generator":
        changes += ["dataset.params.pretokenization=random", "experiment.tokenizer_checkpoint="]
    if stage == "stage2":
        changes.append("losses.discriminator_start=0")
    return read_recipe(ROOT / "titok_fast" / "recipes" / "imagenet" / f"{name}.yaml", changes)


@contextmanager
def random_weights() -> Iterator[None]:
    """Networks keep the weights of their constructors instead of loading any."""

    def unloaded(cls: Any, source: object, *, config: Any = None, **_: object) -> Any:
        return weights.fill(cls(config)).eval()

    with TemporaryDirectory() as folder:

        def convnext(name: str, filename: str, given: object) -> Path:
            from torchvision.models import convnext_small

            path = Path(folder) / filename
            torch.save(weights.fill(convnext_small(weights=None)).state_dict(), path)
            return path

        with (
            weights.NoInit(),
            patch.object(PretrainedModel, "from_pretrained", classmethod(unloaded)),
            patch("titok_fast.models.perceptual._find", convnext),
        ):
            yield


def fill_task(task: Task) -> None:
    """Fill what is trained with the random numbers of lib/weights.py, made in a second."""
    weights.fill(task.model)
    if task.criterion is not None:
        weights.fill(task.criterion.discriminator)


def batch_of(recipe: Recipe) -> dict[str, Tensor]:
    """A batch of noise with the shape that the stage reads."""
    draw = torch.Generator().manual_seed(0)
    B, S = recipe.training.per_gpu_batch_size, recipe.data.crop_size
    config = recipe.generator
    labels = torch.arange(B)
    if config is None:
        return {"images": torch.rand(B, 3, S, S, generator=draw), "labels": labels}
    shape = (B, config.image_seq_len)
    return {
        "tokens": torch.randint(config.codebook_size, shape, generator=draw),
        "labels": labels % config.condition_num_classes,
    }


def random_task(recipe: Recipe, device: torch.device) -> Task:
    """The recipe's task, its networks under random weights."""
    with random_weights():
        task = build_task(recipe, device)
    fill_task(task)
    return task


class OurLearner:
    """The update of `titok-fast train` on a device."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        with random_weights():
            self.trainer = Trainer(recipe, Ranks(0, 1, device))
        fill_task(self.trainer.task)

    def update(self, batch: dict[str, Tensor]) -> float:
        """One update; returns the model's loss."""
        if not self.trainer.gradients(batch):
            raise FloatingPointError("a loss or gradient is not finite")
        self.trainer.apply()
        logs = self.trainer.logs()
        return logs["loss" if "loss" in logs else "total_loss"]
