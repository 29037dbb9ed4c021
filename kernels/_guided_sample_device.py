"""Device code of `guided_sample`, whose design is explained in guided_sample.py."""

import triton
import triton.language as tl

from titok_fast.kernels.philox import token_gumbel


@triton.jit
def _mixed_logits(cond_ptr, uncond_ptr, valid, guidance, inv_temperature, GUIDED: tl.constexpr):
    """Guided logits over the softmax temperature; -inf where not valid."""
    l = tl.load(cond_ptr, mask=valid, other=float("-inf")).to(tl.float32)
    if GUIDED:
        mixed = l + guidance * (l - tl.load(uncond_ptr, mask=valid, other=0.0).to(tl.float32))
        # padding and forbidden codes stay -inf: -inf - -inf is NaN, a negative factor makes +inf
        l = tl.where(l == float("-inf"), l, mixed)
    return l * inv_temperature


@triton.jit(do_not_specialize=["step"])
def guided_sample_kernel(
    cond_ptr,  # (B, K, N) logits, unit stride along N
    uncond_ptr,  # the same, or anything if not GUIDED
    mask_ptr,  # (B, K) bool
    ids_ptr,  # (B, K) int64
    seeds_ptr,  # (B,) int64, read if NOISE is "counter"
    noise_ptr,  # (B, K, N) float32, read if NOISE is "given"
    candidates_ptr,  # (B, K) int64
    scores_ptr,  # (B, K) float32
    K,
    N,
    cond_stride_b,
    cond_stride_k,
    uncond_stride_b,
    uncond_stride_k,
    step,
    guidance,
    inv_temperature,
    noise_temperature,
    GUIDED: tl.constexpr,
    NOISE: tl.constexpr,
    PROBABILITY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # B * K * N may pass 2**31
    b, k = row // K, row % K
    cond_ptr += b * cond_stride_b + k * cond_stride_k
    uncond_ptr += b * uncond_stride_b + k * uncond_stride_k
    masked = tl.load(mask_ptr + row) != 0
    lanes = tl.arange(0, BLOCK_N)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    best_n = lanes
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)  # running maximum and sum of exponentials
    total = tl.zeros((BLOCK_N,), tl.float32)
    for n0 in range(0, tl.where(masked, N, 0), BLOCK_N):
        n = n0 + lanes
        l = _mixed_logits(cond_ptr + n, uncond_ptr + n, n < N, guidance, inv_temperature, GUIDED)
        noisy = l
        if NOISE == "counter":
            seed = tl.full((1,), 0, tl.int64) + tl.load(seeds_ptr + b)
            position = tl.full((1,), 0, tl.int32) + k.to(tl.int32)
            g = token_gumbel(seed, step, position, n0 // 4, BLOCK_N // 4)
            noisy += noise_temperature * tl.reshape(g, (BLOCK_N,))
        elif NOISE == "given":
            g = tl.load(noise_ptr + row * N + n, mask=n < N, other=0.0)
            noisy += noise_temperature * g
        better = noisy > best  # strict: each lane keeps its lowest code
        best = tl.where(better, noisy, best)
        best_n = tl.where(better, n, best_n)
        if PROBABILITY:
            higher = tl.maximum(top, l)
            base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is NaN
            total = total * tl.exp(top - base) + tl.exp(l - base)
            top = higher

    if masked:
        code = tl.min(tl.where(best == tl.max(best, 0), best_n, N - 1), 0)
        score = _mixed_logits(
            cond_ptr + code, uncond_ptr + code, code < N, guidance, inv_temperature, GUIDED
        )
        if PROBABILITY:
            row_top = tl.max(top, 0)
            base = tl.where(row_top == float("-inf"), 0.0, row_top)
            score -= base + tl.log(tl.sum(total * tl.exp(top - base), 0))
        tl.store(candidates_ptr + row, code.to(tl.int64))
        tl.store(scores_ptr + row, score)
    else:
        tl.store(candidates_ptr + row, tl.load(ids_ptr + row))
        tl.store(scores_ptr + row, float("inf"))
