"""Expected pixel code under the softmax of the decoder's logits, in one pass.

M pixels of the code grid (images x 256), Kc pixel codes (1024), C channels of a code (256).

Design. A program holds BLOCK_M rows and all of C (half of it and less in float32) and walks over
the codes: running maximum and sum in float32, products of the exponentials with the code table on
the tensor cores, one division at the end.
Why. The (M, Kc) probabilities, as large as the logits, are neither written nor read.
Floor. L-32, per row: 2 KiB of bf16 logits read and 0.5 KiB written; 0.5 MFLOP. On an A100 1.3 ns of
memory and 1.7 ns of tensor cores, near enough to expect no more than 60 % of either.
Not fused with the last 1x1 convolution: its 4.2 MFLOP per row cost 13.4 ns at the peak of cuBLAS,
the 4 KiB of logits written and read 2.0 ns. A fused kernel holds so few rows that it fetches the
4 MiB weight from L2 once for every 64 rows, and would lose more than the logits cost.
The backward is plain PyTorch: it is two matrix products and a softmax gradient.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from titok_fast.kernels._launch import lazy_triton_op, runs_triton, without_autocast
from titok_fast.kernels._offline import OfflineCase
from titok_fast.kernels._values import check_finite, check_no_nan, looks_at_values


def soft_codes_ref(logits: Tensor, codebook: Tensor) -> Tensor:
    """What the kernel must compute: (M, Kc), (Kc, C) -> (M, C) in the logits' dtype."""
    with without_autocast(logits):
        # softmax works in float32 inside and rounds once, so half precision costs no pass more
        return torch.softmax(logits, dim=-1) @ codebook.to(logits.dtype)


@triton.jit
def _soft_codes_kernel(
    logits_ptr,  # (M, K)
    e_ptr,  # (K, C), dtype of the logits
    out_ptr,  # (M, C), dtype of the logits
    M,
    K,
    C,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    chans = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        mask = (rows[:, None] < M) & (ks[None, :] < K)
        x = tl.load(logits_ptr + rows[:, None] * K + ks[None, :], mask=mask, other=float("-inf"))
        e_mask = (ks[:, None] < K) & (chans[None, :] < C)
        # int64 before the multiply: K * C may pass 2**31
        e_at = ks[:, None].to(tl.int64) * C + chans[None, :]
        e = tl.load(e_ptr + e_at, mask=e_mask, other=0.0)

        x = x.to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, axis=1))
        # as long as all is -inf, subtract 0: -inf minus -inf would be NaN for good
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp(x - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(e.dtype), e, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    out = acc / total[:, None]
    mask = (rows[:, None] < M) & (chans[None, :] < C)
    out_ptrs = out_ptr + rows[:, None] * C + chans[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def _plan(M: int, C: int, half: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes, then warps and stages."""
    # up to 16 images: small tiles, or a single image would occupy four programs
    few = M <= 4096
    # float32 products run on the CUDA cores, which keep both operands in registers
    widest = 64 if few or not half else 256
    channels = min(widest, max(16, triton.next_power_of_2(C)))
    rows, codes = 16 if few else 64, 64 if half else 16
    tile = {"BLOCK_M": rows, "BLOCK_K": codes, "BLOCK_C": channels}
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


def _attach_gradient(op: Any) -> None:
    op.register_autograd(_backward, setup_context=_save)


@lazy_triton_op("soft_codes", setup=_attach_gradient)
def _soft_codes(logits: Tensor, codebook: Tensor) -> Tensor:
    (M, K), C = logits.shape, codebook.shape[1]
    logits, codebook = logits.contiguous(), codebook.to(logits.dtype).contiguous()
    out = torch.empty(M, C, dtype=logits.dtype, device=logits.device)
    tile, options = _plan(M, C, half=logits.dtype != torch.float32)
    grid = (triton.cdiv(M, tile["BLOCK_M"]), triton.cdiv(C, tile["BLOCK_C"]))
    # ieee: what the reference does on CUDA unless TF32 is switched on
    args = (logits, codebook, out, M, K, C, "ieee")
    wrap_triton(_soft_codes_kernel)[grid](*args, **tile, **options)
    return out


def soft_codes(logits: Tensor, codebook: Tensor) -> Tensor:
    """Expectation of a code table under softmax(logits), row by row.

    Sums are float32 whatever the dtype; autocast is ignored.

    Args:
        logits: (M, Kc) float32, bfloat16 or float16; -inf forbids a code. M may be 0.
        codebook: (Kc, C) floating point, same device; read in the logits' dtype.

    Returns:
        (M, C) in the logits' dtype, differentiable in both arguments. A row of which every logit
        is -inf, or any is +inf or NaN, gives NaN, as softmax does.

    Raises:
        ValueError: shapes, dtypes or devices are none of the above, or Kc or C is 0. Under
            TITOK_FAST_CHECK_VALUES=1 also a NaN among logits, or a code that is not finite.
    """
    if logits.ndim != 2 or codebook.ndim != 2 or logits.shape[1] != codebook.shape[0]:
        got = f"{tuple(logits.shape)} and {tuple(codebook.shape)}"
        raise ValueError(f"soft_codes wants logits (M, Kc) and codebook (Kc, C); got {got}")
    if 0 in codebook.shape:
        raise ValueError(f"soft_codes wants a codebook with entries; got {tuple(codebook.shape)}")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"soft_codes wants logits in float32, bfloat16 or float16; got {logits.dtype}"
        )
    if not codebook.is_floating_point():
        raise ValueError(f"soft_codes wants a floating-point codebook; got {codebook.dtype}")
    if logits.device != codebook.device:
        raise ValueError(
            f"soft_codes wants one device; logits are on {logits.device}, codebook on "
            f"{codebook.device}: move one"
        )
    if looks_at_values(logits, ids_only=False):
        check_no_nan("soft_codes", logits=logits)
        check_finite("soft_codes", codebook=codebook)
    if runs_triton(logits) and len(logits):
        return _soft_codes(logits, codebook)
    return soft_codes_ref(logits, codebook)


def offline_cases() -> list[OfflineCase]:
    """The legacy decoders: 256 pixels an image, 1024 codes of 256 channels."""
    cases = []
    K, C = 1024, 256
    for images in (1, 64):
        M = images * 256
        for dtype, width in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
            half = width == 2
            tile, options = _plan(M, C, half)
            pointers = dict.fromkeys(("logits_ptr", "e_ptr", "out_ptr"), f"*{dtype}")
            cases.append(
                OfflineCase(
                    kernel=_soft_codes_kernel,
                    config=f"B={images} {dtype}",
                    signature=pointers | {"M": "i32:16", "K": "i32:16", "C": "i32:16"},
                    constexprs={"PRECISION": "ieee", **tile},
                    **options,
                    expects_mma=half,
                    vector_loads=True,
                    flops=2.0 * M * K * C,
                    bytes_min=width * (M * K + K * C + M * C),
                    # softmax reads and writes (M, Kc), the product reads it again
                    bytes_unfused=width * (3 * M * K + K * C + M * C),
                )
            )
    return cases
