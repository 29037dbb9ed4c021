"""A network with its engine and optimizer: the model of a stage, or its adversary."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from titok_fast.backends.cpu_training import recompute_in_backward
from titok_fast.models.attention import ENVIRONMENT
from titok_fast.models.blocks import PostNormBlock, PreNormBlock, set_attention
from titok_fast.training.engine import BLOCKS, Engine, local, whole
from titok_fast.training.optim import set_learning_rate
from titok_fast.training.recipe.recipe import TrainingConfig
from titok_fast.training.resume import (
    optimizer_steps,
    optimizer_tensors,
    restore_optimizer,
    room_for,
)

# narrower blocks keep SDPA, which rounds less, and their activations: these are small
WIDE = 512


class Trained:
    """What the two halves of an update have in common.

    Args:
        name: "model" or "criterion"; begins the names of its tensors in a checkpoint.
        network: on its device, sharded if it is to be.
        engine: calls it.
        optimizer: of its trainable parameters.
    """

    def __init__(self, name: str, network: nn.Module, engine: Engine, optimizer: Optimizer) -> None:
        self.name, self.network, self.engine, self.optimizer = name, network, engine, optimizer
        self._norm = torch.zeros(())

    def measure(self) -> Tensor:
        """Global length of the gradient, over all shards; kept for `descend`."""
        grads = [p.grad for p in self.network.parameters() if p.grad is not None]
        self._norm = nn.utils.get_total_norm(grads)
        return whole(self._norm)

    def descend(self, rate: float, limit: float) -> None:
        """Clip the gradient that was measured, and take an optimizer's step.

        Args:
            rate: learning rate.
            limit: highest length of the gradient; 0 does not clip.
        """
        if limit:
            nn.utils.clip_grads_with_norm_(self.network.parameters(), limit, self._norm)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def culprit(self) -> str | None:
        """Name of the first parameter whose gradient has a NaN or Inf on this rank."""
        for name, p in self.network.named_parameters():
            if p.grad is not None and not bool(torch.isfinite(local(p.grad)).all()):
                return name
        return None

    def tensors(self, found: Mapping[str, torch.Size] | None = None) -> dict[str, Tensor]:
        """Weights, buffers and optimizer state by name; the tensors themselves, not copies.

        Args:
            found: names and shapes in a checkpoint to load: makes room for the state that
                apex's optimizer only has after its first step.
        """
        if found is None:
            steps = optimizer_tensors(self.optimizer, self.network)
        else:
            saved = under(f"{self.name}_optimizer", found)
            steps = room_for(saved, self.optimizer, self.network)
        weights = {f"{self.name}/{k}": v for k, v in self.network.state_dict().items()}
        return weights | {f"{self.name}_optimizer/{k}": v for k, v in steps.items()}

    def steps(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors, as plain JSON."""
        return {f"{self.name}_optimizer_steps": optimizer_steps(self.optimizer)}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take optimizer state from tensors that were loaded; weights are loaded in place."""
        found = under(f"{self.name}_optimizer", tensors)
        steps = state[f"{self.name}_optimizer_steps"]
        restore_optimizer(self.optimizer, self.network, found, steps)


def under(part: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The entries "part/rest", by "rest"."""
    return {k[len(part) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{part}/")}


def prepare_blocks(model: nn.Module, config: TrainingConfig) -> None:
    """Attention, checkpoints and compilation, block by block.

    One compiled block serves all. On a CPU, wide transformer blocks become lean, and in bfloat16
    they attend by plain products unless the environment names a back end.
    """
    plain = not (config.compile or config.activation_checkpointing)
    for block in model.modules():
        if not isinstance(block, PreNormBlock | PostNormBlock) or not block.norm1.weight.is_cpu:
            continue
        if block.norm1.weight.shape[0] >= WIDE:
            if plain:
                recompute_in_backward(block)
            if config.mixed_precision == "bf16":
                set_attention(block, os.environ.get(ENVIRONMENT) or "products")
    for block in [part for part in model.modules() if isinstance(part, BLOCKS)]:
        forward = block.forward
        if config.compile:
            forward = torch.compile(forward)
        if config.activation_checkpointing:
            # outside: nothing is compiled where torch.compile meets the checkpoint first
            forward = partial(checkpoint, forward, use_reentrant=False)
        block.forward = forward  # type: ignore[method-assign]
