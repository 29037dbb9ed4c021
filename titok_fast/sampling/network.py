"""The Protocol of a generator for samplers, so that models may import the samplers."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from titok_fast.config import GeneratorConfig


class Generator(Protocol):
    """A masked generator in eval mode, such as `ImageBert` or `UViTBert`."""

    config: GeneratorConfig
    lm_head: nn.Linear

    def hidden(self, ids: Tensor, class_ids: Tensor) -> Tensor:
        """(B, K) ids with masks and (B,) class ids in token space -> (B, K, D) hidden states."""

    def class_ids(self, labels: Tensor) -> Tensor:
        """(B,) labels -> (B,) class ids in token space."""

    def __call__(self, input_ids: Tensor, condition: Tensor, cond_drop_prob: float) -> Tensor:
        """(B, K) ids with masks and (B,) labels -> (B, K, N) logits."""


def check_labels(labels: Tensor, classes: int, names: Sequence[str] = ()) -> None:
    """Raise ValueError unless labels are one integer in 0..classes-1 per sample.

    `names` of the classes, if there are any, go into the message.
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels want shape (B,), integers; got {tuple(labels.shape)} {labels.dtype}"
        )
    if labels.numel() and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            listing = ", ".join(f"{i} {name}" for i, name in enumerate(names))
            known = f" ({listing})" if names else ""
            raise ValueError(f"labels lie in 0..{classes - 1}{known}; got {low}..{high}")
