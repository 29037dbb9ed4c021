"""Schedules of a sampling run: masks, guidance and noise of each step, on the host in float64.

Float64 matters: the cosine schedule at r = 2/3 loses a token in float32. Formulas: upstream's
modeling/maskgit.py for TiTok, google-research/maskgit for the other mask schedules.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, floor, pi
from typing import Any, TypeVar

import torch
from torch import Tensor

from titok_fast.sampling_config import SamplingConfig


@dataclass(frozen=True)
class Step:
    """One step of a run."""

    index: int  # 0..T-1; also the step counter of the noise
    mask_ratio: float  # share of the maskable tokens that stay masked after the step; 0 at the last
    guidance: float  # w in cond + w * (cond - uncond); 0 means no unconditional pass
    softmax_temperature: float  # divides the logits
    token_noise: float  # scale of the Gumbel noise that draws tokens; 0 is greedy
    remask_noise: float  # scale of the Gumbel noise on confidences
    last: bool  # nothing is masked again


# by schedule, with the functions of math or of torch
_RATIOS: dict[str, Callable[[Any, Any], Any]] = {
    "arccos": lambda lib, r: lib.acos(r) / (pi * 0.5),
    # MaskGIT clips at 1e-6; cos(pi/2) is 6e-17 in float64, and floor() makes both 0
    "cosine": lambda lib, r: lib.cos(pi * 0.5 * r),
    "linear": lambda lib, r: 1.0 - r,
    "sqrt": lambda lib, r: 1.0 - r**0.5,
}
Share = TypeVar("Share", float, Tensor)


def mask_ratio(schedule: str, r: Share) -> Share:
    """Share of masked tokens by the schedule "arccos", "cosine", "linear" or "sqrt".

    In sampling r is the share (0..1] of finished steps, in training a tensor of uniforms in [0, 1).
    ValueError for an unknown schedule.
    """
    if schedule not in _RATIOS:
        raise ValueError(f"unknown mask schedule {schedule!r}; known: {', '.join(_RATIOS)}")
    return _RATIOS[schedule](torch if isinstance(r, Tensor) else math, r)


def guidance_weight(config: SamplingConfig, step: int) -> float:
    """The w in cond + w * (cond - uncond) at a step.

    Upstream's power-cosine mode scales from the unconditional side, uncond + s * (cond - uncond),
    which is the same line with w = s - 1; so the same guidance_scale means a different strength.
    Outside of config.guidance_interval w is 0 in every mode.
    """
    T, scale = config.num_sample_steps, config.guidance_scale
    low, high = config.guidance_interval
    if not low <= step / T < high:
        return 0.0
    if config.guidance_decay == "constant":
        return scale
    if config.guidance_decay == "linear":
        return scale * step / T
    rise = (1 - cos(pi * (step / T) ** config.guidance_scale_pow)) / 2
    return (scale - 1) * rise


def steps(config: SamplingConfig) -> list[Step]:
    """All steps of a run, in order."""
    T = config.num_sample_steps
    return [_step(config, s, (s + 1) / T) for s in range(T)]


def _step(config: SamplingConfig, index: int, r: float) -> Step:
    noise = config.randomize_temperature * (1.0 - r)
    return Step(
        index=index,
        mask_ratio=mask_ratio(config.schedule, r),
        guidance=guidance_weight(config, index),
        softmax_temperature=0.5 + 0.8 * (1 - r) if config.softmax_temperature_annealing else 1.0,
        # MaskGIT draws tokens at temperature 1 throughout; TiTok's draw turns greedy
        token_noise=noise if config.confidence == "logit" else 1.0,
        remask_noise=noise,
        last=index == config.num_sample_steps - 1,
    )


def masked_after(config: SamplingConfig, K: int) -> list[int]:
    """Tokens still masked after each step of a run that starts with all `K` masked."""
    left, counts = K, []
    for step in steps(config):
        left = 0 if step.last else max(1, min(left - 1, floor(K * step.mask_ratio)))
        counts.append(left)
    return counts
