"""The stage that trains a masked generator, on tokens made on the fly or read from files."""

from typing import Any

import torch
from torch import Tensor

from titok_fast.io.images import to_uint8
from titok_fast.models.generator import MaskedGenerator, generator_class
from titok_fast.models.tokenizer import TiTok
from titok_fast.sampling.masking import (
    Noise,
    draw_noise,
    drop_labels,
    mask_counts,
    mask_tokens,
    masked_accuracy,
    masked_token_loss,
)
from titok_fast.sampling.unmask import sample, sample_seeds
from titok_fast.training.engine import Engine
from titok_fast.training.recipe.recipe import Recipe
from titok_fast.training.tasks.base import Batch, Outcome, Task, new_model, required


class GeneratorTask(Task):
    """Predict masked tokens from the other tokens and the class."""

    model: MaskedGenerator

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        config = recipe.generator
        assert config is not None
        model = new_model(generator_class(config), config, recipe.experiment.init_weight)
        self.model, self.config = model.to(device), config
        self.tokenizer: TiTok | None = None
        weights, needed = recipe.experiment.tokenizer_checkpoint, recipe.data.kind != "tokens"
        if recipe.tokenizer is not None and (weights or needed):
            required(weights, "experiment.tokenizer_checkpoint", "the tokenizer's weights")
            tokenizer = TiTok.from_pretrained(weights, config=recipe.tokenizer, device=device)
            self.tokenizer = tokenizer.requires_grad_(False)

    def random_inputs(self, B: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Uniforms, and every sample's share of the batch's loss weights.

        Every rank draws for the whole batch, so it knows the sum of all weights.
        """
        K, losses = self.config.image_seq_len, self.recipe.losses
        noise = draw_noise(B, K, generator)
        masked = mask_counts(noise.ratio, K, losses.mask_schedule_strategy)
        weights = masked + (K - masked) * losses.loss_weight_unmasked_token
        return {**noise._asdict(), "weight": weights.mean().expand(B)}

    def _tokens(self, batch: Batch) -> Tensor:
        """(B, K) int64 ids in [0, N)."""
        if "tokens" in batch:
            return batch["tokens"]
        assert self.tokenizer is not None
        with torch.no_grad():  # in float32: bfloat16 would pick other codes
            return self.tokenizer.encode(batch["images"])[1]["min_encoding_indices"].flatten(1)

    def _predict(
        self, engine: Engine, batch: Batch, drop: float, detailed: bool
    ) -> dict[str, Tensor]:
        losses, config = self.recipe.losses, self.config
        noise = Noise(batch["ratio"], batch["order"], batch["drop"])
        ids = self._tokens(batch)
        masked, mask = mask_tokens(ids, noise, config.mask_token_id, losses.mask_schedule_strategy)
        classes = self.model.class_ids(batch["labels"])
        classes = drop_labels(classes, noise, config.no_class_id, drop)

        def work(model: Any) -> dict[str, Tensor]:
            hidden = model.hidden(masked, classes)
            found = {
                "loss": masked_token_loss(
                    hidden,
                    model.lm_head,
                    ids,
                    mask,
                    label_smoothing=losses.label_smoothing,
                    unmasked_weight=losses.loss_weight_unmasked_token,
                    total_weight=batch["weight"].sum(),
                )
            }
            if detailed:
                found["accuracy"] = masked_accuracy(hidden, model.lm_head, ids, mask)
            return found

        return engine(work)

    def loss(self, engine: Engine, batch: Batch, step: int, detailed: bool) -> Outcome:
        """Cross-entropy of the masked tokens, with label dropout."""
        found = self._predict(engine, batch, self.config.class_label_dropout, detailed)
        return Outcome(found["loss"], {name: value.detach() for name, value in found.items()})

    def evaluate(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """Loss and accuracy without label dropout; the batch's mean for each sample."""
        found = self._predict(engine, batch, 0.0, True)
        return {name: value.expand(len(batch["labels"])) for name, value in found.items()}

    def example_images(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """Images of the first classes in turn, drawn with the same seeds every time."""
        if self.tokenizer is None:
            return {}
        count = len(batch["labels"])
        labels = torch.arange(count) % self.config.condition_num_classes
        seeds = sample_seeds(self.recipe.training.seed, count)

        def work(model: Any) -> Tensor:
            with torch.autocast(self.device.type, enabled=False):
                return sample(model, labels, seeds, self.recipe.sampling)

        pixels = to_uint8(self.tokenizer.decode_tokens(engine(work)))
        return {"samples": pixels.permute(0, 3, 1, 2).float() / 255}
