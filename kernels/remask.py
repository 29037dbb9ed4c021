"""Mask the least confident tokens of each image again, a given number of them per image.

K up to 1024. One program per image sorts its confidences in registers and shared memory, reads the
one at the wanted rank and compares: one launch instead of torch's noise, sort, gather, compare and
select. Four values to a thread: up to 128 tokens, which is every published model, one warp does all
of it without a barrier.
Floor: 20 * B * K bytes, 5 KB at B = 8, K = 32: the launch is all of the cost, so the prediction is
1/8 of the time of the eight launches it replaces, not a share of bandwidth.
Definition: `ImageBert.generate` of TiTok; rule "probability" as in MaskGIT (arXiv:2202.04200).
"""

import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from titok_fast.kernels._launch import is_plain_cpu, lazy_triton_op, runs_triton
from titok_fast.kernels._offline import OfflineCase
from titok_fast.kernels._sampling import LARGEST, check_sampling
from titok_fast.kernels._values import (
    INT64,
    check_in_range,
    check_no_nan,
    check_tensors,
    looks_at_values,
)
from titok_fast.kernels.philox import remask_gumbel, remask_noise, remask_noise_numpy

MAX_TOKENS = 1024  # of one image: one program sorts as many without spilling


def remask_ref(
    candidates: Tensor,
    scores: Tensor,
    num_masked: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    mask_id: int,
    step: int,
    noise_temperature: float,
    rule: str,
) -> Tensor:
    """Reference of `remask`."""
    B, K = scores.shape
    unknown = scores != float("inf")
    confidence = scores
    if noise_temperature != 0.0:
        if noise is not None:
            confidence = torch.add(scores, noise, alpha=noise_temperature)
            # noise of -inf turned the +inf of known tokens into NaN
            confidence = confidence.masked_fill(~unknown, float("inf"))
        else:
            assert seeds is not None  # remask has checked
            confidence = torch.add(scores, remask_noise(seeds, step, K), alpha=noise_temperature)
    ascending = confidence.sort(dim=-1).values
    n = num_masked.view(B, 1)
    if rule == "logit":
        cutoff = ascending.gather(1, (n - 1).clamp(0, K - 1))
        masked = (confidence <= cutoff).logical_and_(unknown).logical_and_(n > 0)
    else:
        cutoff = ascending.gather(1, n.clamp(0, K - 1))
        masked = confidence < cutoff.masked_fill(n >= K, float("inf"))  # known tokens are +inf
    return candidates.masked_fill(masked, mask_id)


def _remask_numpy(candidates: Tensor, scores: Tensor, num_masked: Tensor, *rest: Any) -> Tensor:
    """The reference for eager CPU tensors: NumPy's calls cost half as much as torch's.

    Raises for NaN, which sorts last, and for a negative count.
    """
    seeds, noise, mask_id, step, noise_temperature, rule = rest
    K, score, counts = scores.shape[1], scores.detach().numpy(), num_masked.tolist()
    confidence = score
    if noise_temperature != 0.0:
        if noise is None:
            confidence = remask_noise_numpy(seeds, step, K)
            confidence *= np.float32(noise_temperature)
            confidence += score
        else:
            check_no_nan("remask", noise=noise)
            with np.errstate(invalid="ignore"):  # noise of -inf turns +inf into NaN
                confidence = score + noise_temperature * noise.detach().numpy()
            confidence[score == np.inf] = np.inf
    ascending = np.sort(confidence)
    if min(counts, default=0) < 0 or any(last != last for last in ascending[:, -1].tolist()):
        _check_values(scores, num_masked, noise)
    # cutoffs by Python: NumPy's indexing is slower for one number per row
    if rule == "logit":
        # below the +inf of known tokens; a cutoff of NaN masks nothing
        cutoff = [
            min(ascending.item(b, min(n, K) - 1), LARGEST) if n > 0 else math.nan
            for b, n in enumerate(counts)
        ]
        masked = confidence <= np.array(cutoff, np.float32)[:, None]
    else:
        cutoff = [ascending.item(b, n) if n < K else math.inf for b, n in enumerate(counts)]
        masked = confidence < np.array(cutoff, np.float32)[:, None]
    return torch.from_numpy(np.where(masked, mask_id, candidates.numpy()))


def _check_values(scores: Tensor, num_masked: Tensor, noise: Tensor | None) -> None:
    check_no_nan("remask", scores=scores, noise=noise)
    check_in_range("remask", "num_masked", num_masked, 0, float("inf"))


@triton.jit(do_not_specialize=["step", "mask_id"])
def _remask_kernel(
    candidates_ptr,  # (B, K) int64
    scores_ptr,  # (B, K) float32
    num_masked_ptr,  # (B,) int64
    seeds_ptr,  # (B,) int64, read if NOISE is "counter"
    noise_ptr,  # (B, K) float32, read if NOISE is "given"
    out_ptr,  # (B, K) int64
    K,
    mask_id,
    step,
    noise_temperature,
    NOISE: tl.constexpr,
    PROBABILITY: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    scores = tl.load(scores_ptr + b * K + k, mask=inside, other=float("inf"))
    unknown = scores != float("inf")
    confidence = scores
    if NOISE == "counter":
        confidence += noise_temperature * remask_gumbel(tl.load(seeds_ptr + b), step, k)
    elif NOISE == "given":
        g = tl.load(noise_ptr + b * K + k, mask=inside, other=0.0)
        confidence += noise_temperature * g
    # noise of -inf turned the +inf of known tokens into NaN
    confidence = tl.where(unknown, confidence, float("inf"))

    n = tl.load(num_masked_ptr + b)
    rank = n if PROBABILITY else n - 1
    rank = tl.minimum(tl.maximum(rank, 0), K - 1)
    ascending = tl.sort(confidence)
    cutoff = tl.sum(tl.where(k == rank, ascending, 0.0), 0)
    candidates = tl.load(candidates_ptr + b * K + k, mask=inside, other=0)
    if PROBABILITY:
        masked = confidence < tl.where(n >= K, float("inf"), cutoff)  # known tokens are +inf
        ids = tl.where(masked, mask_id, candidates)
    else:
        ids = tl.where(unknown & (confidence <= cutoff), mask_id, candidates)
        ids = tl.where(n > 0, ids, candidates)
    tl.store(out_ptr + b * K + k, ids, mask=inside)


def _warps(block: int) -> int:
    return max(1, block // 128)


@lazy_triton_op("remask", like=remask_ref)
def _remask(candidates: Tensor, scores: Tensor, num_masked: Tensor, *rest: Any) -> Tensor:
    seeds, noise, mask_id, step, noise_temperature, rule = rest
    B, K = scores.shape
    out = torch.empty((B, K), dtype=torch.int64, device=scores.device)
    if B == 0:
        return out
    source = "given" if noise is not None else "counter"
    flags: dict[str, object] = {"NOISE": "none" if noise_temperature == 0.0 else source}
    flags["PROBABILITY"] = rule == "probability"
    # the kernel takes no None: pass a tensor that it does not read
    seeds, noise = num_masked if seeds is None else seeds, scores if noise is None else noise
    tensors = [x.contiguous() for x in (candidates, scores, num_masked, seeds, noise)]
    block, scalars = triton.next_power_of_2(K), (mask_id, step, noise_temperature)
    wrap_triton(_remask_kernel)[(B,)](
        *tensors, out, K, *scalars, **flags, BLOCK_K=block, num_warps=_warps(block)
    )
    return out


def remask(
    candidates: Tensor,
    scores: Tensor,
    num_masked: Tensor,
    *,
    mask_id: int,
    seeds: Tensor | None = None,
    step: int = 0,
    noise_temperature: float,
    rule: str = "logit",
    noise: Tensor | None = None,
) -> Tensor:
    """Mask the least confident tokens again, confidence = score + noise_temperature * Gumbel noise.

    The two rules differ when confidences tie: "logit" (TiTok) masks those that are at most the
    num_masked-th smallest, so ties enlarge the mask; "probability" (MaskGIT) masks those below the
    next larger one, so ties shrink it. A score of +inf marks a known token, which is never masked.

    Args:
        candidates: (B, K) int64, K at most 1024.
        scores: (B, K) float32, as `guided_sample` returns them, same device.
        num_masked: (B,) int64, tokens to mask in each image, at least 0; K or more masks all
            unknown ones.
        mask_id: id of a masked token.
        seeds: (B,) int64, one per sample: seed, step and position alone decide the noise. May be
            None if noise is given or noise_temperature is 0.
        step: sampling step, in [0, 2**15).
        noise_temperature: at least 0.
        rule: "logit" or "probability".
        noise: (B, K) float32 standard Gumbel values to use instead of the counter's.

    Returns:
        (B, K) int64: candidates, or mask_id.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, K above 1024, an unknown rule, a
            temperature that is negative or not finite, or no source of noise. Also NaN among scores
            or noise, or a negative num_masked: on a GPU, where the check waits, only under
            TITOK_FAST_CHECK_VALUES=1; otherwise a negative num_masked masks nothing, and the order
            of NaN is unspecified.
    """
    check_tensors(
        "remask",
        {"K": MAX_TOKENS},
        scores=(scores, "BK", (torch.float32,)),
        candidates=(candidates, "BK", INT64),
        num_masked=(num_masked, "B", INT64),
        seeds=(seeds, "B", INT64),
        noise=(noise, "BK", (torch.float32,)),
    )
    check_sampling("remask", rule, step, noise_temperature)
    if seeds is None and noise is None and noise_temperature != 0.0:
        raise ValueError("remask wants seeds or noise unless noise_temperature is 0")
    implementation = _remask if runs_triton(scores) else remask_ref
    if implementation is remask_ref and is_plain_cpu(scores):
        implementation = _remask_numpy
    elif looks_at_values(scores, ids_only=False):
        _check_values(scores, num_masked, noise)
    return implementation(
        candidates, scores, num_masked, seeds, noise, mask_id, step, noise_temperature, rule
    )


def offline_cases() -> list[OfflineCase]:
    """32, 64 and 128 tokens, as published, and the limit, under both rules."""
    types = {"*i64": "candidates_ptr num_masked_ptr seeds_ptr out_ptr", "i32": "mask_id step"}
    B = 8
    return [
        OfflineCase.of(
            _remask_kernel,
            f"B={B} K={K} {rule}",
            types | {"fp32": "noise_temperature"},
            {"NOISE": "counter", "PROBABILITY": rule == "probability", "BLOCK_K": K},
            num_warps=_warps(K),
            vector_loads=False,  # one value per thread: the launch is the cost
            flops=50.0 * B * K,
            bytes_min=20 * B * K + 16 * B,
            # noise 36, add 12, sort 16, gather and compare 17, select 17
            bytes_unfused=98 * B * K,
        )
        for K in (32, 64, 128, MAX_TOKENS)
        for rule in ("logit", "probability")
    ]
