"""What the sampling ops share: the rules, the plain draw and the checks of arguments."""

import torch
from torch import Tensor

from titok_fast.kernels.philox import MAX_NOISE_STEPS

RULES = ("logit", "probability")  # a candidate's score: TiTok's raw logit, MaskGIT's log-softmax
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def mix(l: Tensor, uncond: Tensor | None, guidance: float, softmax_temperature: float) -> Tensor:
    """(l + guidance * (l - uncond)) / softmax_temperature in float32, any shape."""
    l = l.float()
    if uncond is not None:
        # in place where the memory is ours: on a CPU fresh pages cost more than the arithmetic
        l = torch.sub(l, uncond).mul_(guidance).add_(l)
    if softmax_temperature != 1.0:
        l = l / softmax_temperature if uncond is None else l.div_(softmax_temperature)
    return l


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
    op: str, rule: str, step: int, softmax_temperature: float, noise_temperature: float
) -> None:
    """Check the scalars that the sampling ops share.

    Raises:
        ValueError: an unknown rule, a negative step or a temperature out of range.
    """
    if rule not in RULES:
        raise ValueError(f"{op} wants rule to be one of {RULES}; got {rule!r}")
    if not 0 <= step < MAX_NOISE_STEPS:
        raise ValueError(f"{op} wants step >= 0 and below {MAX_NOISE_STEPS}; got {step}")
    if not softmax_temperature > 0:  # so put that NaN fails too
        raise ValueError(f"{op} wants softmax_temperature > 0; got {softmax_temperature}")
    if not noise_temperature >= 0:
        raise ValueError(f"{op} wants noise_temperature >= 0; got {noise_temperature}")


def check_tensor(
    op: str, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Check one argument against what the op's first argument implies.

    Raises:
        ValueError: another shape, dtype or device.
    """
    if x.shape != shape or x.dtype != dtype or x.device != device:
        want = f"{shape} {dtype} on {device}"
        got = f"{tuple(x.shape)} {x.dtype} on {x.device}"
        raise ValueError(f"{op} wants {name} to be {want}; got {got}")
