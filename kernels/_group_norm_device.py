"""Device code of `group_norm_silu`: three kernels forward, two backward.

The design is in group_norm_silu.py. Memory is (B, P, C); a program never mixes images.
"""

import triton
import triton.language as tl


@triton.jit
def part_of_image(parts):
    """Image of this program, and its part: one grid dimension, as the others end at 65535."""
    return tl.program_id(0) // parts, tl.program_id(0) % parts


@triton.jit
def tile_at(image, pixels, end, P, chans, C: tl.constexpr):
    """Offsets of a tile, and its mask."""
    at = (image.to(tl.int64) * P + pixels[:, None]) * C + chans[None, :]
    return at, (pixels[:, None] < end) & (chans[None, :] < C)


@triton.jit
def moments_kernel(
    x_ptr,  # (B, P, C)
    r_ptr,  # (B, P, C) added to x, if ADD
    total_ptr,  # (B, P, C) the sum, if ADD
    mean_ptr,  # (B, runs, C) float32
    m2_ptr,  # (B, runs, C) float32: summed squared distances from that mean
    P,
    RUN,
    C: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, run = part_of_image(tl.cdiv(P, RUN))
    chans = tl.arange(0, BLOCK_C)
    end = tl.minimum((run + 1) * RUN, P)
    lanes = tl.arange(0, BLOCK_P)

    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    seen = 0.0
    for p0 in range(run * RUN, end, BLOCK_P):
        pixels = p0 + lanes
        at, mask = tile_at(image, pixels, end, P, chans, C)
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        if ADD:
            r = tl.load(r_ptr + at, mask=mask, other=0.0)
            # rounded before the statistics, which are those of the stored sum
            x = (x.to(tl.float32) + r.to(tl.float32)).to(x.dtype)
            tl.store(total_ptr + at, x, mask=mask)
        seen += 1.0
        delta = tl.where(mask, x.to(tl.float32) - mean, 0.0)
        mean += delta * (1.0 / seen)
        m2 += tl.where(mask, delta * (x.to(tl.float32) - mean), 0.0)

    # lanes differ in their number of pixels if the run does not fill its last tile
    count = end - run * RUN
    weight = tl.maximum((count - lanes + BLOCK_P - 1) // BLOCK_P, 0).to(tl.float32)[:, None]
    run_mean = tl.sum(mean * weight, axis=0) / count
    away = mean - run_mean[None, :]
    run_m2 = tl.sum(m2 + weight * away * away, axis=0)
    at = tl.program_id(0).to(tl.int64) * C + chans
    tl.store(mean_ptr + at, run_mean, mask=chans < C)
    tl.store(m2_ptr + at, run_m2, mask=chans < C)


@triton.jit
def merge_kernel(
    mean_ptr,  # (B, RUNS, C)
    m2_ptr,  # (B, RUNS, C)
    group_mean_ptr,  # (B, G) float32
    rstd_ptr,  # (B, G) float32
    P,
    RUN,
    RUNS,
    EPS,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    WIDTH: tl.constexpr = C // G
    image, group = part_of_image(G)
    runs = tl.arange(0, BLOCK_R)
    pixels = tl.minimum((runs + 1) * RUN, P) - runs * RUN
    weight = tl.where(runs < RUNS, pixels, 0).to(tl.float32)[:, None]
    start = (image * RUNS + runs).to(tl.int64)[:, None] * C + group * WIDTH
    total = P * 1.0 * WIDTH

    mean = 0.0
    for w0 in range(0, WIDTH, BLOCK_W):
        chans = w0 + tl.arange(0, BLOCK_W)[None, :]
        mask = (runs[:, None] < RUNS) & (chans < WIDTH)
        part = tl.load(mean_ptr + start + chans, mask=mask, other=0.0)
        mean += tl.sum(tl.sum(part * weight, axis=1), axis=0) / total
    m2 = 0.0
    for w0 in range(0, WIDTH, BLOCK_W):
        chans = w0 + tl.arange(0, BLOCK_W)[None, :]
        mask = (runs[:, None] < RUNS) & (chans < WIDTH)
        away = tl.load(mean_ptr + start + chans, mask=mask, other=0.0) - mean
        part = tl.load(m2_ptr + start + chans, mask=mask, other=0.0)
        m2 += tl.sum(tl.sum(part + tl.where(mask, weight * away * away, 0.0), axis=1), axis=0)
    tl.store(group_mean_ptr + tl.program_id(0), mean)
    tl.store(rstd_ptr + tl.program_id(0), 1.0 / tl.sqrt_rn(m2 / total + EPS))


@triton.jit
def load_norm(mean_ptr, rstd_ptr, w_ptr, b_ptr, image, chans, C: tl.constexpr, G: tl.constexpr):
    """Mean, 1/deviation, weight and bias of each channel, as float32 rows."""
    live = chans < C
    at = image * G + chans // (C // G)
    mean = tl.load(mean_ptr + at, mask=live, other=0.0)
    rstd = tl.load(rstd_ptr + at, mask=live, other=0.0)
    w = tl.load(w_ptr + chans, mask=live, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + chans, mask=live, other=0.0).to(tl.float32)
    return mean[None, :], rstd[None, :], w[None, :], b[None, :]


@triton.jit
def apply_kernel(
    x_ptr,  # (B, P, C)
    mean_ptr,  # (B, G)
    rstd_ptr,  # (B, G)
    w_ptr,  # (C,)
    b_ptr,  # (C,)
    y_ptr,  # (B, P, C)
    P,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, tile = part_of_image(tl.cdiv(P, BLOCK_P))
    pixels = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    chans = tl.arange(0, BLOCK_C)
    at, mask = tile_at(image, pixels, P, P, chans, C)
    mean, rstd, w, b = load_norm(mean_ptr, rstd_ptr, w_ptr, b_ptr, image, chans, C, G)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    h = (x - mean) * (rstd * w) + b
    y = h * tl.sigmoid(h)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_grad(x_ptr, dy_ptr, at, mask, mean, rstd, w, b):
    """Normalised x, and the gradient before SiLU, of one tile."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    normal = tl.where(mask, (x - mean) * rstd, 0.0)
    h = normal * w + b
    s = tl.sigmoid(h)
    return normal, dy * s * (1.0 + h * (1.0 - s))


@triton.jit
def grad_sums_kernel(
    x_ptr,  # (B, P, C)
    dy_ptr,  # (B, P, C)
    mean_ptr,  # (B, G)
    rstd_ptr,  # (B, G)
    w_ptr,  # (C,)
    b_ptr,  # (C,)
    sum_ptr,  # (B, runs, C) float32: sum of the gradient before SiLU
    dot_ptr,  # (B, runs, C) float32: sum of that gradient times normalised x
    P,
    RUN,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, run = part_of_image(tl.cdiv(P, RUN))
    chans = tl.arange(0, BLOCK_C)
    end = tl.minimum((run + 1) * RUN, P)
    mean, rstd, w, b = load_norm(mean_ptr, rstd_ptr, w_ptr, b_ptr, image, chans, C, G)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    dots = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for p0 in range(run * RUN, end, BLOCK_P):
        pixels = p0 + tl.arange(0, BLOCK_P)
        at, mask = tile_at(image, pixels, end, P, chans, C)
        normal, dh = load_grad(x_ptr, dy_ptr, at, mask, mean, rstd, w, b)
        sums += dh
        dots += dh * normal
    at = tl.program_id(0).to(tl.int64) * C + chans
    tl.store(sum_ptr + at, tl.sum(sums, axis=0), mask=chans < C)
    tl.store(dot_ptr + at, tl.sum(dots, axis=0), mask=chans < C)


@triton.jit
def grad_input_kernel(
    x_ptr,  # (B, P, C)
    dy_ptr,  # (B, P, C)
    mean_ptr,  # (B, G)
    rstd_ptr,  # (B, G)
    w_ptr,  # (C,)
    b_ptr,  # (C,)
    sum_ptr,  # (B, G) float32: mean over the group of the gradient of normalised x
    dot_ptr,  # (B, G) float32: mean over the group of that gradient times normalised x
    dx_ptr,  # (B, P, C)
    P,
    C: tl.constexpr,
    G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, tile = part_of_image(tl.cdiv(P, BLOCK_P))
    pixels = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    chans = tl.arange(0, BLOCK_C)
    at, mask = tile_at(image, pixels, P, P, chans, C)
    mean, rstd, w, b = load_norm(mean_ptr, rstd_ptr, w_ptr, b_ptr, image, chans, C, G)
    group = image * G + chans // (C // G)
    mean_grad = tl.load(sum_ptr + group, mask=chans < C, other=0.0)[None, :]
    mean_dot = tl.load(dot_ptr + group, mask=chans < C, other=0.0)[None, :]
    normal, dh = load_grad(x_ptr, dy_ptr, at, mask, mean, rstd, w, b)
    dx = rstd * (dh * w - mean_grad - normal * mean_dot)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
