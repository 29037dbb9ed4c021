"""What differs between stages: the networks, the loss, the measures and the example images.

A task computes losses; trainer.py turns them into updates. A task calls the trained network only
through the engine, which gathers its parameters where they are sharded over ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from titok_fast.models.classifier import FashionClassifier
from titok_fast.models.quantizer import VectorQuantizer
from titok_fast.models.weights import PretrainedModel
from titok_fast.training.engine import Engine
from titok_fast.training.losses import Logs, ReconstructionLoss
from titok_fast.training.recipe.recipe import Recipe

Batch = Mapping[str, Tensor]
Model = TypeVar("Model", bound=PretrainedModel)


@dataclass
class Outcome:
    """Result of a batch.

    Attributes:
        loss: scalar with gradient, the mean over the batch.
        logs: detached scalars by name, likewise means.
        reconstructions: (B, 3, S, S) without gradient, for the discriminator if there is one.
        latents: (B, C, H, W) inputs of the quantizer, where there is one.
        ids: (B, H, W) int64 codes of the latents.
    """

    loss: Tensor
    logs: Logs
    reconstructions: Tensor | None = None
    latents: Tensor | None = None
    ids: Tensor | None = None


class Task:
    """One stage. Subclasses set the networks in `__init__`.

    Attributes:
        model: the network to train and export; in training mode, on the device.
        criterion: losses with their discriminator, or None.
        quantizer: the codebook that is trained, or None.
    """

    model: PretrainedModel | FashionClassifier
    criterion: ReconstructionLoss | None = None
    quantizer: VectorQuantizer | None = None

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device

    def random_inputs(self, B: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random numbers of a global batch, on the CPU; the first dimension of each is B."""
        return {}

    def loss(self, engine: Engine, batch: Batch, step: int, detailed: bool) -> Outcome:
        """Loss of a batch.

        Args:
            engine: calls the model.
            batch: of `Batches`, with its rows of what `random_inputs` drew, on the device.
            step: update, counted from 0.
            detailed: whether logs that cost time are wanted.
        """
        raise NotImplementedError

    def evaluate(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """Measures by name, each (B,), of an evaluation batch with its random numbers."""
        raise NotImplementedError

    def example_images(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """Sheets of images by name, each (M, 3, H, W); empty where the stage makes none."""
        return {}

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write a folder that `from_pretrained` reads; `weights` is `whole_state` of the model."""
        model: Any = self.model
        with torch.device("meta"):
            model = type(model)(model.config) if hasattr(model, "config") else type(model)()
        nn.Module.load_state_dict(model, weights, assign=True)
        model.save_pretrained(folder)


def new_model(kind: type[Model], config: Any, weights: str) -> Model:
    """A model in training mode, with weights to start from where some are named."""
    model = kind(config)
    if weights:
        model.load_state_dict(kind.from_pretrained(weights, config=config).state_dict())
    return model.train()


def required(path: str, key: str, what: str) -> str:
    """The path, or a ValueError if it is empty."""
    if not path:
        raise ValueError(f"this stage wants {key}: {what}")
    return path
