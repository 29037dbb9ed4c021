"""Nearest codes with the losses, gradients and code counts that training needs.

R latent rows, N codes, C channels, as in `nearest_code`.

Design. The search of `nearest_code` leaves its packed minima. In one more kernel a warp takes 16
rows, 64 channels at a time: it gathers the nearest codes, forms the straight-through output and the
squared error per row, and counts usage with integer atomics, so outputs repeat bit for bit.
Why. PyTorch needs some twelve passes over (R, C) for it, and a (R, N) one-hot matrix for usage.
Floor. Reads z and the chosen codes once, writes (R, C) float32: memory-bound. 16384 rows of 64
channels need 6.4 us of an A100's bandwidth, of which about 60 % are expected, as a warp waits for
its gathers; fewer or narrower rows need less than a launch. The backward is plain PyTorch: five
passes and one `index_add_`, whose order `torch.use_deterministic_algorithms` fixes.
Definition: arXiv:2406.07550 section 3, losses as in arXiv:1711.00937 equation 3.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from titok_fast.kernels._launch import lazy_triton_op, runs_triton, without_autocast
from titok_fast.kernels._offline import OfflineCase
from titok_fast.kernels._values import check_finite, looks_at_values
from titok_fast.kernels.nearest_code import (
    EPS,
    check_codes,
    load_tile,
    measure,
    nearest_code_ref,
    plan_search,
    search_codes,
    unit_rows,
)

_WARPS = 1  # few rows to a program: a warp then reads four channels at a time


class CodeStats(NamedTuple):
    """Result of `nearest_code_stats`, which describes the fields."""

    ids: Tensor
    quantized: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    counts: Tensor


def count_codes(ids: Tensor, N: int) -> Tensor:
    """(N,) int64: how often each code occurs in ids. Unlike bincount it never waits for a GPU."""
    ids = ids.flatten()
    return torch.zeros(N, dtype=torch.int64, device=ids.device).scatter_add(
        0, ids, torch.ones_like(ids)
    )


def nearest_code_stats_ref(
    z: Tensor, codebook: Tensor, metric: str = "euclidean", beta: float = 0.25
) -> CodeStats:
    """Reference of `nearest_code_stats`, with gradients by autograd."""
    ids = nearest_code_ref(z.flatten(0, -2), codebook, metric).view(z.shape[:-1])
    with without_autocast(z):
        f, q = unit_rows(z, metric), unit_rows(F.embedding(ids, codebook), metric)
        # in the order of the published code, which is the order of autograd's sum for f
        commitment, codebook_loss = beta * F.mse_loss(f, q.detach()), F.mse_loss(q, f.detach())
        straight = f + (q - f).detach()
        counts = count_codes(ids, codebook.shape[0])
    return CodeStats(ids, straight, commitment, codebook_loss, counts)


@triton.jit
def _finish_kernel(
    keys_ptr,  # (R, SPLITS) int64: SPLITS is a power of two
    z_ptr,  # (R, C)
    e_ptr,  # (N, C)
    ids_ptr,  # (R,) int64
    quantized_ptr,  # (R, C) float32
    error_ptr,  # (R,) float32
    counts_ptr,  # (N,) int64, zeros
    R,
    N,
    EPS,
    SPLITS: tl.constexpr,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < R
    at = rows[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    keys = tl.load(keys_ptr + at, mask=live[:, None], other=0)
    k = tl.min(keys, axis=1) & 0xFFFFFFFF
    tl.store(ids_ptr + rows, k, mask=live)
    tl.atomic_add(counts_ptr + k, tl.full((BLOCK_R,), 1, tl.int64), mask=live, sem="relaxed")
    z_length, _ = measure(z_ptr, rows, R, EPS, C, UNIT, BLOCK_C)
    e_length, _ = measure(e_ptr, k, N, EPS, C, UNIT, BLOCK_C)
    error = tl.zeros((BLOCK_R,), tl.float32)
    for c0 in range(0, C, BLOCK_C):
        z = load_tile(z_ptr, rows, R, c0, z_length, C, UNIT, BLOCK_C)
        e = load_tile(e_ptr, k, N, c0, e_length, C, UNIT, BLOCK_C)
        chans = c0 + tl.arange(0, BLOCK_C)
        o_mask = live[:, None] & (chans[None, :] < C)
        out = quantized_ptr + rows[:, None] * C + chans[None, :]
        tl.store(out, z + (e - z), mask=o_mask)  # the straight-through sum, rounding included
        error += tl.sum(tl.where(o_mask, (e - z) * (e - z), 0.0), axis=1)
    tl.store(error_ptr + rows, error, mask=live)


def _finish_tile(C: int) -> dict[str, int]:
    return {"BLOCK_R": 16, "BLOCK_C": min(64, max(16, triton.next_power_of_2(C)))}


def _through_length(grad: Tensor, x: Tensor, metric: str) -> Tensor:
    """Gradient of x from `grad`, that of `unit_rows(x, metric)`."""
    if metric == "euclidean":
        return grad
    length = x.norm(dim=-1, keepdim=True)
    unit = x / length.clamp_min(EPS)
    # a length below the bound is a constant without gradient
    radial = torch.where(length < EPS, 0.0, (grad * unit).sum(-1, keepdim=True))
    return (grad - radial * unit) / length.clamp_min(EPS)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, codebook, metric, beta = inputs
    ids, counts = output[0], output[4]
    ctx.save_for_backward(z, codebook, ids)
    ctx.mark_non_differentiable(ids, counts)
    ctx.metric, ctx.beta = metric, beta


def _backward(ctx: Any, *grads: Tensor) -> tuple:
    """Straight through to z; the codebook gets an index_add_."""
    z, codebook, ids = ctx.saved_tensors
    _, g_quantized, g_commitment, g_codebook, _ = grads
    f, q = z.float(), codebook[ids].float()
    unit_f, unit_q, factor = unit_rows(f, ctx.metric), unit_rows(q, ctx.metric), 2 / z.numel()
    # each loss treats the other side as a constant, in second derivatives too
    to_z, to_code = (unit_f - unit_q.detach()) * factor, (unit_q - unit_f.detach()) * factor
    g_z = _through_length(g_quantized + ctx.beta * g_commitment * to_z, f, ctx.metric)
    g_q = _through_length(g_codebook * to_code, q, ctx.metric)
    g_e = torch.zeros_like(codebook, dtype=torch.float32).index_add_(0, ids, g_q)
    return g_z.to(z.dtype), g_e.to(codebook.dtype), None, None


@lazy_triton_op("nearest_code_stats", _save, _backward)
def _nearest_code_stats(
    z: Tensor, codebook: Tensor, metric: str, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z, codebook, unit = z.contiguous(), codebook.contiguous(), metric == "cosine"
    (R, C), N = z.shape, codebook.shape[0]
    found = search_codes(z, codebook, unit, packed=True)
    splits = found.shape[1]
    ids = torch.empty(R, dtype=torch.int64, device=z.device)
    quantized = torch.empty(R, C, dtype=torch.float32, device=z.device)
    error = torch.empty(R, dtype=torch.float32, device=z.device)
    counts = torch.zeros(N, dtype=torch.int64, device=z.device)
    args = (found, z, codebook, ids, quantized, error, counts, R, N, EPS, splits, C, unit)
    tile = _finish_tile(C)
    grid = (triton.cdiv(R, tile["BLOCK_R"]),)
    wrap_triton(_finish_kernel)[grid](*args, **tile, num_warps=_WARPS, num_stages=1)
    mean = error.sum() / (R * C)
    return ids, quantized, mean * beta, mean * 1.0, counts


def nearest_code_stats(
    z: Tensor, codebook: Tensor, *, metric: str = "euclidean", beta: float = 0.25
) -> CodeStats:
    """Nearest code of each latent with the losses and counts of training, in one pass.

    Let f be the latents and q their nearest codes, both of unit length if the metric is cosine.

    Args:
        z: (R, C) latents as for `nearest_code`, or (B, H, W, C) or any other shape before C.
        codebook: (N, C), as for `nearest_code`.
        metric: "euclidean" or "cosine".
        beta: weight of the commitment loss, 0.25 in the published models; finite, at least 0.

    Returns:
        ids: (R,) int64 in [0, N), no gradient; shaped as z before C.
        quantized: shape of z in float32, f + (q - f); its gradient goes straight through to f.
        commitment_loss: scalar float32, beta * mean((q - f)^2), gradient to z only.
        codebook_loss: scalar float32, mean((q - f)^2), gradient to the codebook only. Rows are
            summed with `index_add_`: `torch.use_deterministic_algorithms` fixes their order.
        counts: (N,) int64, rows per code, no gradient.

    Raises:
        ValueError: shapes, dtypes, devices, metric or beta are none of the above. Under
            TITOK_FAST_CHECK_VALUES=1 also values that are not finite; otherwise they reach the
            losses, where a training loop checks for them.
    """
    rows = z.flatten(0, -2) if z.ndim > 2 else z
    check_codes("nearest_code_stats", rows, codebook, metric)
    if not 0 <= beta < math.inf:
        raise ValueError(f"nearest_code_stats wants a finite beta of at least 0; got {beta}")
    if looks_at_values(z, ids_only=False):
        check_finite("nearest_code_stats", z=z, codebook=codebook)
    if not runs_triton(z) or not len(rows):
        return nearest_code_stats_ref(z, codebook, metric, beta)
    ids, quantized, *sums = _nearest_code_stats(rows, codebook, metric, beta)
    return CodeStats(ids.view(z.shape[:-1]), quantized.view(z.shape), *sums)


def offline_cases() -> list[OfflineCase]:
    """The second kernel at published batches; the search itself is listed by `nearest_code`."""
    return [
        _finish_case("L-32 B=32", 1024, 4096, 12, True),
        _finish_case("L-32 B=256", 8192, 4096, 12, True),
        _finish_case("SL-256 B=64", 16384, 8192, 64, False),
    ]


def _finish_case(name: str, R: int, N: int, C: int, unit: bool) -> OfflineCase:
    _, splits = plan_search(R, N, C)
    return OfflineCase.of(
        _finish_kernel,
        name,
        {"*i64": "keys_ptr ids_ptr counts_ptr", "fp32": "EPS"},
        {"SPLITS": splits, "C": C, "UNIT": unit} | _finish_tile(C),
        num_warps=_WARPS,
        flops=8.0 * R * C,
        bytes_min=R * (8 * splits + 12 * C + 12) + 8 * N,
        # gather, two normalisations, two subtractions, a sum, two squared means, the histogram
        bytes_unfused=R * (8 * splits + 4 * C * 14 + 16) + 8 * N,
    )
