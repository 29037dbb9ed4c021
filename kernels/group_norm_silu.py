"""SiLU of a group normalisation, forward and backward, for channels-last activations.

B images of C channels in H x W pixels; G groups of C / G channels (32 groups, eps 1e-6).

Design. Memory order is (B, H*W, C), so a tile of pixels x channels is one stream. Pass 1: each
program takes a run of pixels and leaves mean and squared deviation of every channel (Welford, so a
large mean costs no digits). Pass 2, small: a program per image and group merges them. Pass 3:
normalise, SiLU, store. Groups of any width work, as no tile is cut by group. The backward has the
same two large passes: sums per channel, then the gradient of x.
Why. PyTorch's CUDA kernel wants channels-first memory: two transposing copies, and SiLU apart.
Floor. Three passes over the activation (read, read, write); with L2 holding one image of 16 MiB,
nearer to two. Memory-bound: about 85 % of bandwidth expected. `add_group_norm_silu` folds the
residual addition before it into pass 1: five passes instead of six. CPU: `_group_norm_cpu.py`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.library import wrap_triton

from titok_fast.kernels._group_norm_cpu import group_norm_silu_cpu, in_two_calls, takes_eager
from titok_fast.kernels._group_norm_device import (
    apply_kernel,
    grad_input_kernel,
    grad_sums_kernel,
    merge_kernel,
    moments_kernel,
)
from titok_fast.kernels._launch import lazy_triton_op, runs_triton
from titok_fast.kernels._offline import OfflineCase
from titok_fast.kernels._values import check_finite, looks_at_values

_RUNS = 64  # at most so many runs of pixels per image: what pass 2 takes at once
_ELEMENTS = 4096  # per tile: 32 for each of 128 threads, 16 in the backward, which keeps more


def group_norm_silu_ref(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """What the kernel must compute: (B, C, H, W) -> same shape, dtype and memory format."""
    y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.silu(y)


def _plan(P: int, C: int) -> tuple[dict[str, int], int, int]:
    """Tile sizes, pixels in a run, runs per image."""
    channels = triton.next_power_of_2(C)
    pixels = max(1, _ELEMENTS // channels)
    run = pixels * triton.cdiv(triton.cdiv(P, pixels), _RUNS)
    return {"BLOCK_P": pixels, "BLOCK_C": channels}, run, triton.cdiv(P, run)


def _stream(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, bias, _, _ = inputs
    _, total, mean, rstd = output
    ctx.added = residual is not None
    ctx.save_for_backward(total if ctx.added else x, mean, rstd, weight, bias)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx: Any, *grads: Tensor) -> tuple:
    x, mean, rstd, weight, bias = ctx.saved_tensors
    dx, dw, db = _group_norm_silu_bwd(grads[0], x, mean, rstd, weight, bias)
    if ctx.added:
        dx = dx + grads[1]
    return dx, dx if ctx.added else None, dw, db, None, None


def _attach_gradient(op: Any) -> None:
    op.register_autograd(_backward, setup_context=_save)


@lazy_triton_op("group_norm_silu", setup=_attach_gradient)
def _group_norm_silu(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x + residual (empty without a residual), and mean and 1/deviation (B, groups)."""
    x = _stream(x)
    B, C, H, W = x.shape
    P = H * W
    tile, run, runs = _plan(P, C)
    add = residual is not None
    total = torch.empty_like(x) if add else x.new_empty(0)
    addend = x if residual is None else _stream(residual)
    run_mean = x.new_empty((B, runs, C), dtype=torch.float32)
    run_m2 = torch.empty_like(run_mean)
    mean = x.new_empty((B, groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    moments = (x, addend, total, run_mean, run_m2, P, run, C, add)
    wrap_triton(moments_kernel)[(B * runs,)](*moments, **tile, num_warps=4)
    merge = (run_mean, run_m2, mean, rstd, P, run, runs, eps, C, groups)
    width = min(16, triton.next_power_of_2(C // groups))
    wrap_triton(merge_kernel)[(B * groups,)](
        *merge, BLOCK_R=triton.next_power_of_2(runs), BLOCK_W=width, num_warps=4
    )
    y = torch.empty_like(x)
    args = (total if add else x, mean, rstd, weight, bias, y, P, C, groups)
    wrap_triton(apply_kernel)[(B * triton.cdiv(P, tile["BLOCK_P"]),)](*args, **tile, num_warps=4)
    return y, total, mean, rstd


@lazy_triton_op("group_norm_silu_bwd")
def _group_norm_silu_bwd(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = _stream(x), _stream(dy)
    B, C, H, W = x.shape
    P, groups = H * W, mean.shape[1]
    tile, run, runs = _plan(P, C)
    sums = x.new_empty((B, runs, C), dtype=torch.float32)
    dots = torch.empty_like(sums)
    given = (x, dy, mean, rstd, weight, bias)
    wrap_triton(grad_sums_kernel)[(B * runs,)](
        *given, sums, dots, P, run, C, groups, **tile, num_warps=8
    )
    sums, dots = sums.sum(1), dots.sum(1)  # (B, C)
    share = weight.float() / (P * (C // groups))
    mean_grad = (sums * share).view(B, groups, C // groups).sum(-1)
    mean_dot = (dots * share).view(B, groups, C // groups).sum(-1)
    dx = torch.empty_like(x)
    wrap_triton(grad_input_kernel)[(B * triton.cdiv(P, tile["BLOCK_P"]),)](
        *given, mean_grad, mean_dot, dx, P, C, groups, **tile, num_warps=8
    )
    return dx, dots.sum(0).to(weight.dtype), sums.sum(0).to(bias.dtype)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> None:
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{op} wants x (B, C, H, W) with pixels; got {tuple(x.shape)}")
    C = x.shape[1]
    if weight.shape != (C,) or bias.shape != (C,):
        got = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        raise ValueError(f"{op} wants weight and bias ({C},); got {got}")
    if groups < 1 or C % groups:
        raise ValueError(f"{op} wants a number of groups that divides {C} channels; got {groups}")
    if not all(t.is_floating_point() for t in (x, weight, bias)):
        got = f"{x.dtype}, {weight.dtype} and {bias.dtype}"
        raise ValueError(f"{op} wants floating-point x, weight and bias; got {got}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op} wants a finite eps of at least 0; got {eps}")
    if not x.device == weight.device == bias.device:
        raise ValueError(
            f"{op} wants one device; x is on {x.device}, weight on {weight.device}, bias on "
            f"{bias.device}: move them"
        )
    if looks_at_values(x, ids_only=False):
        check_finite(op, x=x, weight=weight, bias=bias)


def _takes_kernel(x: Tensor) -> bool:
    """Whether the kernel serves x: PyTorch's own is the better one for channels-first memory."""
    # a tile holds all channels of a pixel: more than these would overflow the registers
    return (
        runs_triton(x)
        and len(x) > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.shape[1] <= _ELEMENTS
        and x.dtype != torch.float64
    )


def _plain(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    implementation = group_norm_silu_cpu if takes_eager(x) else group_norm_silu_ref
    return implementation(x, weight, bias, groups, eps)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int = 32, eps: float = 1e-6
) -> Tensor:
    """silu(group_norm(x)), with float32 statistics.

    Args:
        x: (B, C, H, W) floating point; fast if its memory is channels-last. B may be 0.
        weight: (C,) scale, any floating dtype, same device.
        bias: (C,) shift, likewise.
        groups: number of groups, a divisor of C.
        eps: added to the variance; finite, at least 0.

    Returns:
        (B, C, H, W) in the dtype and memory format of x, differentiable in x, weight and bias.

    Raises:
        ValueError: shapes, dtypes, devices, groups or eps are none of the above.
            Under TITOK_FAST_CHECK_VALUES=1 also values that are not finite.
    """
    if not looks_at_values(x, ids_only=False):
        y = in_two_calls(x, weight, bias, groups, eps)
        if y is not None:
            return y
    _check("group_norm_silu", x, weight, bias, groups, eps)
    if _takes_kernel(x):
        return _group_norm_silu(x, None, weight, bias, groups, eps)[0]
    return _plain(x, weight, bias, groups, eps)


def add_group_norm_silu(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int = 32,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """silu(group_norm(x + residual)) and the sum itself, which the next shortcut needs.

    Args:
        x: (B, C, H, W) as for `group_norm_silu`.
        residual: as x, in shape, dtype, memory format and device.
        weight: (C,) scale.
        bias: (C,) shift.
        groups: number of groups, a divisor of C.
        eps: added to the variance.

    Returns:
        The activation and x + residual, both (B, C, H, W) in the dtype of x.

    Raises:
        ValueError: as `group_norm_silu`, or residual is unlike x.
    """
    _check("add_group_norm_silu", x, weight, bias, groups, eps)
    if (x.shape, x.dtype, x.device) != (residual.shape, residual.dtype, residual.device):
        raise ValueError(
            f"add_group_norm_silu wants a residual like x, {tuple(x.shape)} {x.dtype} on "
            f"{x.device}; got {tuple(residual.shape)} {residual.dtype} on {residual.device}"
        )
    if looks_at_values(x, ids_only=False):
        check_finite("add_group_norm_silu", residual=residual)
    if _takes_kernel(x):
        return _group_norm_silu(x, residual, weight, bias, groups, eps)[:2]
    total = x + residual
    return _plain(total, weight, bias, groups, eps), total


def offline_cases() -> list[OfflineCase]:
    """The pixel decoder's three widths at their largest resolutions, eight images."""
    shapes = ((512, 16, "bf16 fp32"), (256, 64, "bf16 fp16 fp32"), (128, 256, "bf16 fp32"))
    return [
        case
        for C, side, dtypes in shapes
        for dtype in dtypes.split()
        for case in _cases_of(8, C, side * side, dtype)
    ]


def _cases_of(B: int, C: int, P: int, dtype: str) -> list[OfflineCase]:
    tile, _, runs = _plan(P, C)
    groups, one = 32, B * P * C * (4 if dtype == "fp32" else 2)
    stream, pixels = f"*{dtype}", {"P": "i32:16", "RUN": "i32:16"}
    norm = dict.fromkeys(("mean_ptr", "rstd_ptr"), "*fp32") | {"w_ptr": "*fp32", "b_ptr": "*fp32"}
    sums = dict.fromkeys(("sum_ptr", "dot_ptr"), "*fp32")
    parts = dict.fromkeys(("mean_ptr", "m2_ptr"), "*fp32")
    all_of = dict.fromkeys(("x_ptr", "r_ptr", "total_ptr"), stream)
    both = dict.fromkeys(("x_ptr", "dy_ptr"), stream)
    to_x = both | norm | sums | {"dx_ptr": stream, "P": "i32:16"}
    width_tile = {
        "BLOCK_R": triton.next_power_of_2(runs),
        "BLOCK_W": min(16, triton.next_power_of_2(C // groups)),
    }
    dims, whole = {"C": C} | tile, {"C": C, "G": groups} | tile
    merge = parts | {"group_mean_ptr": "*fp32", "rstd_ptr": "*fp32"} | pixels
    merge |= {"RUNS": "i32", "EPS": "fp32"}
    partial = 8 * B * runs * C
    # kernel, signature, constexprs, operations per number, passes at least, passes unfused;
    # unfused is channels-last PyTorch: one copy to channels-first, statistics, normalise, SiLU
    rows = (
        (moments_kernel, all_of | parts | pixels, dims | {"ADD": False}, 6, 1, 3),
        (moments_kernel, all_of | parts | pixels, dims | {"ADD": True}, 7, 3, 6),
        (apply_kernel, {"x_ptr": stream, "y_ptr": stream, "P": "i32:16"} | norm, whole, 8, 2, 4),
        (grad_sums_kernel, both | norm | sums | pixels, whole, 14, 2, 5),
        (grad_input_kernel, to_x, whole, 17, 3, 6),
    )
    cases = [
        OfflineCase(
            kernel=kernel,
            config=f"{C}x{P} {dtype}" + (" add" if constexprs.get("ADD") else ""),
            signature=signature,
            constexprs=constexprs,
            num_warps=8 if "dy_ptr" in signature else 4,
            num_stages=3,
            expects_mma=False,
            vector_loads=True,
            flops=float(operations * B * P * C),
            bytes_min=float(passes * one),
            bytes_unfused=float(unfused * one),
        )
        for kernel, signature, constexprs, operations, passes, unfused in rows
    ]
    small = OfflineCase(
        kernel=merge_kernel,
        config=f"{C}x{P} {dtype}",
        signature=merge,
        constexprs={"C": C, "G": groups} | width_tile,
        num_warps=4,
        num_stages=3,
        expects_mma=False,
        vector_loads=False,  # C / 32 numbers of each run: a few KiB in all
        flops=float(partial),
        bytes_min=float(partial),
        bytes_unfused=float(partial),
    )
    return [*cases, small]
