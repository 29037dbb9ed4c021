"""Moving average of a model's weights, which evaluation, pictures and exports use.

Upstream: modeling/modules/ema_model.py. Its resume replaced the configured decay by a default; here
the decay is part of the state.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Ema:
    """Average of the trainable parameters; a frozen one is its own average and is not stored.

    Works on sharded parameters: each rank averages the shard it holds.

    Args:
        model: what is averaged, already on its device and sharded. Not the DDP wrapper, whose
            names differ.
        decay: highest decay, in [0, 1].

    Raises:
        ValueError: decay out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"Ema wants a decay in [0, 1]; got {decay}")
        self.model, self.decay = model, decay
        self._applied = False
        self._sharded = [part for part in model.modules() if isinstance(part, FSDPModule)]
        self.average = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }

    def decay_at(self, step: int) -> float:
        """Decay of the update after `step` earlier ones: 0 at first, then rising to `decay`."""
        return min(self.decay, (1 + step) / (10 + step)) if step > 0 else 0.0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the model's weights after an optimizer update.

        Args:
            step: updates done before that one; 0 copies the weights.
        """
        self._not_applied("update")
        averages, weights = self._pairs()
        # lerp's weight 1 gives the new value exactly
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay_at(step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside `with`, the model holds the averages; afterwards its own weights, bit for bit."""
        self._not_applied("applied")
        self._swap()
        self._applied = True
        try:
            yield
        finally:
            self._swap()
            self._applied = False

    def state_dict(self) -> dict[str, Any]:
        """`decay`, and `average` from parameter names to the averages themselves (no copies)."""
        self._not_applied("state_dict")
        return {"decay": self.decay, "average": dict(self.average)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state, the decay included.

        Raises:
            ValueError: another decay than configured, or tensors that do not fit.
        """
        self._not_applied("load_state_dict")
        found: Mapping[str, Tensor] = state["average"]
        if state["decay"] != self.decay:
            raise ValueError(
                f"the saved average has decay {state['decay']}; the recipe says {self.decay}"
            )
        wrong = sorted(found.keys() ^ self.average.keys())
        wrong += [n for n, a in self.average.items() if n in found and found[n].shape != a.shape]
        if wrong:
            raise ValueError(f"the saved average does not fit the model: {', '.join(wrong)}")
        for name, average in self.average.items():
            average.copy_(found[name])

    def _not_applied(self, what: str) -> None:
        if self._applied:
            raise RuntimeError(f"Ema.{what} inside `with ema.applied()`: the weights are swapped")

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(*self._pairs(), strict=True):
            held = weight.clone()  # one tensor at a time: no second copy of the model
            weight.copy_(average)
            average.copy_(held)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Averages and weights, as this rank holds them."""
        for part in self._sharded:
            part.reshard()  # after a forward without backward the root is left gathered
        weights = dict(self.model.named_parameters())
        names = list(self.average)
        return [_local(self.average[n]) for n in names], [_local(weights[n]) for n in names]


def _local(tensor: Tensor) -> Tensor:
    """The memory of this rank's part."""
    plain = tensor.detach()
    return plain.to_local() if isinstance(plain, DTensor) else plain
