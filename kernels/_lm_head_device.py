"""Device code of `lm_head_sample`: a draw from every tile of BLOCK_N codes, then a pick of one."""

import triton
import triton.language as tl

from titok_fast.kernels.philox import token_gumbel


@triton.jit(do_not_specialize=["M", "R", "step"])
def head_kernel(
    hidden_ptr,  # (M, D), unit stride along D
    uncond_ptr,  # (M, D), read if GUIDED
    weight_ptr,  # (N, D)
    bias_ptr,  # (N,), read if BIASED
    rows_ptr,  # (R,) int64 in [0, M), read if GATHERED; a row outside reads as zeros
    seeds_ptr,  # (R,) int64, read if NOISY
    positions_ptr,  # (R,) int64, read if NOISY
    parts_ptr,  # (4, R, tiles) float32: best noisy logit, its logit, maximum, sum of exponentials
    codes_ptr,  # (R, tiles) int32: best code of the tile
    M,
    R,
    N,
    D,
    hidden_stride,
    uncond_stride,
    weight_stride,
    step,
    guidance,
    inv_temperature,
    noise_temperature,
    GUIDED: tl.constexpr,
    BIASED: tl.constexpr,
    GATHERED: tl.constexpr,
    NOISY: tl.constexpr,
    PROBABILITY: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile, tiles = tl.program_id(1), tl.num_programs(1)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(rows_ptr + r, mask=r < R, other=M) if GATHERED else r.to(tl.int64)
    row_valid, n_valid = (row >= 0) & (row < M), n < N

    d = tl.arange(0, BLOCK_D)
    a_ptrs = hidden_ptr + row[:, None] * hidden_stride + d[None, :]
    u_ptrs = uncond_ptr + row[:, None] * uncond_stride + d[None, :]
    w_ptrs = weight_ptr + n.to(tl.int64)[None, :] * weight_stride + d[:, None]
    l = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)  # (guided hidden) @ weight.T
    for d0 in range(0, D, BLOCK_D):
        a_valid, w_valid = row_valid[:, None], n_valid[None, :]
        if not EVEN_D:
            a_valid &= d0 + d[None, :] < D
            w_valid &= d0 + d[:, None] < D
        a = tl.load(a_ptrs + d0, mask=a_valid, other=0.0)
        w = tl.load(w_ptrs + d0, mask=w_valid, other=0.0)
        if GUIDED:
            u = tl.load(u_ptrs + d0, mask=a_valid, other=0.0)
            a32 = a.to(tl.float32)
            a = (a32 + guidance * (a32 - u.to(tl.float32))).to(w.dtype)
        # ieee matters for float32 alone: TF32 would change ids
        l = tl.dot(a, w, l, input_precision="ieee")

    if BIASED:
        l += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    l = tl.where(n[None, :] < N, l * inv_temperature, float("-inf"))
    noisy = l
    if NOISY:
        seeds = tl.load(seeds_ptr + r, mask=r < R, other=0)
        positions = tl.load(positions_ptr + r, mask=r < R, other=0).to(tl.int32)
        g = token_gumbel(seeds, step, positions, tile * (BLOCK_N // 4), BLOCK_N // 4)
        noisy += noise_temperature * g
    best = tl.max(noisy, axis=1)
    code = tl.min(tl.where(noisy == best[:, None], n[None, :], N - 1), axis=1)
    score = tl.sum(tl.where(n[None, :] == code[:, None], l, 0.0), axis=1)
    at = r.to(tl.int64) * tiles + tile
    plane = R.to(tl.int64) * tiles
    tl.store(codes_ptr + at, code, mask=r < R)
    tl.store(parts_ptr + at, best, mask=r < R)
    tl.store(parts_ptr + plane + at, score, mask=r < R)
    if PROBABILITY:
        top = tl.max(l, axis=1)
        base = tl.where(top == float("-inf"), 0.0, top)  # -inf - -inf is NaN
        total = tl.sum(tl.exp(l - base[:, None]), axis=1)
        tl.store(parts_ptr + 2 * plane + at, top, mask=r < R)
        tl.store(parts_ptr + 3 * plane + at, total, mask=r < R)


@triton.jit(do_not_specialize=["R"])
def pick_kernel(
    parts_ptr,  # (4, R, tiles) float32, as above
    codes_ptr,  # (R, tiles) int32
    candidates_ptr,  # (R,) int64
    scores_ptr,  # (R,) float32
    R,
    N,
    tiles,
    PROBABILITY: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    at = row * tiles + t
    plane = R.to(tl.int64) * tiles
    best = tl.load(parts_ptr + at, mask=t < tiles, other=float("-inf"))
    codes = tl.load(codes_ptr + at, mask=t < tiles, other=N)
    l = tl.load(parts_ptr + plane + at, mask=t < tiles, other=0.0)
    # tiles hold disjoint codes, so the lowest of equal codes belongs to one tile
    code = tl.min(tl.where(best == tl.max(best, 0), codes, N - 1), 0)
    score = tl.sum(tl.where(codes == code, l, 0.0), 0)
    if PROBABILITY:
        top = tl.load(parts_ptr + 2 * plane + at, mask=t < tiles, other=float("-inf"))
        total = tl.load(parts_ptr + 3 * plane + at, mask=t < tiles, other=0.0)
        highest = tl.max(top, 0)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        score -= base + tl.log(tl.sum(total * tl.exp(top - base), 0))
    tl.store(candidates_ptr + row, code.to(tl.int64))
    tl.store(scores_ptr + row, score)
