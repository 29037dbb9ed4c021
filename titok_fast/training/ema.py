"""Moving average of a model's weights, which evaluation, example images and exports use.

Upstream: modeling/modules/ema_model.py. Its resume replaced the configured decay by a default; here
the recipe gives the decay. Not torch's AveragedModel: it copies the whole module, frozen parameters
included, cannot swap the averages into a sharded model, and its decay does not rise.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from titok_fast.training.engine import local


class Ema:
    """Average of the trainable parameters; frozen ones are not stored.

    Works on sharded parameters: each rank averages the shard it holds.

    Args:
        model: on its device, already sharded. Not the DDP wrapper, whose names differ.
        decay: highest decay, in [0, 1].

    Raises:
        ValueError: decay out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"Ema wants a decay in [0, 1]; got {decay}")
        self.model, self.decay = model, decay
        self._applied = False
        self._average = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }

    @property
    def average(self) -> dict[str, Tensor]:
        """Averages by parameter name: part of a checkpoint."""
        if self._applied:
            raise RuntimeError("inside `with ema.applied()` the weights are swapped")
        return self._average

    def decay_at(self, step: int) -> float:
        """Decay of the update after `step` earlier ones: 0 at first, then rising to `decay`."""
        return min(self.decay, (1 + step) / (10 + step)) if step > 0 else 0.0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights, after an optimizer update.

        Args:
            step: updates done before that one; 0 copies the weights.
        """
        averages, weights = self._pairs()
        # lerp's weight 1 gives the new value exactly
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay_at(step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside `with`, the model holds the averages; then its own weights again, bit for bit."""
        self._swap()
        self._applied = True
        try:
            yield
        finally:
            self._applied = False
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(*self._pairs(), strict=True):
            held = weight.clone()  # one tensor at a time: no second copy of the model
            weight.copy_(average)
            average.copy_(held)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's part of the averages and of the weights."""
        averages = [local(average) for average in self.average.values()]
        for part in self.model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # after a forward without backward the root is still gathered
        weights = dict(self.model.named_parameters())
        return averages, [local(weights[name].detach()) for name in self.average]
