"""Draw masked tokens from guided logits with Gumbel noise: one read of the logits, ids and scores.

One program per (image, token) reads tiles of 2048 codes, eight per thread, so that every read is
128 bits wide. Noise is made in registers (philox.py), four codes to a counter. Each lane keeps its
own best code; lanes are compared once, at the end, where the lowest of equal codes wins as in
torch.argmax. Rows that are not masked read nothing: a third of them over a run of eight steps. No
split over codes: one image has 32 rows or more, and a row takes a microsecond.
Floor: the logits read once. B = 8, K = 32, N = 4096, bfloat16, guided: 4.2 MB, 1.3 us on an H100,
less than the launch. Some 80 instructions per code, 65 of them noise, bound large batches:
predicted 40 % of the memory floor for bfloat16, 80 % for float32, nearly all of it with noise 0.
Definition: `ImageBert.generate` of TiTok; rule "probability" as in MaskGIT (arXiv:2202.04200).
"""

from math import inf, isnan
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from titok_fast.kernels._guided_sample_device import guided_sample_kernel
from titok_fast.kernels._launch import is_plain_cpu, lazy_triton_op, runs_triton
from titok_fast.kernels._offline import OfflineCase
from titok_fast.kernels._sampling import check_sampling, draw_ref, mix, unit_stride
from titok_fast.kernels._values import (
    FLOAT_TYPES,
    INT64,
    TRITON_NAMES,
    check_no_nan,
    check_tensors,
    looks_at_values,
)
from titok_fast.kernels.philox import MAX_POSITIONS, TOKEN_STREAM, gumbel, row_gumbel

_WARPS = 8


def guided_sample_ref(
    logits: Tensor,
    uncond_logits: Tensor | None,
    mask: Tensor,
    ids: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    step: int,
    guidance: float,
    softmax_temperature: float,
    noise_temperature: float,
    rule: str,
) -> tuple[Tensor, Tensor]:
    """Reference of `guided_sample`, in float32 on any device."""
    l = mix(logits, uncond_logits, guidance, softmax_temperature)
    if noise is None and noise_temperature != 0.0:
        assert seeds is not None  # guided_sample has checked
        positions = torch.arange(l.shape[1], device=l.device)
        noise = gumbel(seeds, step, positions, l.shape[2], TOKEN_STREAM)
    candidates, scores = draw_ref(l, noise, noise_temperature, rule)
    return torch.where(mask, candidates, ids), scores.masked_fill(~mask, float("inf"))


def _masked_rows(
    logits: Tensor, uncond_logits: Tensor | None, mask: Tensor, ids: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """The reference on the masked rows alone, for eager CPU tensors: a third fewer over a run.

    Their number is a shape: a GPU would wait for it, and a graph cannot hold it.
    """
    seeds, noise, step, guidance, softmax_temperature, noise_temperature, rule = rest
    b, k = mask.nonzero(as_tuple=True)
    uncond = None if uncond_logits is None else uncond_logits[b, k]
    l = mix(logits[b, k], uncond, guidance, softmax_temperature)  # (R, N)
    rows = None if noise is None else noise[b, k]
    if rows is None and noise_temperature != 0.0:
        rows = row_gumbel(seeds[b], step, k, l.shape[1], TOKEN_STREAM)
    candidates, scores = ids.clone(), torch.full(ids.shape, float("inf"))
    candidates[b, k], scores[b, k] = draw_ref(l, rows, noise_temperature, rule)
    return candidates, scores


def _tile(N: int) -> int:
    """Codes per tile: eight per thread; at least the four that share a counter."""
    return max(4, min(8 * 32 * _WARPS, triton.next_power_of_2(N)))


@lazy_triton_op("guided_sample", like=guided_sample_ref)
def _guided_sample(
    logits: Tensor, uncond_logits: Tensor | None, mask: Tensor, ids: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    seeds, noise, step, guidance, softmax_temperature, noise_temperature, rule = rest
    B, K, N = logits.shape
    cond = unit_stride(logits)
    uncond = cond if uncond_logits is None else unit_stride(uncond_logits)
    candidates = torch.empty((B, K), dtype=torch.int64, device=logits.device)
    scores = torch.empty((B, K), dtype=torch.float32, device=logits.device)
    if B == 0:
        return candidates, scores
    source = "given" if noise is not None else "counter"
    # the kernel takes no None: pass a tensor that it does not read
    seeds = cond if seeds is None else seeds.contiguous()
    noise = cond if noise is None else noise.contiguous()
    tensors = (cond, uncond, mask.contiguous(), ids.contiguous(), seeds, noise, candidates, scores)
    sizes = (K, N, *cond.stride()[:2], *uncond.stride()[:2])
    scalars = (step, guidance, 1.0 / softmax_temperature, noise_temperature)
    wrap_triton(guided_sample_kernel)[(B * K,)](
        *tensors,
        *sizes,
        *scalars,
        GUIDED=uncond_logits is not None,
        NOISE="none" if noise_temperature == 0.0 else source,
        PROBABILITY=rule == "probability",
        BLOCK_N=_tile(N),
        num_warps=_WARPS,
    )
    return candidates, scores


def guided_sample(
    logits: Tensor,
    uncond_logits: Tensor | None = None,
    *,
    mask: Tensor,
    ids: Tensor,
    seeds: Tensor | None = None,
    step: int = 0,
    guidance: float = 0.0,
    softmax_temperature: float = 1.0,
    noise_temperature: float,
    rule: str = "logit",
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a code for every masked token, and score the model's confidence in it.

    With l = (logits + guidance * (logits - uncond_logits)) / softmax_temperature in float32, the
    candidate is the first argmax of l + noise_temperature * Gumbel noise. That is a draw from
    softmax(l / noise_temperature), and greedy at 0.

    A code whose logit is -inf is forbidden: its l is -inf whatever uncond_logits holds. If only
    uncond_logits is infinite the formula holds: guidance above 0 makes a finite logit +inf.

    Args:
        logits: (B, K, N) conditional logits, float32, bfloat16 or float16, K at most 2**16. Any
            strides; no copy is made where the last one is 1.
        uncond_logits: (B, K, N), same dtype and device, or None for no guidance.
        mask: (B, K) bool, True at the tokens to draw.
        ids: (B, K) int64, the tokens to keep where mask is False.
        seeds: (B,) int64, one per sample: seed, step and position alone decide the noise. May be
            None if noise is given or noise_temperature is 0.
        step: sampling step, in [0, 2**15); every step has its own noise.
        guidance: 0 means none; the customary scale w is guidance + 1. Finite, as the next two.
        softmax_temperature: above 0.
        noise_temperature: at least 0.
        rule: "logit" scores a candidate by l (TiTok), "probability" by log_softmax(l) (MaskGIT).
        noise: (B, K, N) float32 standard Gumbel values to use instead of the counter's.

    Returns:
        Candidates (B, K) int64 in [0, N), and scores (B, K) float32. Where mask is False: ids and
        +inf.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an unknown rule, a scalar out of range or
            not finite, or no source of noise. Also NaN in the noise or in the logits of a masked
            token: on a GPU, where the check waits, only under TITOK_FAST_CHECK_VALUES=1; otherwise
            NaN gives an unspecified candidate in [0, N).
    """
    op = "guided_sample"
    check_tensors(
        op,
        {"K": MAX_POSITIONS, "N": inf},
        logits=(logits, "BKN", FLOAT_TYPES),
        uncond_logits=(uncond_logits, "BKN", (logits.dtype,)),
        mask=(mask, "BK", (torch.bool,)),
        ids=(ids, "BK", INT64),
        seeds=(seeds, "B", INT64),
        noise=(noise, "BKN", (torch.float32,)),
    )
    check_sampling(op, rule, step, noise_temperature, softmax_temperature, guidance)
    if seeds is None and noise is None and noise_temperature != 0.0:
        raise ValueError(f"{op} wants seeds or noise unless noise_temperature is 0")
    looks, plain_cpu = looks_at_values(logits, ids_only=True), is_plain_cpu(logits)
    all_logits = {"logits": logits, "uncond_logits": uncond_logits}
    if looks:
        check_no_nan(op, noise=noise, **({} if plain_cpu else all_logits))
    if guidance == 0.0:
        uncond_logits = None  # half the reads, and 0 * inf would be NaN
    implementation = _guided_sample if runs_triton(logits) else guided_sample_ref
    if plain_cpu and not mask.all():
        implementation = _masked_rows
    tensors = (logits, uncond_logits, mask, ids, seeds, noise)
    scalars = (step, guidance, softmax_temperature, noise_temperature, rule)
    candidates, scores = implementation(*tensors, *scalars)
    # argmax propagates NaN, so checking scores suffices
    if looks and plain_cpu and isnan(scores.sum().item()):
        check_no_nan(op, **all_logits)
    return candidates, scores


def offline_cases() -> list[OfflineCase]:
    """4096 codes for 32 and 128 tokens, as published, and 8192 codes for 64; then other flags."""
    draws = (("counter", "logit"), ("counter", "probability"), ("none", "logit"))
    return [
        _case("L-32 B=8", dtype, 8 * 32, 4096, noise, rule)
        for dtype in FLOAT_TYPES
        for noise, rule in draws
    ] + [
        _case("S-128 B=64", torch.bfloat16, 64 * 128),
        _case("8k codes, 64 tokens B=8", torch.bfloat16, 8 * 64, 8192),
        _case("L-32 B=8", torch.bfloat16, 8 * 32, noise="given"),
        _case("L-32 B=8", torch.bfloat16, 8 * 32, guided=False),
    ]


def _case(
    name: str,
    dtype: torch.dtype,
    rows: int,
    N: int = 4096,
    noise: str = "counter",
    rule: str = "logit",
    guided: bool = True,
) -> OfflineCase:
    kind, width = TRITON_NAMES[dtype], dtype.itemsize
    noise_flops, noise_passes = {"none": (0, 0), "given": (2, 3), "counter": (46, 15)}[noise]
    flags = {"GUIDED": guided, "NOISE": noise, "PROBABILITY": rule == "probability"}
    types = {"*i1": "mask_ptr", "*i64": "ids_ptr seeds_ptr candidates_ptr", "i32": "step"}
    types |= {"fp32": "guidance inv_temperature noise_temperature"}
    types |= {f"*{kind}": "cond_ptr uncond_ptr"}
    return OfflineCase.of(
        guided_sample_kernel,
        f"{name} {kind} {noise} {rule}" + ("" if guided else " unguided"),
        types,
        flags | {"BLOCK_N": _tile(N)},
        num_warps=_WARPS,
        # temperature 1, guidance 3; two logarithms and the uniform 46
        flops=rows * N * (1.0 + 3 * guided + noise_flops),
        bytes_min=rows * ((1 + guided) * N * width + 4 * N * (noise == "given") + 21),
        # passes over (B, K, N) of the plain version: temperature 2, the rest 4, mix 8, noise
        bytes_unfused=rows * N * width * (6 + 8 * guided + noise_passes),
    )
