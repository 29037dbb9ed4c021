"""A network with its engine and optimizer: the model of a stage, or its criterion."""

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
from titok_fast.training.recipe.sections import TrainingConfig

# narrower blocks have small activations: they keep SDPA, which rounds less
WIDE = 512


class StageModel:
    """A network that is trained: clips gradients, takes optimizer steps, names its state.

    Its `name` ("model" or "criterion") is the prefix of its tensors in a checkpoint.
    """

    def __init__(self, name: str, network: nn.Module, engine: Engine, optimizer: Optimizer) -> None:
        self.name, self.network, self.engine, self.optimizer = name, network, engine, optimizer
        self._norm = torch.zeros(())

    def gradient_norm(self) -> Tensor:
        """Global norm of the gradient over all shards; `step` clips by it."""
        grads = [p.grad for p in self.network.parameters() if p.grad is not None]
        self._norm = nn.utils.get_total_norm(grads)
        return whole(self._norm)

    def step(self, learning_rate: float, max_norm: float) -> None:
        """Clip the gradients, take an optimizer step and clear them; 0 does not clip."""
        if max_norm:
            nn.utils.clip_grads_with_norm_(self.network.parameters(), max_norm, self._norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def first_non_finite(self) -> str | None:
        """Name of the first parameter whose gradient has a NaN or Inf on this rank."""
        for name, p in self.network.named_parameters():
            if p.grad is not None and not bool(torch.isfinite(local(p.grad)).all()):
                return name
        return None

    # torch.distributed.checkpoint.state_dict gives the same names, but takes a step of apex's
    # optimizer to learn its state, and copies where these are loaded in place

    def tensors(self) -> dict[str, Tensor]:
        """Weights, buffers and optimizer state by name; the tensors themselves, not copies."""
        tensors = {f"{self.name}/{k}": v for k, v in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{self.name}_optimizer/{name}/{key}"] = value
        return tensors

    def state(self) -> dict[str, Any]:
        """The rest, as JSON: apex counts steps by group, torch in tensors."""
        groups = self.optimizer.param_groups
        return {f"{self.name}_optimizer_steps": [group.get("step") for group in groups]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take `state` from a checkpoint whose tensors were loaded in place."""
        steps = state[f"{self.name}_optimizer_steps"]
        for group, step in zip(self.optimizer.param_groups, steps, strict=True):
            if step is not None:
                group["step"] = step


def prepare_blocks(model: nn.Module, config: TrainingConfig) -> None:
    """Choose attention, activation checkpoints and compilation, block by block.

    On a CPU, wide transformer blocks recompute activations in backward (`recompute_in_backward`),
    and in bfloat16 compute attention by plain matmuls unless the environment names a back end.
    """
    eager = not (config.compile or config.activation_checkpointing)
    for block in model.modules():
        if not isinstance(block, PreNormBlock | PostNormBlock) or not block.norm1.weight.is_cpu:
            continue
        if block.norm1.weight.shape[0] >= WIDE:
            if eager:
                recompute_in_backward(block)
            if config.mixed_precision == "bf16":
                set_attention(block, os.environ.get(ENVIRONMENT) or "products")
    for block in [part for part in model.modules() if isinstance(part, BLOCKS)]:
        forward = block.forward
        if config.compile:
            forward = torch.compile(forward)
        if config.activation_checkpointing:
            # outermost: torch.compile would compile nothing around a checkpoint
            forward = partial(checkpoint, forward, use_reentrant=False)
        block.forward = forward  # type: ignore[method-assign]
