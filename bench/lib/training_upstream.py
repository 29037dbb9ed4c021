"""Run one training update of a checkout of bytedance/1d-tokenizer: its models and losses.

As its training scripts do on one device, without accelerate: the model under autocast, outputs to
float32, loss, backward, clipping, torch's AdamW; their settings of CUDA. Weights are those of ours.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from lib import upstream as official
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim import AdamW

from titok_fast.models.weights import to_official
from titok_fast.training.optim import parameter_groups
from titok_fast.training.recipe.recipe import Recipe
from titok_fast.training.tasks.base import Task
from titok_fast.training.trainer import set_cuda_math


class UpstreamLearner:
    """A stage of upstream's training: our recipe under its names, on the weights of our task."""

    def __init__(self, checkout: Path, recipe: Recipe, task: Task, bf16: bool) -> None:
        set_cuda_math(recipe.training.enable_tf32)
        self.recipe, self.bf16, self.config = recipe, bf16, OmegaConf.create(recipe.to_official())
        self.device = task.device
        self.model = official.model_of(checkout, task.model).train()
        self.optimizer = self._optimizer(self.model)
        self.proxy: Any = None
        self.criterion: Any = None
        self.critic_optimizer: AdamW | None = None
        with official.imports_from(checkout):
            from modeling.modules import losses  # type: ignore[import-not-found]

            if recipe.stage == "generator":
                self.criterion = losses.MLMLoss(self.config)
            elif recipe.stage == "stage1":
                self.criterion = losses.ReconstructionLoss_Stage1(self.config)
                self.proxy = _proxy_tokenizer(task).to(self.device)
            else:
                self.criterion = _stage2_loss(losses, self.config, task).to(self.device)
                self.critic_optimizer = self._optimizer(self.criterion)

    def update(self, batch: dict[str, Tensor]) -> float:
        """One update; returns the model's loss."""
        step = getattr(self, f"_{self.recipe.stage}")
        return float(step({name: value.to(self.device) for name, value in batch.items()}))

    def _stage1(self, batch: dict[str, Tensor]) -> Tensor:
        images = batch["images"]
        codes = self.proxy.encode(images)
        logits, extra = self._forward(images)
        loss, _ = self.criterion(codes, logits, extra)
        self._step(self.model, self.optimizer, loss)
        return loss.detach()

    def _stage2(self, batch: dict[str, Tensor]) -> Tensor:
        images, step = batch["images"], 0
        recon, extra = self._forward(images)
        loss, _ = self.criterion(images, recon, extra, step, mode="generator")
        self._step(self.model, self.optimizer, loss)
        judged, _ = self.criterion(images, recon, extra, step, mode="discriminator")
        assert self.critic_optimizer is not None
        self._step(self.criterion, self.critic_optimizer, judged)
        return loss.detach()

    def _generator(self, batch: dict[str, Tensor]) -> Tensor:
        ids, labels = batch["tokens"], batch["labels"].clone()  # their forward shifts them in place
        masked, mask = self.model.masking_input_tokens(ids)
        drop = self.config.model.generator.class_label_dropout
        with self._autocast():
            logits = self.model(masked, labels, cond_drop_prob=drop)
        loss, _ = self.criterion(logits.float(), ids, weights=mask)
        self._step(self.model, self.optimizer, loss)
        return loss.detach()

    def _forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with self._autocast():
            out, extra = self.model(images)
        return out.float(), {k: v.float() if v.is_floating_point() else v for k, v in extra.items()}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _step(self, network: nn.Module, optimizer: AdamW, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), self.recipe.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _optimizer(self, network: nn.Module) -> AdamW:
        """Its two groups and torch's defaults for the rest, which its scripts leave alone."""
        params = self.recipe.optimizer
        groups = parameter_groups(network, params.weight_decay)
        return AdamW(groups, lr=params.learning_rate, betas=(params.beta1, params.beta2))


def _proxy_tokenizer(task: Any) -> Any:
    from modeling.titok import PretrainedTokenizer  # type: ignore[import-not-found]

    with TemporaryDirectory() as folder:
        path = Path(folder) / "vqgan.bin"
        torch.save(to_official(task.vqgan.state_dict(), "vqgan"), path)
        return PretrainedTokenizer(path)


def _stage2_loss(losses: Any, config: Any, task: Task) -> Any:
    """Its loss with our discriminator's and ConvNeXt's weights."""
    from torchvision import models

    assert task.criterion is not None
    plain = models.convnext_small  # without its download
    with patch.object(models, "convnext_small", lambda weights=None: plain(weights=None)):
        criterion = losses.ReconstructionLoss_Stage2(config)
    network: Any = task.criterion.perceptual.network
    criterion.perceptual_loss.convnext.load_state_dict(network.state_dict())
    criterion.load_state_dict(task.criterion.state_dict(), strict=False)
    return criterion
