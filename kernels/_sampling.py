"""Shared by the sampling ops: scoring rules, guidance, the reference draw, scalar checks."""

import torch
from torch import Tensor

from titok_fast.kernels.philox import MAX_NOISE_STEPS

RULES = ("logit", "probability")  # a candidate's score: TiTok's raw logit, MaskGIT's log-softmax
LARGEST = torch.finfo(torch.float32).max


def mix(l: Tensor, uncond: Tensor | None, guidance: float, softmax_temperature: float) -> Tensor:
    """(l + guidance * (l - uncond)) / softmax_temperature in float32; -inf in l stays -inf."""
    if uncond is None:
        l = l.float()
        return l if softmax_temperature == 1.0 else l / softmax_temperature
    forbidden = l == float("-inf")  # -inf - -inf is NaN
    l = l.float()
    # in place: on a CPU, touching fresh memory costs more than the arithmetic
    l = torch.sub(l, uncond).mul_(guidance).add_(l).masked_fill_(forbidden, float("-inf"))
    return l if softmax_temperature == 1.0 else l.div_(softmax_temperature)


def unit_stride(x: Tensor) -> Tensor:
    """Copy x unless its last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def draw_ref(
    l: Tensor, noise: Tensor | None, noise_temperature: float, rule: str
) -> tuple[Tensor, Tensor]:
    """First argmax of l + noise_temperature * noise over the last dimension, and its score.

    (..., N) float32 each -> (...) int64 and (...) float32. At temperature 0 the noise is left out.
    """
    noisy = l
    if noise is not None and noise_temperature != 0.0:  # 0 * inf would be NaN
        noisy = torch.add(l, noise, alpha=noise_temperature)
    candidates = noisy.argmax(dim=-1)
    scores = l.gather(-1, candidates.unsqueeze(-1)).squeeze(-1)
    if rule == "probability":
        scores = scores - l.logsumexp(dim=-1)
    return candidates, scores


def check_sampling(
    op: str,
    rule: str,
    step: int,
    noise_temperature: float,
    softmax_temperature: float = 1.0,
    guidance: float = 0.0,
) -> None:
    """Raise the ValueError of a sampling op unless its scalars are in range and finite."""
    if rule not in RULES:
        raise ValueError(f"{op} wants rule to be one of {RULES}; got {rule!r}")
    if not 0 <= step < MAX_NOISE_STEPS:
        raise ValueError(f"{op} wants step >= 0 and below {MAX_NOISE_STEPS}; got {step}")
    for fits, want, got in (  # no comparison holds for NaN
        (0 < softmax_temperature <= LARGEST, "softmax_temperature > 0 and", softmax_temperature),
        (0 <= noise_temperature <= LARGEST, "noise_temperature >= 0 and", noise_temperature),
        (-LARGEST <= guidance <= LARGEST, "guidance to be", guidance),
    ):
        if not fits:
            raise ValueError(f"{op} wants {want} finite in float32; got {got}")
