"""SiLU of a group normalisation, forward and backward, for channels-last activations.

B images of C channels in H x W = P pixels; G groups of C / G channels (32 groups, eps 1e-6).

Design. Memory order is (B, P, C), so a tile of pixels x channels is one stream. Pass 1: each
program takes a run of pixels and writes mean and squared deviation of every channel (Welford, so a
large mean costs no digits). Pass 2, small: a program per image and group merges them. Pass 3:
normalise, SiLU, store. Groups of any width work, as no tile is cut by group. The backward has the
same two large passes: sums per channel, then the gradient of x.
Why. PyTorch's CUDA kernel wants channels-first memory: two transposing copies, and SiLU apart.
Floor. Three passes over the activation (read, read, write); with L2 holding one image of 16 MiB,
nearer to two. Memory-bound: about 85 % of bandwidth expected. `add_group_norm_silu` fuses the
residual addition into pass 1: five passes instead of six. CPU: `_group_norm_cpu.py`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.library import wrap_triton

from titok_fast.kernels._group_norm_cpu import fast_path, group_norm_silu_cpu, takes_eager
from titok_fast.kernels._group_norm_device import (
    apply_kernel,
    grad_input_kernel,
    grad_sums_kernel,
    merge_kernel,
    moments_kernel,
)
from titok_fast.kernels._launch import lazy_triton_op, runs_triton
from titok_fast.kernels._offline import OfflineCase
from titok_fast.kernels._values import (
    FLOAT_OR_DOUBLE,
    FLOAT_TYPES,
    TRITON_NAMES,
    check_finite,
    check_tensors,
    looks_at_values,
)

_RUNS = 64  # most runs of pixels per image: pass 2 reads them at once
_ELEMENTS = 4096  # per tile: 32 for each of 128 threads; 16 in the backward for its registers


def group_norm_silu_ref(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Reference of `group_norm_silu`."""
    y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.silu(y)


def _plan(P: int, C: int) -> tuple[dict[str, int], int, int]:
    """Tile sizes, pixels in a run, runs per image."""
    channels = triton.next_power_of_2(C)
    pixels = max(1, _ELEMENTS // channels)
    run = pixels * triton.cdiv(triton.cdiv(P, pixels), _RUNS)
    return {"BLOCK_P": pixels, "BLOCK_C": channels}, run, triton.cdiv(P, run)


def _merge_width(channels: int) -> int:
    return min(16, triton.next_power_of_2(channels))


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


@lazy_triton_op("group_norm_silu", _save, _backward)
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
    block, width = triton.next_power_of_2(runs), _merge_width(C // groups)
    wrap_triton(merge_kernel)[(B * groups,)](*merge, BLOCK_R=block, BLOCK_W=width, num_warps=4)
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


def _takes_kernel(x: Tensor) -> bool:
    """Whether to run the kernel on x; channels-first memory is faster with PyTorch's own."""
    # a tile holds all channels of a pixel, so more channels would overflow the registers
    return (
        runs_triton(x)
        and len(x) > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.shape[1] <= _ELEMENTS
        and x.dtype != torch.float64
    )


def _checked(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Check the arguments; return activation and x + residual, by the implementation for x."""
    sizes = check_tensors(
        op,
        dict.fromkeys("CHW", math.inf),
        x=(x, "BCHW", FLOAT_OR_DOUBLE),
        residual=(residual, "BCHW", (x.dtype,)),
        weight=(weight, "C", FLOAT_OR_DOUBLE),
        bias=(bias, "C", FLOAT_OR_DOUBLE),
    )
    C = sizes["C"]
    if groups < 1 or C % groups:
        raise ValueError(f"{op} wants a number of groups that divides {C} channels; got {groups}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op} wants a finite eps of at least 0; got {eps}")
    if looks_at_values(x, ids_only=False):
        check_finite(op, x=x, residual=residual, weight=weight, bias=bias)
    if _takes_kernel(x):
        return _group_norm_silu(x, residual, weight, bias, groups, eps)[:2]
    total = x if residual is None else x + residual
    implementation = group_norm_silu_cpu if takes_eager(total) else group_norm_silu_ref
    return implementation(total, weight, bias, groups, eps), total


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int = 32, eps: float = 1e-6
) -> Tensor:
    """silu(group_norm(x)), with float32 statistics.

    Args:
        x: (B, C, H, W) floating point; fastest in channels-last memory. B may be 0.
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
        y = fast_path(x, weight, bias, groups, eps)
        if y is not None:
            return y
    return _checked("group_norm_silu", x, None, weight, bias, groups, eps)[0]


def add_group_norm_silu(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, groups: int = 32, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """silu(group_norm(x + residual)), and the sum, which the next residual connection needs.

    Arguments as in `group_norm_silu`; residual has the shape, dtype, memory format and device of x,
    and so have both results.

    Raises:
        ValueError: as `group_norm_silu`, or residual does not match x.
    """
    return _checked("add_group_norm_silu", x, residual, weight, bias, groups, eps)


def offline_cases() -> list[OfflineCase]:
    """The pixel decoder's three widths at their largest resolutions, eight images."""
    both = (torch.bfloat16, torch.float32)
    shapes = ((512, 16, both), (256, 64, FLOAT_TYPES), (128, 256, both))
    return [
        case
        for C, side, dtypes in shapes
        for dtype in dtypes
        for case in _cases(8, C, side * side, dtype)
    ]


def _cases(B: int, C: int, P: int, dtype: torch.dtype) -> list[OfflineCase]:
    tile, _, runs = _plan(P, C)
    G, one, kind = 32, B * P * C * dtype.itemsize, TRITON_NAMES[dtype]
    dims, whole = {"C": C} | tile, {"C": C, "G": G} | tile
    merge = {"C": C, "G": G, "BLOCK_R": triton.next_power_of_2(runs)}
    merge |= {"BLOCK_W": _merge_width(C // G)}
    # kernel, its pointers to activations, constexprs, warps, operations per number, passes at
    # least, passes unfused; unfused is channels-last PyTorch: one copy to channels-first,
    # statistics, normalise, SiLU
    share = 8 * runs / (P * dtype.itemsize)  # of a pass: the statistics per run
    summed = "x_ptr r_ptr total_ptr"
    rows = (
        (moments_kernel, summed, dims | {"ADD": False}, 4, 6, 1, 3),
        (moments_kernel, summed, dims | {"ADD": True}, 4, 7, 3, 6),
        (apply_kernel, "x_ptr y_ptr", whole, 4, 8, 2, 4),
        (grad_sums_kernel, "x_ptr dy_ptr", whole, 8, 14, 2, 5),
        (grad_input_kernel, "x_ptr dy_ptr dx_ptr", whole, 8, 17, 3, 6),
        (merge_kernel, "", merge, 4, 8 * runs / P, share, share),
    )
    return [
        OfflineCase.of(
            kernel,
            f"{C}x{P} {kind}" + (" add" if constexprs.get("ADD") else ""),
            {f"*{kind}": activations} | ({} if activations else {"i32": "RUNS", "fp32": "EPS"}),
            constexprs,
            num_warps=warps,
            num_stages=3,
            vector_loads=kernel is not merge_kernel,  # that one reads a few KiB in all
            flops=float(operations * B * P * C),
            bytes_min=float(passes * one),
            bytes_unfused=float(unfused * one),
        )
        for kernel, activations, constexprs, warps, operations, passes, unfused in rows
    ]
