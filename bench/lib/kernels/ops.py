"""Each kernel at the shapes of published models: inputs, rivals for the same work, bytes, FLOPs.

Bytes count every input and every output of a call once, so a share of bandwidth above 1 means that
caches served it. FLOPs are those of the definition.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lib.kernels import rivals as rivals
from lib.kernels.cases import (
    MODELS,
    Call,
    Case,
    Spec,
    gradients,
    judge_ids,
    judge_near,
    judged,
)
from lib.kernels.draws import guided_sample_case, lm_head_sample_case, remask_case
from torch import Tensor

from titok_fast.kernels.group_norm_silu import group_norm_silu, group_norm_silu_ref
from titok_fast.kernels.masked_cross_entropy import masked_cross_entropy, masked_cross_entropy_ref
from titok_fast.kernels.nearest_code import nearest_code, nearest_code_ref
from titok_fast.kernels.nearest_code_stats import nearest_code_stats, nearest_code_stats_ref
from titok_fast.kernels.soft_codes import soft_codes, soft_codes_ref

PIXEL_CODES, PIXEL_CHANNELS, PIXEL_GRID = 1024, 256, 16


def _codes(spec: Spec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Latents that lie near a code, as those of a trained encoder do, and the codebook."""
    m = MODELS[spec.model]
    codebook = torch.randn(m.N, m.C, device=device)
    z = codebook[torch.randint(m.N, (spec.batch * m.K,), device=device)]
    return z + 0.1 * torch.randn_like(z), codebook


def nearest_code_case(spec: Spec, device: torch.device) -> Case:
    """The latents of a batch against the codebook; float32 in every model."""
    m, (z, codebook) = MODELS[spec.model], _codes(spec, device)
    R = len(z)
    calls: dict[str, Call] = {
        "ours": partial(nearest_code, z, codebook, metric=m.metric),
        "reference": partial(nearest_code_ref, z, codebook, m.metric),
        "upstream": partial(rivals.nearest_code_upstream, z, codebook, m.metric),
    }
    library = rivals.vq_library(codebook, m.metric)
    if callable(library):
        calls["vector-quantize-pytorch"] = partial(library, z)
    judge = partial(judge_ids, z=z, codebook=codebook, metric=m.metric)
    return Case(
        judged(calls, judge),
        judge,
        bytes_min=4 * R * m.C + 4 * m.N * m.C + 8 * R,
        flops=2.0 * R * m.N * m.C,
        absent={"vector-quantize-pytorch": library} if isinstance(library, str) else {},
    )


def nearest_code_stats_case(spec: Spec, device: torch.device) -> Case:
    """A training step of the quantizer: codes, two losses and their gradients."""
    m = MODELS[spec.model]
    leaves = [x.requires_grad_() for x in _codes(spec, device)]
    R, beta = len(leaves[0]), 0.25
    calls = {
        "ours": gradients(partial(nearest_code_stats, metric=m.metric), leaves),
        "reference": gradients(partial(nearest_code_stats_ref, metric=m.metric), leaves),
        "upstream": gradients(
            partial(rivals.nearest_code_stats_upstream, metric=m.metric, beta=beta), leaves
        ),
    }
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = gradients(partial(nearest_code_stats_ref, metric=m.metric), wide)()
    judge = partial(judge_near, want=want, dtype=torch.float32, terms=m.N)
    return Case(
        judged(calls, judge),
        judge,
        # forward: z in, codes and ids out; backward: their gradient and z in, one of z out;
        # the codebook in, its gradient out, the histogram out
        bytes_min=R * (4 * m.C * 5 + 8) + 8 * m.N * m.C + 8 * m.N,
        flops=2.0 * R * m.N * m.C,
    )


def soft_codes_case(spec: Spec, device: torch.device) -> Case:
    """Pixel codes of a batch; channels-first logits for upstream, as its decoder leaves them."""
    M, N, C = spec.batch * PIXEL_GRID**2, PIXEL_CODES, PIXEL_CHANNELS
    logits = (3 * torch.randn(M, N, device=device)).to(spec.dtype)
    codebook = torch.randn(N, C, device=device).to(spec.dtype)
    first = logits.view(spec.batch, PIXEL_GRID, PIXEL_GRID, N).permute(0, 3, 1, 2).contiguous()
    calls: dict[str, Call] = {
        "ours": partial(soft_codes, logits, codebook),
        "reference": partial(soft_codes_ref, logits, codebook),
        "upstream": partial(rivals.soft_codes_upstream, first, codebook),
    }
    want = torch.softmax(logits.double(), -1) @ codebook.double()

    def judge(got: Tensor) -> None:
        rows = got if got.ndim == 2 else got.permute(0, 2, 3, 1).reshape(M, C)
        judge_near((rows,), (want,), spec.dtype, terms=N)

    width = spec.dtype.itemsize
    moved, flops = width * (M * N + N * C + M * C), 2.0 * M * N * C
    return Case(judged(calls, judge), judge, moved, flops)


def group_norm_silu_case(spec: Spec, device: torch.device) -> Case:
    """A block of the pixel decoder, channels-last; upstream's lines also channels-first."""
    C, side = map(int, spec.model.split("x"))
    x = (torch.randn(spec.batch, C, side, side, device=device) + 0.5).to(spec.dtype)
    weight, bias = torch.rand(2, C, device=device) + 0.5
    last = [x.to(memory_format=torch.channels_last), weight.to(spec.dtype), bias.to(spec.dtype)]
    first = [x.contiguous(), *last[1:]]
    layouts = {"ours": last, "reference": last, "upstream": last, "channels-first": first}
    ways: dict[str, Callable[..., Tensor]] = {
        "ours": group_norm_silu,
        "reference": partial(group_norm_silu_ref, groups=32, eps=1e-6),
        "upstream": rivals.group_norm_silu_upstream,
        "channels-first": rivals.group_norm_silu_upstream,
    }
    wide = [t.double() for t in last]
    if spec.training:
        for leaves in (last, first, wide):
            leaves[:] = [t.detach().requires_grad_() for t in leaves]
    calls = {name: _call(fn, layouts[name], spec.training) for name, fn in ways.items()}
    want = _call(rivals.group_norm_silu_upstream, wide, spec.training)()

    def judge(got: Any) -> None:  # one tensor, or the gradients
        results, truth = (got, want) if spec.training else ([got], [want])
        judge_near(results, truth, spec.dtype, terms=C // 32 * side * side)

    passes = 5 if spec.training else 2  # x, y; and x, gradient in, gradient out
    numbers = float(x.numel())
    moved = passes * numbers * spec.dtype.itemsize
    return Case(judged(calls, judge), judge, moved, (45 if spec.training else 14) * numbers)


def _call(fn: Callable[..., Tensor], tensors: Sequence[Tensor], training: bool) -> Call:
    return gradients(fn, tensors) if training else partial(fn, *tensors)


def masked_cross_entropy_case(spec: Spec, device: torch.device) -> Case:
    """A training step of the generator from its last hidden states on: loss and gradients."""
    m = MODELS[spec.model]
    R, dtype = spec.batch * m.K, spec.dtype
    hidden = torch.randn(R, m.D, device=device).to(dtype)
    weight = (0.05 * torch.randn(m.N, m.D, device=device)).to(dtype)
    bias = torch.randn(m.N, device=device).to(dtype)
    targets = torch.randint(m.N, (R,), device=device)
    weights = torch.where(torch.rand(R, device=device) < 0.6, 1.0, 0.1)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    fixed = {"targets": targets, "weights": weights}
    ways: dict[str, Callable[..., Tensor]] = {
        "ours": partial(masked_cross_entropy, **fixed),
        "reference": partial(masked_cross_entropy_ref, **fixed),
        "upstream": partial(rivals.masked_cross_entropy_upstream, **fixed, K=m.K),
    }
    library = rivals.liger_loss(device)
    if callable(library):
        ways["liger-kernel"] = partial(library, **fixed)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = gradients(partial(masked_cross_entropy_ref, **fixed), wide)()
    judge = partial(judge_near, want=want, dtype=dtype, terms=m.N)
    head = m.N * m.D + m.N
    return Case(
        judged({name: gradients(fn, leaves) for name, fn in ways.items()}, judge),
        judge,
        bytes_min=2 * dtype.itemsize * (R * m.D + head) + 12 * R,
        flops=6.0 * R * m.N * m.D,
        absent={"liger-kernel": library} if isinstance(library, str) else {},
    )


BUILDERS: dict[str, Callable[[Spec, torch.device], Case]] = {
    "nearest_code": nearest_code_case,
    "nearest_code_stats": nearest_code_stats_case,
    "guided_sample": guided_sample_case,
    "remask": remask_case,
    "lm_head_sample": lm_head_sample_case,
    "soft_codes": soft_codes_case,
    "group_norm_silu": group_norm_silu_case,
    "masked_cross_entropy": masked_cross_entropy_case,
}
