"""Masked-token loss of the generator: head, smoothed cross-entropy and weights in one op.

R token rows of width D, N codes. Every row counts with its own weight: 1 if masked, 0.1 if not.

Design. Chunks of rows, whose logits (32 MiB of bf16) stay in L2: cuBLAS computes a chunk's logits;
one kernel, a program of 256 threads per row, reads them in blocks of up to 8192, writes the row's
loss and overwrites the logits with their gradient; two matmuls turn that into the gradients of
hidden states and head. All of it runs in the forward; the backward only scales. Gradients are
stored without the factor 1 / sum(weights), which would underflow in float16.
Why. cut-cross-entropy 25.1 has neither bias nor smoothing. Liger 0.8 has both, but per-token
weights only through reduction="none", which recomputes the logits in the backward.
Floor: 6 R N D operations of matmuls, which cuBLAS does best: 248 us of an A100's bf16 peak at
R = N = 4096, D = 768. The kernel's 67 MB add up to 33 us; about 70 % of that sum are expected.
Definition: arXiv:2406.07550 appendix A and the training code of its release.
"""

from math import inf
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from titok_fast.kernels._launch import is_plain_cpu, lazy_triton_op, runs_triton, without_autocast
from titok_fast.kernels._masked_cross_entropy_cpu import CpuLoss, scaled_gradients
from titok_fast.kernels._offline import OfflineCase
from titok_fast.kernels._values import (
    FLOAT_OR_DOUBLE,
    INT64,
    TRITON_NAMES,
    check_finite,
    check_in_range,
    check_no_nan,
    check_tensors,
    looks_at_values,
)

_EPS = 1e-8  # of the weighted mean, as in the published training code
_CHUNK_ELEMENTS = 1 << 24
_MAX_BLOCK = 8192  # logits held at once: 32 for each of 256 threads


def masked_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    weights: Tensor,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Reference of `masked_cross_entropy`, differentiable by autograd."""
    with without_autocast(hidden):
        logits = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        lse = torch.logsumexp(logits, dim=1)
        target = logits.gather(1, targets[:, None]).squeeze(1)
        ce = lse - (1 - label_smoothing) * target
        if label_smoothing > 0:  # a forbidden code has logit -inf: 0 * inf is NaN
            ce = ce - label_smoothing * logits.mean(dim=1)
        weights = weights.to(ce.dtype)
        return (weights * ce).sum() / (weights.sum() + _EPS)


@triton.jit
def _loss_kernel(
    logits_ptr,  # (R, N) without bias; if GRAD, overwritten by the gradient of the weighted loss
    bias_ptr,  # (N,)
    target_ptr,  # (R,) int64
    weight_ptr,  # (R,)
    loss_ptr,  # (R,) float32: weight times cross-entropy
    N,
    SMOOTHING,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * N
    target = tl.load(target_ptr + row)
    weight = tl.load(weight_ptr + row).to(tl.float32)

    top = float("-inf")
    total = 0.0
    plain = 0.0  # sum of logits, for the uniform part of the target
    for n0 in range(0, N, BLOCK):
        at = n0 + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < N, other=float("-inf")).to(tl.float32)
        x += tl.load(bias_ptr + at, mask=at < N, other=0.0).to(tl.float32)
        plain += tl.sum(tl.where(at < N, x, 0.0), axis=0)
        new_top = tl.maximum(top, tl.max(x, axis=0))
        # while all values are -inf, subtract 0: -inf - -inf is NaN
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), axis=0)
        top = new_top
    lse = top + tl.log(total)

    # an id outside the codebook gives a NaN loss and reads no memory out of bounds
    known = (target >= 0) & (target < N)
    chosen = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    chosen += tl.load(bias_ptr + target, mask=known, other=0.0).to(tl.float32)
    # without smoothing leave out forbidden codes, of logit -inf: 0 * inf is NaN
    uniform = tl.where(SMOOTHING > 0.0, SMOOTHING * (plain / N), 0.0)
    loss = lse - (1.0 - SMOOTHING) * chosen - uniform
    tl.store(loss_ptr + row, weight * loss)

    if GRAD:
        tl.debug_barrier()  # all lanes must read the target's logit before it is overwritten
        for n0 in range(0, N, BLOCK):
            at = n0 + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + at, mask=at < N, other=float("-inf")).to(tl.float32)
            x += tl.load(bias_ptr + at, mask=at < N, other=0.0).to(tl.float32)
            grad = tl.exp(x - lse) - SMOOTHING / N
            grad = weight * tl.where(at == target, grad - (1.0 - SMOOTHING), grad)
            tl.store(logits_ptr + at, grad.to(logits_ptr.dtype.element_ty), mask=at < N)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias = inputs[:3]
    _, total, *grads = output
    if not inputs[6]:
        raise RuntimeError("masked_cross_entropy was called with with_grad=False under autograd")
    ctx.save_for_backward(total, *grads)
    ctx.mark_non_differentiable(total, *grads)
    ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype


def _backward(ctx: Any, g_loss: Tensor, *_: Tensor) -> tuple:
    return scaled_gradients(ctx, g_loss)


@lazy_triton_op("masked_cross_entropy", _save, _backward)
def _masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    weights: Tensor,
    label_smoothing: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, sum of weights, and the gradients of hidden, weight and bias times that sum."""
    (R, D), N = hidden.shape, weight.shape[0]
    head = weight.to(hidden.dtype)
    targets, weights, bias = targets.contiguous(), weights.contiguous(), bias.contiguous()
    total = weights.sum(dtype=torch.float32) + _EPS
    summed = torch.zeros_like(total)
    # gradients of the head add up over chunks in float32
    g_weight = hidden.new_zeros((N, D) if with_grad else 0, dtype=torch.float32)
    g_bias = hidden.new_zeros(N if with_grad else 0, dtype=torch.float32)
    g_hidden = [hidden.new_empty((0, D))]
    step = max(1, _CHUNK_ELEMENTS // N)
    for start in range(0, R, step):
        rows = slice(start, min(start + step, R))
        logits = hidden[rows] @ head.T
        losses = torch.empty(logits.shape[0], dtype=torch.float32, device=hidden.device)
        args = (logits, bias, targets[rows], weights[rows], losses, N, label_smoothing, with_grad)
        wrap_triton(_loss_kernel)[(logits.shape[0],)](*args, BLOCK=_block(N), num_warps=8)
        summed += losses.sum()
        if with_grad:
            g_hidden.append(logits @ head)
            g_weight += (logits.T @ hidden[rows]).float()
            g_bias += logits.sum(0, dtype=torch.float32)
    return summed / total, total, torch.cat(g_hidden), g_weight, g_bias


def _block(N: int) -> int:
    return min(_MAX_BLOCK, triton.next_power_of_2(N))


def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    weights: Tensor,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Weighted mean of smoothed cross-entropies of hidden @ weight.T + bias.

    sum(weights * ce) / (sum(weights) + 1e-8), where ce compares with (1 - label_smoothing) on the
    target and label_smoothing / N on every code. The head runs in the dtype of `hidden`, or of
    autocast if it is on; the rest in float32, or in float64 if hidden is. Once differentiable.

    Args:
        hidden: (R, D) last hidden states, floating point. R may be 0; the loss is then 0.
        weight: (N, D) head, floating point; the dtype may differ from hidden's.
        bias: (N,) head bias.
        targets: (R,) int64 in [0, N). Others raise on a CPU and give a NaN loss on a GPU.
        weights: (R,) at least 0: 1 where masked and 0.1 elsewhere in the published training.
        label_smoothing: in [0, 1).

    Returns:
        Scalar float32 (float64 if hidden is), with gradients to hidden, weight and bias.

    Raises:
        ValueError: shapes, dtypes, devices or label_smoothing are none of the above, on a CPU also
            a target. Under TITOK_FAST_CHECK_VALUES=1 also a hidden state that is not finite, NaN
            in the head, a target out of range or a negative weight; otherwise NaN reaches the loss,
            where a training loop checks for it.
    """
    op = "masked_cross_entropy"
    check_tensors(
        op,
        {"N": inf},
        hidden=(hidden, "RD", FLOAT_OR_DOUBLE),
        weight=(weight, "ND", FLOAT_OR_DOUBLE),
        bias=(bias, "N", FLOAT_OR_DOUBLE),
        targets=(targets, "R", INT64),
        weights=(weights, "R", FLOAT_OR_DOUBLE),
    )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op} wants label_smoothing in [0, 1); got {label_smoothing}")
    if looks_at_values(hidden, ids_only=False):
        check_finite(op, hidden=hidden)
        check_no_nan(op, weight=weight, bias=bias)
        check_in_range(op, "weights", weights, 0, float("inf"))
    if looks_at_values(targets, ids_only=True):  # no NaN would show a bad one
        check_in_range(op, "targets", targets, 0, weight.shape[0])
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, bias))
    weights = weights.detach()
    if not runs_triton(hidden) or hidden.dtype == torch.float64:
        if not with_grad or not is_plain_cpu(hidden):
            return masked_cross_entropy_ref(hidden, weight, bias, targets, weights, label_smoothing)
        with without_autocast(hidden):
            return CpuLoss.apply(hidden, weight, bias, targets, weights, label_smoothing, _EPS)
    with without_autocast(hidden):
        args = (hidden, weight, bias, targets, weights, label_smoothing, with_grad)
        return _masked_cross_entropy(*args)[0]


def offline_cases() -> list[OfflineCase]:
    """The first chunk of a training step of 64 images, 4096 codes, without the head's matmuls."""
    return [
        _case(name, min(64 * tokens, _CHUNK_ELEMENTS // 4096), 4096, dtype, grad)
        for name, tokens in (("L-32", 32), ("B-64 and S-128", 64))
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for grad in (True, False)
    ]


def _case(name: str, R: int, N: int, dtype: torch.dtype, grad: bool) -> OfflineCase:
    kind, width = TRITON_NAMES[dtype], dtype.itemsize
    return OfflineCase.of(
        _loss_kernel,
        f"{name} {R}x{N} {kind}" + ("" if grad else " no grad"),
        {f"*{kind}": "logits_ptr", "*i64": "target_ptr", "fp32": "SMOOTHING"},
        {"GRAD": grad, "BLOCK": _block(N)},
        num_warps=8,
        num_stages=3,
        flops=(12.0 if grad else 8.0) * R * N,
        bytes_min=float(width * R * N * (2 if grad else 1) + 4 * N),
        # float32 log-softmax, smoothing sum, and both again in the backward
        bytes_unfused=float(R * N * (width + 4 * (8 if grad else 3))),
    )
