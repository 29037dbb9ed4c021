"""Nearest codebook entry of each latent: the quantisation step of TiTok.

N latent rows (images x tokens), K codes, C channels: 12 or 64 in TiTok, 256 in its pixel tokenizer.

Design. A program holds BLOCK_N rows and walks over BLOCK_K codes at a time; the distances of a tile
live in registers, where each element keeps its own best, so lanes talk to each other once, at the
end. Few rows: SPLITS programs share the codebook and leave (distance, index) packed in an int64,
whose minimum is the nearest code and, on a tie, the lowest index.
Why. The (N, K) matrix of distances, 16 KiB per row at K = 4096, never reaches memory.
Floor. IEEE float32 multiply-adds, 2 N K C of them on the CUDA cores: TF32 would flip close rivals.
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

from titok_fast.kernels._launch import (
    is_plain_cpu,
    lazy_triton_op,
    runs_triton,
    without_autocast,
)
from titok_fast.kernels._offline import OfflineCase
from titok_fast.kernels._values import check_finite, looks_at_values

METRICS = ("euclidean", "cosine")
MAX_CHANNELS = 256
MAX_CODES = 1 << 18
EPS = 1e-12  # lower bound of a row's length, as in F.normalize
# distances held at once by the reference: 2 MiB stay in a CPU's cache; elsewhere, and where the
# compiler unrolls the loop, few chunks matter more
_CHUNK_ELEMENTS = {"cpu": 1 << 19, "other": 1 << 22}
# so many channels a BLAS sums in registers before it adds them to what is there: one rounding, the
# same as that of a sum apart
_PANEL = 128
_PROGRAMS = 256  # two for each SM of the largest chip: enough to fill one


def unit_rows(x: Tensor, metric: str) -> Tensor:
    """(R, C) in float32 or wider, with unit rows for the cosine metric."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(x, dim=-1, eps=EPS) if metric == "cosine" else x


def nearest_code_ref(z: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    """What the kernel must compute: (N, C), (K, C) -> (N,) int64, with the published arithmetic.

    The distance is formed as |f|^2 + |e|^2 - 2 f.e in float32 and its rounding decides between
    close rivals, so the terms are added in this order. Rows are taken in chunks: no (N, K) matrix.
    On CUDA the product follows `torch.backends.cuda.matmul.allow_tf32`, which must be off.
    """
    eager_cpu = is_plain_cpu(z)
    with without_autocast(z):
        f, e = unit_rows(z.detach(), metric), unit_rows(codebook.detach(), metric)
        f_sq, e_sq = f.square().sum(dim=1, keepdim=True), e.square().sum(dim=1)
        step = max(16, _CHUNK_ELEMENTS["cpu" if eager_cpu else "other"] // len(e))
        # one pair of buffers: fresh pages for each chunk cost a CPU more than its products
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
    z_ptr,  # (N, C)
    e_ptr,  # (K, C)
    out_ptr,  # (N,) int64 indices if DIRECT, else (N, SPLITS) int64 packed (distance, index)
    N,
    K,
    EPS,
    SPLITS,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # int64 before the multiply: N * C may pass 2**31 when a whole data set is tokenised
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    z_length, z_sq = measure(z_ptr, rows, N, EPS, C, UNIT, BLOCK_C)

    best = tl.full((BLOCK_N, BLOCK_K), float("inf"), tl.float32)
    best_tile = tl.full((BLOCK_N, BLOCK_K), split, tl.int32)
    for tile in range(split, tl.cdiv(K, BLOCK_K), SPLITS):
        ks = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        e_length, e_sq = measure(e_ptr, ks, K, EPS, C, UNIT, BLOCK_C)
        dot = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for c0 in range(0, C, BLOCK_C):
            z = load_tile(z_ptr, rows, N, c0, z_length, C, UNIT, BLOCK_C)
            e = load_tile(e_ptr, ks, K, c0, e_length, C, UNIT, BLOCK_C)
            # ieee: TF32 keeps 10 mantissa bits and picks another code for close rivals
            dot = tl.dot(z, tl.trans(e), dot, input_precision="ieee")
        dist = (z_sq[:, None] + e_sq[None, :]) - 2 * dot
        # strict, so the lowest tile wins a tie; a NaN never wins
        better = (dist < best) & (ks[None, :] < K)
        best = tl.where(better, dist, best)
        best_tile = tl.where(better, tile, best_tile)

    # float32 bits to an integer of the same order, then the index below it: one minimum does both
    bits = best.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index = best_tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    key = tl.min((bits.to(tl.int64) << 32) | index.to(tl.int64), axis=1)
    if DIRECT:
        tl.store(out_ptr + rows, key & 0xFFFFFFFF, mask=rows < N)
    else:
        tl.store(out_ptr + rows * SPLITS + split, key, mask=rows < N)


def plan_search(N: int, K: int, C: int) -> dict[str, int]:
    """Tile sizes, warps, and the number of programs that share the codebook."""
    rows, codes = (16, 64) if N <= 2048 else (64, 64)
    blocks, tiles = triton.cdiv(N, rows), triton.cdiv(K, codes)
    splits = 1
    while 2 * splits * blocks <= _PROGRAMS and 2 * splits <= tiles:
        splits *= 2  # powers of two: few variants of the kernel that takes the minimum
    # tl.dot wants at least 16 along C; more than 32 of a wide code overflow the registers,
    # as do more than 16 in the small tile on sm_90
    channels = 16 if rows == 16 else min(32, max(16, triton.next_power_of_2(C)))
    # with 4, both operands of a 64x64 tile take all 255 registers; with 8, the assembler gives a
    # small tile of wide codes 64 registers and spills
    warps = 4 if rows == 16 and C > 128 else 8
    return {"splits": splits, "rows": rows, "codes": codes, "channels": channels, "warps": warps}


def search_codes(z: Tensor, codebook: Tensor, unit: bool, packed: bool) -> Tensor:
    """(N,) indices, or (N, splits) packed pairs if asked for or if the codebook is shared."""
    (N, C), K = z.shape, codebook.shape[0]
    plan = plan_search(N, K, C)
    splits = plan["splits"]
    direct = splits == 1 and not packed
    out = torch.empty((N,) if direct else (N, splits), dtype=torch.int64, device=z.device)
    grid = (triton.cdiv(N, plan["rows"]), splits)
    tile = {"BLOCK_N": plan["rows"], "BLOCK_K": plan["codes"], "BLOCK_C": plan["channels"]}
    args = (z, codebook, out, N, K, EPS, splits, C, unit, direct)
    wrap_triton(_search_kernel)[grid](*args, **tile, num_warps=plan["warps"], num_stages=1)
    return out


@lazy_triton_op("nearest_code")
def _nearest_code(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    unit = metric == "cosine"
    found = search_codes(z.contiguous(), codebook.contiguous(), unit, packed=False)
    return found if found.ndim == 1 else found.min(dim=1).values & 0xFFFFFFFF


def check_codes(op: str, z: Tensor, codebook: Tensor, metric: str) -> None:
    """Raise the ValueError of `nearest_code` unless its conditions hold."""
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1]:
        got = f"{tuple(z.shape)} and {tuple(codebook.shape)}"
        raise ValueError(f"{op} wants z (N, C) and codebook (K, C); got {got}")
    K, C = codebook.shape
    if not 1 <= C <= MAX_CHANNELS or not 1 <= K <= MAX_CODES:
        raise ValueError(
            f"{op} wants 1 to {MAX_CHANNELS} channels and 1 to {MAX_CODES} codes; got {C} and {K}"
        )
    for name, x in (("z", z), ("codebook", codebook)):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{op} wants {name} in float32, bfloat16 or float16; got {x.dtype}")
    if z.device != codebook.device:
        raise ValueError(
            f"{op} wants one device; z is on {z.device}, codebook on {codebook.device}: move one"
        )
    if metric not in METRICS:
        raise ValueError(f"{op} wants metric to be one of {METRICS}; got {metric!r}")


def find_codes(z: Tensor, codebook: Tensor, metric: str, *, ids_only: bool) -> Tensor:
    """`nearest_code` for callers that tell whether ids are all that comes of it.

    Where codes or losses come of it as well, a NaN shows in them, and the search takes it: in
    training the loop is to meet it. `ids_only` is that of `looks_at_values`.
    """
    check_codes("nearest_code", z, codebook, metric)
    if looks_at_values(z, ids_only=ids_only):
        check_finite("nearest_code", z=z)
    if looks_at_values(z, ids_only=False):  # weights: as good at every call as at the first
        check_finite("nearest_code", codebook=codebook)
    if runs_triton(z) and len(z):
        return _nearest_code(z.detach(), codebook.detach(), metric)
    return nearest_code_ref(z, codebook, metric)


def nearest_code(z: Tensor, codebook: Tensor, *, metric: str = "euclidean") -> Tensor:
    """Index of the codebook row nearest to each latent; the lowest index wins a tie.

    Distances are float32 with IEEE products whatever the input dtype, and autocast is ignored.

    Args:
        z: (N, C) latents, float32, bfloat16 or float16, finite; C up to 256. N may be 0.
        codebook: (K, C), same device, one of the same dtypes; K up to 2**18.
        metric: "euclidean", or "cosine": both sides are first divided by max(length, 1e-12).

    Returns:
        (N,) int64 in [0, K), without gradient.

    Raises:
        ValueError: shapes, dtypes, devices or metric are none of the above. On a CPU also latents
            that are not finite; on a GPU, which would have to be waited for, these and a codebook
            that is not finite raise only under TITOK_FAST_CHECK_VALUES=1: else such a row
            gets some valid index.
    """
    return find_codes(z, codebook, metric, ids_only=True)


def offline_cases() -> list[OfflineCase]:
    """The published tokenizers, that of pixels too, and codes as wide as the VAE's latents."""
    cases = []
    for name, N, K, C, unit in (
        ("L-32 B=1", 32, 4096, 12, True),
        ("L-32 B=256", 8192, 4096, 12, True),
        ("SL-256 B=1", 256, 8192, 64, False),
        ("SL-256 B=64", 16384, 8192, 64, False),
        ("pixels B=1", 256, 1024, 256, False),
        ("pixels B=64", 16384, 1024, 256, False),
        ("C=16 B=256", 8192, 4096, 16, True),
    ):
        for dtype, width in (("fp32", 4), ("bf16", 2)):
            cases.append(_search_case(name, dtype, width, N, K, C, unit))
    # a codebook that was cast with its model
    cases.append(_search_case("SL-256 B=64 table", "bf16", 2, 16384, 8192, 64, False, "bf16"))
    return cases


def _search_case(
    name: str,
    dtype: str,
    width: int,
    N: int,
    K: int,
    C: int,
    unit: bool,
    table: str = "fp32",
) -> OfflineCase:
    plan = plan_search(N, K, C)
    tile = {"BLOCK_N": plan["rows"], "BLOCK_K": plan["codes"], "BLOCK_C": plan["channels"]}
    table_bytes = (2 if table == "bf16" else 4) * K * C
    return OfflineCase(
        kernel=_search_kernel,
        config=f"{name} {dtype} {plan['rows']}x{plan['codes']} split {plan['splits']}",
        signature={"z_ptr": f"*{dtype}", "e_ptr": f"*{table}", "out_ptr": "*i64", "N": "i32:16"}
        | {"K": "i32:16", "EPS": "fp32", "SPLITS": "i32"},
        constexprs={"C": C, "UNIT": unit, "DIRECT": plan["splits"] == 1} | tile,
        num_warps=plan["warps"],
        num_stages=1,
        expects_mma=False,
        vector_loads=True,
        flops=2.0 * N * K * C,
        bytes_min=N * (C * width + 8) + table_bytes,
        # rows to float32 and to unit length, then over (N, K): sum, product, subtract, argmin
        bytes_unfused=N * C * (width + 16) + table_bytes + 12 * K * C + 4 * N * K * 6,
    )
