"""`group_norm_silu` on eager CPU tensors: PyTorch's forward in place, and a backward of our own.

PyTorch's channels-last backward takes the C / G channels of a group at a time and is slow if they
fill less than half a vector: 41 ms where channels-first takes 4, at 128 x 256 x 256 in bfloat16.
Ours takes all channels of a pixel at once. It recomputes the normalised value strip by strip while
x is in the cache: touching fresh memory costs more than the arithmetic. The kernels of batch
normalisation give the sums per channel, and accept 16-bit x with float32 factors.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titok_fast.kernels._launch import is_plain_cpu

_ATEN = torch.ops.aten
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGE = 1024  # pixels: for smaller maps PyTorch's backward is another one, and fast
_STRIP = 1 << 19  # numbers per strip: 2 MiB in float32, so x, dy and dx stay in the cache

_Strip = tuple[Tensor, Tensor, Tensor]  # x, gradient of the result, gradient of x: (1, C, rows, W)


def takes_eager(x: Tensor) -> bool:
    """Whether x is a plain CPU tensor that `group_norm_silu_cpu` can take."""
    return (
        is_plain_cpu(x)
        and type(x) is Tensor
        and x.dtype in _DTYPES
        and x.shape[0] > 0
        and (x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous())
    )


def _needs_grad(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    wanted = x.requires_grad or weight.requires_grad or bias.requires_grad
    return wanted and torch.is_grad_enabled()


def fast_path(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor | None:
    """Fast path (inference, small maps); None where it does not apply.

    PyTorch checks the arguments: on small maps, checks in Python cost a tenth of the time.
    """
    if (
        type(x) is not Tensor
        or not (is_plain_cpu(x) and weight.is_cpu and bias.is_cpu)
        or x.ndim != 4
        or not x.numel()
        or not x.dtype == weight.dtype == bias.dtype
        or not 0.0 <= eps < math.inf  # PyTorch does not check eps
    ):
        return None
    needs_grad = _needs_grad(x, weight, bias)
    if needs_grad and x.shape[2] * x.shape[3] >= _LARGE:
        return None
    if needs_grad and x.element_size() == 2:
        # PyTorch saves statistics of 16-bit x in float32 only with float32 factors
        weight, bias = weight.float(), bias.float()
    try:
        # at 512 x 16 x 16 in float32 this takes 37 us, channels-first 18; separate calls for
        # moments (14 us), merging (14) and transform (10) are no faster, nor are copies
        y = torch.group_norm(x, groups, weight, bias, eps)
    except RuntimeError:
        return None  # the caller's checks raise a better error
    # in place: touching 32 MiB of fresh memory costs as much as both operations
    return F.silu(y, inplace=not needs_grad)


def group_norm_silu_cpu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """`group_norm_silu_ref` for tensors that pass `takes_eager`."""
    needs_grad = _needs_grad(x, weight, bias)
    if needs_grad or not x.dtype == weight.dtype == bias.dtype:
        # with float32 weights PyTorch returns and saves statistics of 16-bit x in float32
        weight, bias = weight.float(), bias.float()
    if needs_grad and _own_backward_pays(x, groups):
        return _NormSiLU.apply(x, weight, bias, groups, eps)
    y = _normalise(x, weight, bias, groups, eps)[0]
    return F.silu(y, inplace=not needs_grad)


def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised x, and mean and 1/deviation (B, groups)."""
    B, C, H, W = x.shape
    return torch.native_group_norm(x, weight, bias, B, C, H * W, groups, eps)


def _own_backward_pays(x: Tensor, groups: int) -> bool:
    _, C, H, W = x.shape
    return (
        C // groups * x.element_size() < 32  # bytes: half a vector
        and H * W >= _LARGE
        and C * H * W >= 1 << 18  # below, 0.3 ms of calls per image exceed the work
        and not x.is_contiguous()
    )


class _NormSiLU(torch.autograd.Function):
    """Saves x, mean and 1/deviation; autograd would save the normalised x as well."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        y, mean, rstd = _normalise(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(y, inplace=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives: autograd must see plain operations
            y = F.silu(_normalise(x, weight, bias, ctx.groups, ctx.eps)[0])
            inputs = (x, weight, bias)
            wanted = [t for t in inputs if t.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, grads, create_graph=True))
            return *(next(found) if t.requires_grad else None for t in inputs), None, None
        with np.errstate(all="ignore"):  # no warnings for infinities and NaN
            return *_gradients(grads[0], x, weight, bias, mean, rstd), None, None


class _PerChannel(NamedTuple):
    """Float32 numbers of one image, each (C,)."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor
    dot: Tensor  # sum over pixels of dz times normalised x
    total: Tensor  # sum over pixels of dz
    slope: Tensor
    offset: Tensor
    zero: Tensor
    one: Tensor


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias.

    With dz the gradient before SiLU and n the normalised x: dx = rstd (w dz - avg(w dz) -
    n avg(w dz n)), averages over a group. That is scale dz + slope x + offset, each per channel.
    """
    B, C, H, W = x.shape
    G = mean.shape[1]
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx = torch.empty_like(x)
    step = H if C * H * W <= 2 * _STRIP else max(1, _STRIP // (C * W))
    # NumPy for numbers per channel: after a pass over megabytes, a PyTorch call costs 5-15 us.
    # PyTorch's memory, as unaligned rows slow the large passes down.
    rows = x.new_zeros((10, C), dtype=torch.float32)
    c = _PerChannel(*rows.unbind())
    scale, shift, m, r, dot, total, slope, offset, _, one = rows.numpy().reshape(10, G, -1)
    one[:] = 1.0
    w, b = (t.detach().numpy().reshape(G, -1) for t in (weight, bias))
    sums = x.new_zeros((2, C), dtype=torch.float32)
    for i in range(B):
        strips = [
            (x[i : i + 1, :, top:end], dy[i : i + 1, :, top:end], dx[i : i + 1, :, top:end])
            for top, end in ((top, top + step) for top in range(0, H, step))
        ]
        m[:], r[:] = mean[i].numpy()[:, None], rstd[i].numpy()[:, None]
        scale[:] = r * w
        shift[:] = b - m * scale
        dot[:] = total[:] = 0.0
        _before_silu(strips, c)
        sums += rows[4:6]
        share = r * (-G / (C * H * W))
        slope[:] = r * share * np.add.reduce(dot * w, axis=1, keepdims=True)
        offset[:] = share * np.add.reduce(total * w, axis=1, keepdims=True) - m * slope
        _before_norm(strips, c)
    return dx, sums[0], sums[1]


def _before_silu(strips: Sequence[_Strip], c: _PerChannel) -> None:
    """Write dz into dx; sum `dot` and `total`."""
    for x, dy, dz in strips:
        if x.dtype == torch.float32:
            h = torch.addcmul(c.shift.view(-1, 1, 1), x, c.scale.view(-1, 1, 1), out=dz)
        else:
            h = _transform(x, c.scale, c.shift, c)
        _ATEN.silu_backward.grad_input(dy, h, grad_input=dz)
        _, dot, total = _ATEN.native_batch_norm_backward(
            dz, x, None, None, None, c.mean, c.rstd, True, 0.0, [False, True, True]
        )
        c.dot.add_(dot)
        c.total.add_(total)


def _before_norm(strips: Sequence[_Strip], c: _PerChannel) -> None:
    """Replace dz in dx by scale dz + slope x + offset."""
    for x, _, dz in strips:
        scale = c.scale.view(-1, 1, 1)
        if x.dtype == torch.float32:
            torch.addcmul(c.offset.view(-1, 1, 1), dz, scale, out=dz)
            dz.addcmul_(x, c.slope.view(-1, 1, 1))
        else:
            torch.addcmul(_transform(x, c.slope, c.offset, c), dz, scale.to(x.dtype), out=dz)


def _transform(x: Tensor, scale: Tensor, shift: Tensor, c: _PerChannel) -> Tensor:
    """16-bit scale x + shift, rounded once: a normalisation by mean 0 and variance 1."""
    return torch.native_batch_norm(x, scale, shift, c.zero, c.one, False, 0.0, 0.0)[0]
