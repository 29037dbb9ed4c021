"""Draw tokens for labels: the fast sampler, iterative unmasking without a host wait.

The distribution is the reference sampler's (reference.py). Three things differ: guidance is one
doubled batch, and none where its weight is 0; it mixes the two halves in the last hidden state,
which is exact because the head is linear; noise is a function of (seed, step, position, code), so a
sample does not depend on its batch, its place in it, or its rank.
"""

from collections.abc import Callable, Sequence
from math import floor

import torch
from torch import Tensor

from titok_fast.kernels.lm_head_sample import lm_head_sample
from titok_fast.kernels.remask import remask
from titok_fast.sampling.network import Generator, check_labels
from titok_fast.sampling.schedules import Step, steps
from titok_fast.sampling_config import SamplingConfig

_MASK64 = (1 << 64) - 1


def sample_seeds(seed: int, count: int, first: int = 0) -> Tensor:
    """Seeds of samples first .. first+count-1 of a run, whose seed is any integer: (count,) int64.

    SplitMix64 of (seed, index): neighbouring runs share no seed, and sample i has the same seed in
    any batch and on any rank.
    """
    start = _mix(seed & _MASK64)
    values = [
        _mix((start + (i + 1) * 0x9E3779B97F4A7C15) & _MASK64) for i in range(first, first + count)
    ]
    return torch.tensor([v - (1 << 64) if v >> 63 else v for v in values], dtype=torch.int64)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


@torch.no_grad()
def sample(
    generator: Generator,
    labels: Tensor | Sequence[int],
    seeds: Tensor,
    config: SamplingConfig | None = None,
    tokens: Tensor | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Draw the tokens of a batch.

    Args:
        generator: a generator in eval mode.
        labels: (B,) integers 0..classes-1.
        seeds: (B,) int64, one per sample.
        config: settings; upstream's defaults if absent.
        tokens: (B, K) int64 tokens to keep, the mask id where one is to be drawn; samples may
            differ in how many. All masked if absent.
        on_step: called after each step, for progress bars.

    Returns:
        (B, K) int64 ids in [0, N); empty for an empty batch.

    Raises:
        ValueError: a label, seed or token of wrong shape, type or range.
    """
    inputs = draw_inputs(generator, torch.as_tensor(labels), seeds, tokens)
    return unmask(generator, *inputs, config or SamplingConfig(), on_step)


def draw_inputs(
    generator: Generator, labels: Tensor, seeds: Tensor, tokens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments of `sample`; return ids, class ids and seeds for `unmask`."""
    cfg, device = generator.config, generator.lm_head.weight.device
    labels = labels.long() if labels.numel() == 0 else labels
    check_labels(labels, cfg.condition_num_classes)
    B, K = labels.shape[0], cfg.image_seq_len
    if seeds.shape != (B,) or seeds.dtype != torch.int64:
        raise ValueError(
            f"seeds want shape ({B},) int64, one per label; got {tuple(seeds.shape)} {seeds.dtype}"
        )
    if tokens is None:
        ids = torch.full((B, K), cfg.mask_token_id, device=device)
    else:
        ids = _check_tokens(tokens, B, K, cfg.mask_token_id).to(device)
    return ids, generator.class_ids(labels.to(device)), seeds.to(device)


def _check_tokens(tokens: Tensor, B: int, K: int, mask_id: int) -> Tensor:
    if tokens.shape != (B, K) or tokens.is_floating_point():
        raise ValueError(
            f"tokens want shape ({B}, {K}), integers; got {tuple(tokens.shape)} {tokens.dtype}"
        )
    if tokens.numel():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high > mask_id:
            raise ValueError(
                f"tokens lie in 0..{mask_id - 1}, or {mask_id} where one is to be drawn; "
                f"got {low}..{high}"
            )
    return tokens.long()


def unmask(
    generator: Generator,
    ids: Tensor,
    class_ids: Tensor,
    seeds: Tensor,
    config: SamplingConfig,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """`sample` of checked arguments (`draw_inputs`): (B, K) ids, (B,) class ids in token space.

    No host wait and static shapes, so that a CUDA graph can record it.
    """
    B, K = ids.shape
    mask_id, no_class_id = generator.config.mask_token_id, generator.config.no_class_id
    both_classes = torch.cat([class_ids, torch.full_like(class_ids, no_class_id)])  # (2B,)
    row_seeds = seeds.repeat_interleave(K)  # (B*K,)
    positions = torch.arange(K, device=ids.device).repeat(B)  # (B*K,)
    base = maskable(ids, config, mask_id)

    for step in steps(config):
        if step.guidance == 0:
            cond, uncond = generator.hidden(ids, class_ids).flatten(0, 1), None  # (B*K, D)
        else:
            hidden = generator.hidden(ids.repeat(2, 1), both_classes)  # (2B, K, D)
            cond, uncond = hidden.flatten(0, 1).chunk(2)
        candidates, scores = lm_head_sample(
            cond,
            uncond,
            generator.lm_head.weight,
            generator.lm_head.bias,
            seeds=row_seeds,
            positions=positions,
            step=step.index,
            guidance=step.guidance,
            softmax_temperature=step.softmax_temperature,
            noise_temperature=step.token_noise,
            rule=config.confidence,
        )
        ids = end_step(
            ids,
            candidates.view(B, K),
            scores.view(B, K),
            step,
            base,
            mask_id=mask_id,
            seeds=seeds,
            rule=config.confidence,
        )
        if on_step is not None:
            on_step()
    return ids


def maskable(ids: Tensor, config: SamplingConfig, mask_id: int) -> int | Tensor:
    """Base of the mask ratio: K by TiTok's rule; by MaskGIT's the (B,) masked tokens of `ids`."""
    return ids.shape[1] if config.confidence == "logit" else (ids == mask_id).sum(dim=1)


def end_step(
    ids: Tensor,
    candidates: Tensor,
    scores: Tensor,
    step: Step,
    base: int | Tensor,
    *,
    mask_id: int,
    seeds: Tensor,
    rule: str,
) -> Tensor:
    """(B, K) ids after a step: keep known ones, mask the least confident of the others again.

    Candidates and their scores are (B, K), drawn for all positions; `base` is from `maskable`.
    """
    mask = ids == mask_id
    candidates = torch.where(mask, candidates, ids)
    if step.last:
        return candidates
    return remask(
        candidates,
        scores.masked_fill(~mask, float("inf")),
        num_masked(mask, base, step.mask_ratio),
        mask_id=mask_id,
        seeds=seeds,
        step=step.index,
        noise_temperature=step.remask_noise,
        rule=rule,
    )


def num_masked(mask: Tensor, base: int | Tensor, mask_ratio: float) -> Tensor:
    """(B,) int64 tokens that stay masked after a step: fewer than in `mask`, at least one."""
    most = mask.sum(dim=1).sub_(1)
    if isinstance(base, int):
        return most.clamp_(1, max(1, floor(base * mask_ratio)))
    return torch.minimum(most, (base.double() * mask_ratio).floor().long()).clamp(min=1)
