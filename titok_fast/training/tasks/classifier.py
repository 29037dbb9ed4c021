"""The stage that trains the Fashion-MNIST classifier."""

import torch
from torch import Tensor

from titok_fast.models.classifier import FashionClassifier, classifier_loss
from titok_fast.training.engine import Engine
from titok_fast.training.recipe.recipe import Recipe
from titok_fast.training.tasks.base import Batch, Outcome, Task


class ClassifierTask(Task):
    """The ten clothes of Fashion-MNIST by cross-entropy."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.model = FashionClassifier().to(device).train()

    def loss(self, engine: Engine, batch: Batch, step: int, detailed: bool) -> Outcome:
        """Cross-entropy, and the accuracy on the batch."""
        logits: Tensor = engine(FashionClassifier.__call__, batch["images"])
        loss = classifier_loss(logits, batch["labels"], self.recipe.losses.label_smoothing)
        right = (logits.argmax(dim=1) == batch["labels"]).float().mean()
        return Outcome(loss, {"loss": loss.detach(), "accuracy": right})

    def evaluate(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """Whether each image is classified correctly."""
        logits: Tensor = engine(FashionClassifier.__call__, batch["images"])
        return {"accuracy": (logits.argmax(dim=1) == batch["labels"]).float()}
