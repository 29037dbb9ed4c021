"""Nearest codebook entry of each latent: the quantisation step of TiTok.

R latent rows (images x tokens), N codes, C channels: 12 or 64 in TiTok, 256 in its pixel tokenizer.

Design. A program holds BLOCK_R rows and walks over BLOCK_N codes at a time; the distances of a tile
live in registers, each element keeps its own best, and lanes are compared once, at the end. With
few rows SPLITS programs share the codebook and leave (distance, index) packed in an int64, whose
minimum is the nearest code and, on a tie, the lowest index.
Why. The (R, N) matrix of distances, 16 KiB per row at N = 4096, never reaches memory.
Floor. IEEE float32 multiply-adds, 2 R N C of them on the CUDA cores: TF32 would change ids.
C = 12 is padded to 16 and three instructions per distance keep the best, so about half of the
FP32 peak is the most to expect; the step is below 0.1 % of an encoder.
Definition: arXiv:2406.07550 section 3, with the unit-length codes of arXiv:2110.04627.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from titok_fast.kernels._launch import is_plain_cpu, lazy_triton_op, runs_triton, without_autocast
from titok_fast.kernels._offline import OfflineCase
from titok_fast.kernels._values import (
    FLOAT_TYPES,
    TRITON_NAMES,
    check_finite,
    check_tensors,
    looks_at_values,
)

METRICS = ("euclidean", "cosine")
MAX_CHANNELS = 256
MAX_CODES = 1 << 18
EPS = 1e-12  # lower bound of a row's length, as in F.normalize
# distances per chunk of the reference: 2 MiB stay in a CPU's cache; on a GPU, and where the
# compiler unrolls the loop, fewer chunks are faster
_CHUNK_ELEMENTS = {"cpu": 1 << 19, "other": 1 << 22}
# up to so many channels a BLAS sums in registers: adding to the output then rounds only once
_PANEL = 128
_PROGRAMS = 256  # two for each SM of the largest chip: enough to fill one


def unit_rows(x: Tensor, metric: str) -> Tensor:
    """(R, C) in float32 or wider, with unit rows for the cosine metric."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(x, dim=-1, eps=EPS) if metric == "cosine" else x


def nearest_code_ref(z: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    """Reference of `nearest_code`, with the published arithmetic, in chunks of rows.

    The rounding of |f|^2 + |e|^2 - 2 f.e in float32 decides between close codes, so the terms are
    added in this order. On CUDA `torch.backends.cuda.matmul.allow_tf32` must be off.
    """
    eager_cpu = is_plain_cpu(z)
    with without_autocast(z):
        f, e = unit_rows(z.detach(), metric), unit_rows(codebook.detach(), metric)
        f_sq, e_sq = f.square().sum(dim=1, keepdim=True), e.square().sum(dim=1)
        step = max(16, _CHUNK_ELEMENTS["cpu" if eager_cpu else "other"] // len(e))
        # one pair of buffers: on a CPU touching fresh memory costs more than the matmuls
        room = f.new_empty((2, step, len(e))) if eager_cpu and len(f) > step else None
        ids = []
        for part, part_sq in zip(f.split(step), f_sq.split(step), strict=True):
            sums, dots = (None, None) if room is None else room[:, : len(part)]
            sums = torch.add(part_sq, e_sq, out=sums)
            if eager_cpu and z.shape[1] <= _PANEL:
                sums.addmm_(part, e.T, alpha=-2)
            else:
                sums.sub_(torch.mm(part, e.T, out=dots), alpha=2)
            ids.append(sums.argmin(1))
        return torch.cat(ids)


@triton.jit
def load_tile(x_ptr, rows, R, c0, length, C: tl.constexpr, UNIT: tl.constexpr, BC: tl.constexpr):
    """Channels c0.. of some rows of an (R, C) matrix in float32, divided by `length` if UNIT."""
    chans = c0 + tl.arange(0, BC)
    mask = (rows[:, None] < R) & (chans[None, :] < C)
    x = tl.load(x_ptr + rows[:, None] * C + chans[None, :], mask=mask, other=0.0).to(tl.float32)
    if UNIT:
        # rounded division, as in the reference: a reciprocal would move the last bit
        x = tl.div_rn(x, tl.broadcast_to(length[:, None], x.shape))
    return x


@triton.jit
def measure(x_ptr, rows, R, EPS, C: tl.constexpr, UNIT: tl.constexpr, BC: tl.constexpr):
    """Length of each row, and the sum of squares of the row as `load_tile` will return it."""
    sq = tl.zeros(rows.shape, tl.float32)
    for c0 in range(0, C, BC):
        x = load_tile(x_ptr, rows, R, c0, sq, C, False, BC)
        sq += tl.sum(x * x, axis=1)
    length = tl.maximum(tl.sqrt_rn(sq), EPS)
    if UNIT:
        sq = tl.zeros(rows.shape, tl.float32)
        for c0 in range(0, C, BC):
            x = load_tile(x_ptr, rows, R, c0, length, C, True, BC)
            sq += tl.sum(x * x, axis=1)
    return length, sq


@triton.jit
def _search_kernel(
    z_ptr,  # (R, C)
    e_ptr,  # (N, C)
    out_ptr,  # (R,) int64 indices if DIRECT, else (R, SPLITS) int64 packed (distance, index)
    R,
    N,
    EPS,
    SPLITS,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # int64 before the multiply: R * C may pass 2**31 when a whole data set is tokenised
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    z_length, z_sq = measure(z_ptr, rows, R, EPS, C, UNIT, BLOCK_C)

    best = tl.full((BLOCK_R, BLOCK_N), float("inf"), tl.float32)
    best_tile = tl.full((BLOCK_R, BLOCK_N), split, tl.int32)
    for tile in range(split, tl.cdiv(N, BLOCK_N), SPLITS):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        e_length, e_sq = measure(e_ptr, n, N, EPS, C, UNIT, BLOCK_C)
        dot = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for c0 in range(0, C, BLOCK_C):
            z = load_tile(z_ptr, rows, R, c0, z_length, C, UNIT, BLOCK_C)
            e = load_tile(e_ptr, n, N, c0, e_length, C, UNIT, BLOCK_C)
            # ieee: TF32 keeps 10 mantissa bits and would change ids
            dot = tl.dot(z, tl.trans(e), dot, input_precision="ieee")
        dist = (z_sq[:, None] + e_sq[None, :]) - 2 * dot
        # strict, so the lowest tile wins a tie; a NaN never wins
        better = (dist < best) & (n[None, :] < N)
        best = tl.where(better, dist, best)
        best_tile = tl.where(better, tile, best_tile)

    # float32 bits as an integer of the same order, above the index: one minimum does both
    bits = best.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index = best_tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    key = tl.min((bits.to(tl.int64) << 32) | index.to(tl.int64), axis=1)
    if DIRECT:
        tl.store(out_ptr + rows, key & 0xFFFFFFFF, mask=rows < R)
    else:
        tl.store(out_ptr + rows * SPLITS + split, key, mask=rows < R)


def plan_search(R: int, N: int, C: int) -> tuple[dict[str, int], int]:
    """Tile sizes and warps, and the number of programs that share the codebook."""
    rows, codes = (16, 64) if R <= 2048 else (64, 64)
    blocks, tiles = triton.cdiv(R, rows), triton.cdiv(N, codes)
    splits = 1
    while 2 * splits * blocks <= _PROGRAMS and 2 * splits <= tiles:
        splits *= 2  # powers of two: few variants of the kernel that takes the minimum
    # tl.dot wants at least 16 along C; more than 32 of a wide code overflow the registers,
    # as do more than 16 in the small tile on sm_90
    channels = 16 if rows == 16 else min(32, max(16, triton.next_power_of_2(C)))
    # with 4 warps both operands of a 64x64 tile take all 255 registers; with 8 a small tile of wide
    # codes gets 64 registers and spills
    warps = 4 if rows == 16 and C > 128 else 8
    tile = {"BLOCK_R": rows, "BLOCK_N": codes, "BLOCK_C": channels, "num_warps": warps}
    return tile, splits


def search_codes(z: Tensor, codebook: Tensor, unit: bool, packed: bool) -> Tensor:
    """(R,) indices, or (R, splits) packed pairs if `packed` or if the codebook is shared."""
    (R, C), N = z.shape, codebook.shape[0]
    plan, splits = plan_search(R, N, C)
    direct = splits == 1 and not packed
    out = torch.empty((R,) if direct else (R, splits), dtype=torch.int64, device=z.device)
    args = (z, codebook, out, R, N, EPS, splits, C, unit, direct)
    grid = (triton.cdiv(R, plan["BLOCK_R"]), splits)
    wrap_triton(_search_kernel)[grid](*args, **plan, num_stages=1)
    return out


@lazy_triton_op("nearest_code")
def _nearest_code(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    unit = metric == "cosine"
    found = search_codes(z.contiguous(), codebook.contiguous(), unit, packed=False)
    return found if found.ndim == 1 else found.min(dim=1).values & 0xFFFFFFFF


def check_codes(op: str, z: Tensor, codebook: Tensor, metric: str) -> None:
    """Raise the ValueError of `nearest_code` unless its conditions hold."""
    limits = {"C": MAX_CHANNELS, "N": MAX_CODES}
    check_tensors(op, limits, z=(z, "RC", FLOAT_TYPES), codebook=(codebook, "NC", FLOAT_TYPES))
    if metric not in METRICS:
        raise ValueError(f"{op} wants metric to be one of {METRICS}; got {metric!r}")


def find_codes(z: Tensor, codebook: Tensor, metric: str, *, ids_only: bool) -> Tensor:
    """`nearest_code`; with `ids_only` off NaN passes, as it shows in the caller's codes or loss."""
    check_codes("nearest_code", z, codebook, metric)
    if looks_at_values(z, ids_only=ids_only):
        check_finite("nearest_code", z=z)
    if looks_at_values(z, ids_only=False):  # weights do not change between calls
        check_finite("nearest_code", codebook=codebook)
    if runs_triton(z) and len(z):
        return _nearest_code(z.detach(), codebook.detach(), metric)
    return nearest_code_ref(z, codebook, metric)


def nearest_code(z: Tensor, codebook: Tensor, *, metric: str = "euclidean") -> Tensor:
    """Index of the codebook row nearest to each latent; the lowest index wins a tie.

    Distances are IEEE float32 whatever the input dtype, and autocast is ignored.

    Args:
        z: (R, C) latents, float32, bfloat16 or float16, finite; C up to 256. R may be 0.
        codebook: (N, C), same device, one of the same dtypes; N up to 2**18.
        metric: "euclidean", or "cosine": both sides are first divided by max(length, 1e-12).

    Returns:
        (R,) int64 in [0, N), without gradient.

    Raises:
        ValueError: shapes, dtypes, devices or metric are none of the above. Also latents that are
            not finite: on a GPU, where the check waits, only under TITOK_FAST_CHECK_VALUES=1, which
            also checks the codebook. Otherwise the row gets some valid index.
    """
    return find_codes(z, codebook, metric, ids_only=True)


def offline_cases() -> list[OfflineCase]:
    """The published tokenizers, that of pixels too, and codes as wide as the VAE's latents."""
    full, half = torch.float32, torch.bfloat16
    cases = [
        _case(*shape, dtype)
        for shape in (
            ("L-32 B=1", 32, 4096, 12, True),
            ("L-32 B=256", 8192, 4096, 12, True),
            ("SL-256 B=1", 256, 8192, 64, False),
            ("SL-256 B=64", 16384, 8192, 64, False),
            ("pixels B=1", 256, 1024, 256, False),
            ("pixels B=64", 16384, 1024, 256, False),
            ("C=16 B=256", 8192, 4096, 16, True),
        )
        for dtype in (full, half)
    ]
    # a codebook that was cast with its model
    return [*cases, _case("SL-256 B=64 table", 16384, 8192, 64, False, half, table=half)]


def _case(
    name: str,
    R: int,
    N: int,
    C: int,
    unit: bool,
    z: torch.dtype,
    table: torch.dtype = torch.float32,
) -> OfflineCase:
    (tile, splits), kind = plan_search(R, N, C), TRITON_NAMES[z]
    warps, table_bytes = tile.pop("num_warps"), table.itemsize * N * C
    types = {f"*{kind}": "z_ptr e_ptr" if table == z else "z_ptr"}
    return OfflineCase.of(
        _search_kernel,
        f"{name} {kind} {tile['BLOCK_R']}x{tile['BLOCK_N']} split {splits}",
        types | {"*i64": "out_ptr", "fp32": "EPS", "i32": "SPLITS"},
        {"C": C, "UNIT": unit, "DIRECT": splits == 1} | tile,
        num_warps=warps,
        flops=2.0 * R * N * C,
        bytes_min=R * (C * z.itemsize + 8) + table_bytes,
        # rows to float32 and to unit length, then over (R, N): sum, matmul, subtract, argmin
        bytes_unfused=R * (C * (z.itemsize + 16)) + table_bytes + 12 * N * C + 4 * R * N * 6,
    )
