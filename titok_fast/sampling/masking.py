"""Train the generator: choose masked tokens and dropped labels, and compute the loss.

Upstream: ImageBert.masking_input_tokens and MLMLoss; the schedules beside arccos are those of
google-research/maskgit. Every uniform is an argument, so that one rank and many draw the same.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from titok_fast.kernels.masked_cross_entropy import masked_cross_entropy
from titok_fast.sampling.schedules import mask_ratio

_EPS = 1e-8  # of the weighted means, as published
_ACCURACY_ELEMENTS = 1 << 22  # logits held at once for an argmax


class Noise(NamedTuple):
    """Float32 uniforms in [0, 1) of a batch."""

    ratio: Tensor  # (B,) decides how many tokens of a sample are masked
    order: Tensor  # (B, K) decides which
    drop: Tensor  # (B,) decides whether the label is dropped


def draw_noise(B: int, K: int, generator: torch.Generator) -> Noise:
    """Uniforms for B samples of K tokens, on the generator's device."""
    one = torch.rand(B, K + 2, generator=generator, device=generator.device)
    return Noise(one[:, 0], one[:, 2:], one[:, 1])


def mask_counts(uniforms: Tensor, K: int, schedule: str = "arccos") -> Tensor:
    """How many of K tokens to mask, from (B,) uniforms: (B,) float32 whole numbers in [1, K].

    K times the ratio of the schedule (see `mask_ratio`), rounded half to even.
    """
    # upstream also clips the ratio to [1e-6, 1], which changes no count
    return (K * mask_ratio(schedule, uniforms.float())).round().clamp(min=1)


def mask_tokens(
    ids: Tensor, noise: Noise, mask_token_id: int, schedule: str = "arccos"
) -> tuple[Tensor, Tensor]:
    """Mask a random share of the (B, K) int64 tokens of every sample, on the noise's device.

    Returns:
        (B, K) int64 ids with masks; (B, K) bool, True where masked, at least one per sample.

    Raises:
        ValueError: shapes differ, or an unknown schedule.
    """
    if ids.ndim != 2 or noise.order.shape != ids.shape or noise.ratio.shape != ids.shape[:1]:
        got = f"{tuple(ids.shape)}, {tuple(noise.ratio.shape)} and {tuple(noise.order.shape)}"
        raise ValueError(f"mask_tokens wants ids (B, K), uniforms (B,) and (B, K); got {got}")
    counts = mask_counts(noise.ratio, ids.shape[1], schedule)
    # not the ranks of the uniforms but the permutation that sorts them: as published
    mask = noise.order.argsort(dim=-1, stable=True) < counts[:, None]
    return torch.where(mask, mask_token_id, ids), mask


def drop_labels(
    class_ids: Tensor, noise: Noise, no_class_id: int, probability: float = 0.1
) -> Tensor:
    """(B,) int64 class ids -> the same with "no class" where the uniform is below `probability`."""
    return class_ids.masked_fill(noise.drop < probability, no_class_id)


def token_weights(mask: Tensor, unmasked_weight: float = 0.1) -> Tensor:
    """(B, K) bool, True where masked -> (B, K) float32 weights: 1 there, else `unmasked_weight`."""
    masked = mask.float()
    return (1.0 - masked) * unmasked_weight + masked


def masked_token_loss(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    mask: Tensor,
    *,
    label_smoothing: float = 0.1,
    unmasked_weight: float = 0.1,
    total_weight: Tensor | None = None,
) -> Tensor:
    """Smoothed cross-entropy, weighted by `token_weights`: sum(w * ce) / (sum(w) + 1e-8), a scalar.

    Head and loss are one op: see kernels/masked_cross_entropy.py.

    Args:
        hidden: (B, K, D) last hidden states, any float dtype.
        head: `lm_head`, D -> N.
        targets: (B, K) int64 in [0, N), the ids before masking.
        mask: (B, K) bool, True where masked.
        label_smoothing: share of the target spread over all codes, [0, 1).
        unmasked_weight: of the positions that were not masked.
        total_weight: scalar that replaces sum(w). Ranks and accumulated batches, whose gradients
            are averaged, pass the mean of their sums, so the average is that of one large batch.
    """
    _check_tokens(hidden, targets, mask)
    weights = token_weights(mask, unmasked_weight)
    loss = masked_cross_entropy(
        hidden.flatten(0, 1),
        head.weight,
        head.bias,
        targets.flatten(),
        weights.flatten(),
        label_smoothing,
    )
    if total_weight is None:
        return loss
    return loss * ((weights.sum() + _EPS) / (total_weight + _EPS))


@torch.no_grad()
def masked_accuracy(hidden: Tensor, head: nn.Linear, targets: Tensor, mask: Tensor) -> Tensor:
    """Share of masked tokens whose likeliest code is right: the mean over samples, as published.

    Costs another matmul with the head, so it is for steps that are logged. Arguments as in
    `masked_token_loss`.
    """
    _check_tokens(hidden, targets, mask)
    rows, step = hidden.flatten(0, 1), max(1, _ACCURACY_ELEMENTS // head.out_features)
    best = torch.cat([head(part).argmax(dim=-1) for part in rows.split(step)])
    right = ((best.view_as(targets) == targets) & mask).sum(dim=1)
    return (right / (mask.sum(dim=1) + _EPS)).mean()


def _check_tokens(hidden: Tensor, targets: Tensor, mask: Tensor) -> None:
    if hidden.ndim != 3 or targets.shape != hidden.shape[:2] or mask.shape != hidden.shape[:2]:
        got = f"{tuple(hidden.shape)}, {tuple(targets.shape)} and {tuple(mask.shape)}"
        raise ValueError(f"wants hidden (B, K, D), targets and mask (B, K); got {got}")
