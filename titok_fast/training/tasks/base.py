"""What differs between stages: the networks, what is done with a batch, and what is shown.

A task computes losses; learner.py turns them into updates. Whatever a task does with the trained
network goes through the engine, which holds it whole, also where ranks share its parameters out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from titok_fast.models.classifier import FashionClassifier
from titok_fast.models.quantizer import VectorQuantizer
from titok_fast.models.weights import PretrainedModel
from titok_fast.training.engine import Engine
from titok_fast.training.losses import Logs, ReconstructionLoss
from titok_fast.training.recipe.recipe import Recipe

Batch = Mapping[str, Tensor]
Draws = Mapping[str, Tensor]


@dataclass
class Outcome:
    """What a batch gave.

    Attributes:
        loss: scalar with gradient, the mean over the batch.
        logs: detached scalars by name, likewise means.
        reconstructions: (B, 3, S, S) without gradient, where an adversary judges them.
        latents: (B, C, H, W) as they entered the quantizer, where there is one.
        ids: (B, H, W) int64 codes they became.
    """

    loss: Tensor
    logs: Logs
    reconstructions: Tensor | None = None
    latents: Tensor | None = None
    ids: Tensor | None = None


class Task:
    """One stage. Subclasses set the networks in `__init__`.

    Attributes:
        model: what is trained and exported; in training mode, on the device.
        criterion: losses with an adversary of its own, or None.
        quantizer: the codebook that is trained, or None.
    """

    model: PretrainedModel | FashionClassifier
    criterion: ReconstructionLoss | None = None
    quantizer: VectorQuantizer | None = None

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device

    def draws(self, B: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random numbers of a global batch, on the CPU; the first dimension of each is B."""
        return {}

    def learn(
        self, engine: Engine, batch: Batch, draws: Draws, step: int, detailed: bool
    ) -> Outcome:
        """Loss of a batch.

        Args:
            engine: holds the model.
            batch: of data.py, on the device.
            draws: the rows of `draws` that belong to the batch, on the device.
            step: update, counted from 0.
            detailed: whether logs that cost time are wanted.
        """
        raise NotImplementedError

    def measure(self, engine: Engine, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """(B,) numbers of each sample of an evaluation batch, by name."""
        raise NotImplementedError

    def show(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """Sheets of pictures by name, each (M, 3, S, S); empty where there is nothing to see."""
        return {}

    def last_layer(self) -> Tensor | None:
        """Weight of the last layer before the pixels, where the adaptive weight wants it."""
        return None

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write a model folder that `from_pretrained` reads.

        Args:
            weights: the model's state dict, whole, on the CPU.
            folder: made if it does not exist.
        """
        with torch.device("meta"):
            model = self._same_model()
        nn.Module.load_state_dict(model, weights, assign=True)
        model.save_pretrained(folder)

    def _same_model(self) -> PretrainedModel | FashionClassifier:
        if isinstance(self.model, FashionClassifier):
            return FashionClassifier()
        return type(self.model)(self.model.config)


def required(path: str, key: str, what: str) -> str:
    """A path that a stage cannot do without.

    Raises:
        ValueError: it is empty.
    """
    if not path:
        raise ValueError(f"this stage wants {key}: {what}")
    return path
