"""Expected pixel code under the softmax of the decoder's logits, in one pass.

R pixels of the code grid (images x 256), N pixel codes (1024), C channels of a code (256).

Design. A program holds BLOCK_R rows and all of C (half of it and less in float32) and walks over
the codes: running maximum and sum in float32, matmuls of the exponentials with the code table on
the tensor cores, one division at the end.
Why. The (R, N) probabilities, as large as the logits, are neither written nor read.
Floor. L-32, per row: 2 KiB of bf16 logits read and 0.5 KiB written; 0.5 MFLOP. On an A100 1.3 ns of
memory and 1.7 ns of tensor cores, near enough to expect no more than 60 % of either.
Not fused with the 1x1 convolution before it: its 4.2 MFLOP per row cost 13.4 ns at the peak of
cuBLAS, the 4 KiB of logits written and read 2.0 ns. A fused kernel holds so few rows that it
fetches the 4 MiB weight from L2 once per 64 rows, and would lose more than the logits cost.
The backward is plain PyTorch: two matmuls and a softmax gradient.
"""

from math import inf
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from titok_fast.kernels._launch import lazy_triton_op, runs_triton, without_autocast
from titok_fast.kernels._offline import OfflineCase
from titok_fast.kernels._values import (
    FLOAT_OR_DOUBLE,
    FLOAT_TYPES,
    TRITON_NAMES,
    check_finite,
    check_no_nan,
    check_tensors,
    looks_at_values,
)


def soft_codes_ref(logits: Tensor, codebook: Tensor) -> Tensor:
    """Reference of `soft_codes`."""
    with without_autocast(logits):
        # softmax computes in float32 and rounds once, so half precision costs no extra pass
        return torch.softmax(logits, dim=-1) @ codebook.to(logits.dtype)


@triton.jit
def _soft_codes_kernel(
    logits_ptr,  # (R, N)
    e_ptr,  # (N, C), dtype of the logits
    out_ptr,  # (R, C), dtype of the logits
    R,
    N,
    C,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    chans = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask = (rows[:, None] < R) & (n[None, :] < N)
        x = tl.load(logits_ptr + rows[:, None] * N + n[None, :], mask=mask, other=float("-inf"))
        e_mask = (n[:, None] < N) & (chans[None, :] < C)
        # int64 before the multiply: N * C may pass 2**31
        e_at = n[:, None].to(tl.int64) * C + chans[None, :]
        e = tl.load(e_ptr + e_at, mask=e_mask, other=0.0)

        x = x.to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, axis=1))
        # while all values are -inf, subtract 0: -inf - -inf is NaN
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp(x - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(e.dtype), e, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    out = acc / total[:, None]
    mask = (rows[:, None] < R) & (chans[None, :] < C)
    out_ptrs = out_ptr + rows[:, None] * C + chans[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def _plan(R: int, C: int, half: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes, then warps and stages."""
    # small tiles up to 16 images: large ones would give a single image four programs
    few = R <= 4096
    # float32 matmuls run on the CUDA cores, which keep both operands in registers
    widest = 64 if few or not half else 256
    channels = min(widest, max(16, triton.next_power_of_2(C)))
    rows, codes = 16 if few else 64, 64 if half else 16
    tile = {"BLOCK_R": rows, "BLOCK_N": codes, "BLOCK_C": channels}
    return tile, {"num_warps": 4 if few else 8, "num_stages": 2}


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    logits, codebook = ctx.saved_tensors
    with without_autocast(logits):
        probs = torch.softmax(logits, dim=-1)
        g_probs = grad @ codebook.to(grad.dtype).T
        g_logits = torch.ops.aten._softmax_backward_data(g_probs, probs, -1, logits.dtype)
        return g_logits, (probs.T @ grad).to(codebook.dtype)


@lazy_triton_op("soft_codes", _save, _backward)
def _soft_codes(logits: Tensor, codebook: Tensor) -> Tensor:
    (R, N), C = logits.shape, codebook.shape[1]
    logits, codebook = logits.contiguous(), codebook.to(logits.dtype).contiguous()
    out = torch.empty(R, C, dtype=logits.dtype, device=logits.device)
    tile, options = _plan(R, C, half=logits.dtype != torch.float32)
    grid = (triton.cdiv(R, tile["BLOCK_R"]), triton.cdiv(C, tile["BLOCK_C"]))
    # ieee: what the reference does on CUDA unless TF32 is switched on
    args = (logits, codebook, out, R, N, C, "ieee")
    wrap_triton(_soft_codes_kernel)[grid](*args, **tile, **options)
    return out


def soft_codes(logits: Tensor, codebook: Tensor) -> Tensor:
    """Expected row of the codebook under softmax(logits), for every row of logits.

    Sums are float32 whatever the dtype; autocast is ignored.

    Args:
        logits: (R, N) float32, bfloat16 or float16; -inf forbids a code. R may be 0.
        codebook: (N, C) floating point, same device; read in the logits' dtype.

    Returns:
        (R, C) in the logits' dtype, differentiable in both arguments. As in softmax, a row is NaN
        if all its logits are -inf or any is +inf or NaN.

    Raises:
        ValueError: shapes, dtypes or devices are none of the above, or N or C is 0. Under
            TITOK_FAST_CHECK_VALUES=1 also NaN among logits, or a code that is not finite.
    """
    check_tensors(
        "soft_codes",
        {"N": inf, "C": inf},
        logits=(logits, "RN", FLOAT_TYPES),
        codebook=(codebook, "NC", FLOAT_OR_DOUBLE),
    )
    if looks_at_values(logits, ids_only=False):
        check_no_nan("soft_codes", logits=logits)
        check_finite("soft_codes", codebook=codebook)
    if runs_triton(logits) and len(logits):
        return _soft_codes(logits, codebook)
    return soft_codes_ref(logits, codebook)


def offline_cases() -> list[OfflineCase]:
    """The legacy decoders: 256 pixels an image, 1024 codes of 256 channels."""
    return [_case(images, dtype) for images in (1, 64) for dtype in FLOAT_TYPES]


def _case(images: int, dtype: torch.dtype) -> OfflineCase:
    R, N, C = images * 256, 1024, 256
    kind, width, half = TRITON_NAMES[dtype], dtype.itemsize, dtype != torch.float32
    tile, options = _plan(R, C, half)
    return OfflineCase.of(
        _soft_codes_kernel,
        f"B={images} {kind}",
        {f"*{kind}": "logits_ptr e_ptr out_ptr"},
        {"PRECISION": "ieee", **tile},
        **options,
        expects_mma=half,
        flops=2.0 * R * N * C,
        bytes_min=width * (R * N + N * C + R * C),
        # softmax reads and writes (R, N), the matmul reads it again
        bytes_unfused=width * (3 * R * N + N * C + R * C),
    )
