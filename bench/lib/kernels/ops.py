"""The case of each kernel at the shapes of published models: inputs, implementations, costs.

Bytes count every input and every output of a call once, so a share of bandwidth above 1 means that
caches served it. FLOPs are those of the definition. Sampling is measured in the middle of a
schedule; upstream draws its own noise there, so it is judged without noise and timed with it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lib.kernels import cases, rivals
from torch import Tensor

from titok_fast.kernels.group_norm_silu import group_norm_silu, group_norm_silu_ref
from titok_fast.kernels.guided_sample import guided_sample, guided_sample_ref
from titok_fast.kernels.lm_head_sample import lm_head_sample, lm_head_sample_ref
from titok_fast.kernels.masked_cross_entropy import masked_cross_entropy, masked_cross_entropy_ref
from titok_fast.kernels.nearest_code import nearest_code, nearest_code_ref
from titok_fast.kernels.nearest_code_stats import nearest_code_stats, nearest_code_stats_ref
from titok_fast.kernels.philox import REMASK_STREAM, TOKEN_STREAM, gumbel, row_gumbel
from titok_fast.kernels.remask import remask, remask_ref
from titok_fast.kernels.soft_codes import soft_codes, soft_codes_ref
from titok_fast.sampling.unmask import num_masked

PIXEL_CODES, PIXEL_CHANNELS, PIXEL_GRID = 1024, 256, 16
GUIDANCE, STEP, TEMPERATURE = 2.25, 4, 4.75  # near the middle of a published schedule
_NOISE: dict[str, Any] = {"step": STEP, "noise_temperature": TEMPERATURE}
_GUIDED: dict[str, Any] = _NOISE | {"guidance": GUIDANCE}
_SAMPLE_FLOPS = 50.0  # per logit: two logarithms and the uniform number are 46 of them


def _codes(spec: cases.Spec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Latents that lie near a code, as those of a trained encoder do, and the codebook."""
    m = cases.MODELS[spec.model]
    codebook = torch.randn(m.N, m.C, device=device)
    z = codebook[torch.randint(m.N, (spec.batch * m.K,), device=device)]
    return z + 0.1 * torch.randn_like(z), codebook


def nearest_code_case(spec: cases.Spec, device: torch.device) -> cases.Case:
    """The latents of a batch against the codebook; float32 in every model."""
    m, (z, codebook) = cases.MODELS[spec.model], _codes(spec, device)
    R = len(z)
    library = rivals.vq_library(codebook, m.metric)
    return cases.make_case(
        partial(cases.judge_ids, z=z, codebook=codebook, metric=m.metric),
        ours=partial(nearest_code, z, codebook, metric=m.metric),
        reference=partial(nearest_code_ref, z, codebook, m.metric),
        upstream=partial(rivals.nearest_code_upstream, z, codebook, m.metric),
        **{"vector-quantize-pytorch": partial(library, z) if callable(library) else library},
        bytes_min=4 * R * m.C + 4 * m.N * m.C + 8 * R,
        flops=2.0 * R * m.N * m.C,
    )


def nearest_code_stats_case(spec: cases.Spec, device: torch.device) -> cases.Case:
    """A training step of the quantizer: codes, two losses and their gradients."""
    m = cases.MODELS[spec.model]
    leaves = [x.requires_grad_() for x in _codes(spec, device)]
    R = len(leaves[0])
    reference = partial(nearest_code_stats_ref, metric=m.metric)
    upstream = partial(rivals.nearest_code_stats_upstream, metric=m.metric, beta=0.25)
    want = cases.gradients(reference, [x.detach().double().requires_grad_() for x in leaves])()
    return cases.make_case(
        partial(cases.judge_near, want=want, dtype=torch.float32, terms=m.N),
        ours=cases.gradients(partial(nearest_code_stats, metric=m.metric), leaves),
        reference=cases.gradients(reference, leaves),
        upstream=cases.gradients(upstream, leaves),
        # forward: z in, codes and ids out; backward: their gradient and z in, one of z out;
        # the codebook in, its gradient out, the histogram out
        bytes_min=R * (4 * m.C * 5 + 8) + 8 * m.N * m.C + 8 * m.N,
        flops=2.0 * R * m.N * m.C,
    )


def _sampling_case(
    judge: Callable[..., None], noise: Tensor, upstream: Callable[..., Any], **rest: Any
) -> cases.Case:
    """Ours and the reference are judged with the noise, upstream without."""
    own_noise = cases.Rival(
        partial(upstream, noise_temperature=TEMPERATURE),
        lambda: judge(upstream(noise_temperature=0.0), noise=None),
    )
    return cases.make_case(partial(judge, noise=noise), upstream=own_noise, **rest)


def _guide(cond: Tensor, uncond: Tensor) -> Tensor:
    return cond.double() + GUIDANCE * (cond.double() - uncond.double())


def guided_sample_case(spec: cases.Spec, device: torch.device) -> cases.Case:
    """Guided sampling with half of the tokens known."""
    m, B = cases.MODELS[spec.model], spec.batch
    logits, uncond = (4 * torch.randn(2, B, m.K, m.N, device=device)).to(spec.dtype)
    mask = torch.rand(B, m.K, device=device) < 0.5
    ids = torch.randint(m.N, (B, m.K), device=device)
    seeds, positions = torch.arange(B, device=device), torch.arange(m.K, device=device)
    l = _guide(logits, uncond)[mask]

    def judge(got: tuple[Tensor, Tensor], noise: Tensor | None) -> None:
        assert torch.equal(got[0][~mask], ids[~mask]), "a known token has changed"
        assert bool((got[1][~mask] == torch.inf).all()), "a known token has a finite score"
        # ours works in float32 whatever the logits are
        dtype = spec.dtype if noise is None else torch.float32
        cases.judge_samples((got[0][mask], got[1][mask]), l, noise, dtype)

    return _sampling_case(
        judge,
        TEMPERATURE * gumbel(seeds, STEP, positions, m.N, TOKEN_STREAM)[mask].double(),
        partial(rivals.guided_sample_upstream, logits, uncond, mask, ids, guidance=GUIDANCE),
        ours=partial(guided_sample, logits, uncond, mask=mask, ids=ids, seeds=seeds, **_GUIDED),
        reference=lambda: guided_sample_ref(
            logits, uncond, mask, ids, seeds, None, STEP, GUIDANCE, 1.0, TEMPERATURE, "logit"
        ),
        bytes_min=2 * int(mask.sum()) * m.N * spec.dtype.itemsize + 29 * mask.numel(),
        flops=_SAMPLE_FLOPS * int(mask.sum()) * m.N,
    )


def remask_case(spec: cases.Spec, device: torch.device) -> cases.Case:
    """From the unknown tokens and the schedule's ratio: half of all tokens are masked again."""
    m, B = cases.MODELS[spec.model], spec.batch
    candidates = torch.randint(m.N, (B, m.K), device=device)
    scores = torch.randn(B, m.K, device=device)
    unknown = torch.ones(B, m.K, dtype=torch.bool, device=device)
    seeds, positions = torch.arange(B, device=device), torch.arange(m.K, device=device)

    def ours() -> Tensor:
        count = num_masked(unknown, m.K, 0.5)
        return remask(candidates, scores, count, mask_id=m.N, seeds=seeds, **_NOISE)

    def reference() -> Tensor:
        count = num_masked(unknown, m.K, 0.5)
        return remask_ref(candidates, scores, count, seeds, None, m.N, STEP, TEMPERATURE, "logit")

    def judge(got: Tensor, noise: Tensor | None) -> None:
        confidence = scores.double() if noise is None else scores + noise
        masked = got == m.N
        assert torch.equal(got[~masked], candidates[~masked]), "a kept token has changed"
        assert bool((masked.sum(1) == m.K // 2).all()), "another number of tokens is masked"
        highest = confidence.masked_fill(~masked, -torch.inf).amax(1)
        lowest = confidence.masked_fill(masked, torch.inf).amin(1)
        assert bool((highest <= lowest + 1e-5).all()), "a masked token is surer than a kept one"

    return _sampling_case(
        judge,
        TEMPERATURE * gumbel(seeds, STEP, positions, 1, REMASK_STREAM).squeeze(-1).double(),
        partial(rivals.remask_upstream, candidates, scores, unknown, m.N, 0.5),
        ours=ours,
        reference=reference,
        bytes_min=20 * B * m.K + 16 * B,
        flops=_SAMPLE_FLOPS * B * m.K,
    )


def lm_head_sample_case(spec: cases.Spec, device: torch.device) -> cases.Case:
    """The head and the sampling of every token, as in the first guided step."""
    m = cases.MODELS[spec.model]
    R, width = spec.batch * m.K, spec.dtype.itemsize
    hidden, uncond = torch.randn(2, R, m.D, device=device).to(spec.dtype)
    weight = (0.1 * torch.randn(m.N, m.D, device=device)).to(spec.dtype)
    bias = torch.randn(m.N, device=device).to(spec.dtype)
    seeds = torch.arange(spec.batch, device=device).repeat_interleave(m.K)
    positions = torch.arange(m.K, device=device).repeat(spec.batch)
    tensors = (hidden, uncond, weight, bias)
    l = _guide(hidden, uncond) @ weight.double().T + bias.double()
    return _sampling_case(
        partial(cases.judge_samples, l=l, dtype=spec.dtype),
        TEMPERATURE * row_gumbel(seeds, STEP, positions, m.N, TOKEN_STREAM).double(),
        partial(rivals.lm_head_sample_upstream, *tensors, guidance=GUIDANCE),
        ours=partial(lm_head_sample, *tensors, seeds=seeds, positions=positions, **_GUIDED),
        reference=lambda: lm_head_sample_ref(
            *tensors, None, seeds, positions, STEP, GUIDANCE, 1.0, TEMPERATURE, "logit"
        ),
        bytes_min=width * (2 * R * m.D + m.N * m.D + m.N) + 28 * R,
        flops=2.0 * R * m.N * m.D + _SAMPLE_FLOPS * R * m.N,
    )


def soft_codes_case(spec: cases.Spec, device: torch.device) -> cases.Case:
    """Pixel codes of a batch; channels-first logits for upstream, as its decoder leaves them."""
    M, N, C = spec.batch * PIXEL_GRID**2, PIXEL_CODES, PIXEL_CHANNELS
    logits = (3 * torch.randn(M, N, device=device)).to(spec.dtype)
    codebook = torch.randn(N, C, device=device).to(spec.dtype)
    first = logits.view(spec.batch, PIXEL_GRID, PIXEL_GRID, N).permute(0, 3, 1, 2).contiguous()
    want = torch.softmax(logits.double(), -1) @ codebook.double()

    def judge(got: Tensor) -> None:
        rows = got if got.ndim == 2 else got.permute(0, 2, 3, 1).reshape(M, C)
        cases.judge_near((rows,), (want,), spec.dtype, terms=N)

    return cases.make_case(
        judge,
        ours=partial(soft_codes, logits, codebook),
        reference=partial(soft_codes_ref, logits, codebook),
        upstream=partial(rivals.soft_codes_upstream, first, codebook),
        bytes_min=spec.dtype.itemsize * (M * N + N * C + M * C),
        flops=2.0 * M * N * C,
    )


def group_norm_silu_case(spec: cases.Spec, device: torch.device) -> cases.Case:
    """A block of the pixel decoder, channels-last; upstream's lines also channels-first."""
    C, side = map(int, spec.model.split("x"))
    x = (torch.randn(spec.batch, C, side, side, device=device) + 0.5).to(spec.dtype)
    weight, bias = torch.rand(2, C, device=device) + 0.5
    last = [x.to(memory_format=torch.channels_last), weight.to(spec.dtype), bias.to(spec.dtype)]

    def call(fn: Callable[..., Tensor], tensors: list[Tensor]) -> cases.Call:
        """The op, or with its gradients; a single result in a tuple, as gradients are."""
        if spec.training:
            return cases.gradients(fn, [t.detach().requires_grad_() for t in tensors])
        return lambda: (fn(*tensors),)

    upstream = rivals.group_norm_silu_upstream
    want = call(upstream, [t.double() for t in last])()
    moves, operations = (5, 45.0) if spec.training else (2, 14.0)  # x, y; x, gradient in and out
    return cases.make_case(
        partial(cases.judge_near, want=want, dtype=spec.dtype, terms=C // 32 * side * side),
        ours=call(group_norm_silu, last),
        reference=call(partial(group_norm_silu_ref, groups=32, eps=1e-6), last),
        upstream=call(upstream, last),
        **{"channels-first": call(upstream, [x.contiguous(), *last[1:]])},
        bytes_min=moves * float(x.numel()) * spec.dtype.itemsize,
        flops=operations * x.numel(),
    )


def masked_cross_entropy_case(spec: cases.Spec, device: torch.device) -> cases.Case:
    """A training step of the generator from its last hidden states on: loss and gradients."""
    m = cases.MODELS[spec.model]
    R, dtype = spec.batch * m.K, spec.dtype
    hidden = torch.randn(R, m.D, device=device).to(dtype)
    weight = (0.05 * torch.randn(m.N, m.D, device=device)).to(dtype)
    bias = torch.randn(m.N, device=device).to(dtype)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    fixed = {
        "targets": torch.randint(m.N, (R,), device=device),
        "weights": torch.where(torch.rand(R, device=device) < 0.6, 1.0, 0.1),
    }

    def call(fn: Callable[..., Tensor], **options: int) -> cases.Call:
        return cases.gradients(partial(fn, **fixed, **options), leaves)

    library = rivals.liger_loss(device)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = cases.gradients(partial(masked_cross_entropy_ref, **fixed), wide)()
    return cases.make_case(
        partial(cases.judge_near, want=want, dtype=dtype, terms=m.N),
        ours=call(masked_cross_entropy),
        reference=call(masked_cross_entropy_ref),
        upstream=call(rivals.masked_cross_entropy_upstream, K=m.K),
        **{"liger-kernel": call(library) if callable(library) else library},
        bytes_min=2 * dtype.itemsize * (R * m.D + m.N * m.D + m.N) + 12 * R,
        flops=6.0 * R * m.N * m.D,
    )


BUILDERS: dict[str, Callable[[cases.Spec, torch.device], cases.Case]] = {
    "nearest_code": nearest_code_case,
    "nearest_code_stats": nearest_code_stats_case,
    "guided_sample": guided_sample_case,
    "remask": remask_case,
    "lm_head_sample": lm_head_sample_case,
    "soft_codes": soft_codes_case,
    "group_norm_silu": group_norm_silu_case,
    "masked_cross_entropy": masked_cross_entropy_case,
}
