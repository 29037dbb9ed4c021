"""The task of each stage."""

import torch

from titok_fast.training.recipe.recipe import Recipe
from titok_fast.training.tasks import tokenizer
from titok_fast.training.tasks.base import Task
from titok_fast.training.tasks.classifier import ClassifierTask
from titok_fast.training.tasks.generator import GeneratorTask

_TASKS: dict[str, type[Task]] = {
    "vqgan": tokenizer.VqganTask,
    "stage1": tokenizer.ProxyTask,
    "stage2": tokenizer.DecoderTask,
    "single_stage": tokenizer.SingleStageTask,
    "generator": GeneratorTask,
    "classifier": ClassifierTask,
}


def build_task(recipe: Recipe, device: torch.device) -> Task:
    """The task of a recipe's stage, its networks built or loaded, on a device.

    Raises:
        ValueError: weights that the stage starts from are not named, or do not fit.
        FileNotFoundError: they are not where the recipe says.
    """
    return _TASKS[recipe.stage](recipe, device)
