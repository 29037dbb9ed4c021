"""The sampling kernels at the shapes of published generators, as kernel_ops.py has the others.

Upstream draws its own noise, so it is judged with none and timed with it.
"""

from collections.abc import Callable
from functools import partial

import torch
from lib.kernels import rivals as rivals
from lib.kernels.cases import MODELS, Case, Rival, Spec, judge_draws, judged
from torch import Tensor

from titok_fast.kernels.guided_sample import guided_sample, guided_sample_ref
from titok_fast.kernels.lm_head_sample import lm_head_sample, lm_head_sample_ref
from titok_fast.kernels.philox import REMASK_STREAM, TOKEN_STREAM, gumbel, row_gumbel
from titok_fast.kernels.remask import remask, remask_ref
from titok_fast.sampling.unmask import num_masked

GUIDANCE, STEP, TEMPERATURE = 2.25, 4, 4.75  # near the middle of a published schedule


def guided_sample_case(spec: Spec, device: torch.device) -> Case:
    """A guided draw in the middle of sampling, half of the tokens known."""
    m, B = MODELS[spec.model], spec.batch
    logits, uncond = (4 * torch.randn(2, B, m.K, m.N, device=device)).to(spec.dtype)
    mask = torch.rand(B, m.K, device=device) < 0.5
    ids = torch.randint(m.N, (B, m.K), device=device)
    seeds = torch.arange(B, device=device)

    def ours() -> tuple[Tensor, Tensor]:
        return guided_sample(
            logits, uncond, mask=mask, ids=ids, seeds=seeds, step=STEP, guidance=GUIDANCE,
            noise_temperature=TEMPERATURE,
        )  # fmt: skip

    def reference() -> tuple[Tensor, Tensor]:
        return guided_sample_ref(
            logits, uncond, mask, ids, seeds, None, STEP, GUIDANCE, 1.0, TEMPERATURE, "logit"
        )

    upstream = partial(rivals.guided_sample_upstream, logits, uncond, mask, ids, guidance=GUIDANCE)
    l = _mixed(logits, uncond)[mask]
    positions = torch.arange(m.K, device=device)
    noise = TEMPERATURE * gumbel(seeds, STEP, positions, m.N, TOKEN_STREAM)[mask].double()

    def judge(got: tuple[Tensor, Tensor], drawn: Tensor | None = noise) -> None:
        assert torch.equal(got[0][~mask], ids[~mask]), "a known token was not kept"
        assert bool((got[1][~mask] == torch.inf).all()), "a known token has a finite score"
        # ours works in float32 whatever the logits are
        dtype = torch.float32 if drawn is not None else spec.dtype
        judge_draws((got[0][mask], got[1][mask]), l, drawn, dtype)

    masked = int(mask.sum())
    return Case(
        judged({"ours": ours, "reference": reference}, judge)
        | {"upstream": _drawing_upstream(upstream, partial(judge, drawn=None))},
        judge,
        bytes_min=2 * masked * m.N * spec.dtype.itemsize + 29 * mask.numel(),
        flops=50.0 * masked * m.N,  # two logarithms and the uniform are 46 of them
    )


def _mixed(cond: Tensor, uncond: Tensor) -> Tensor:
    return cond.double() + GUIDANCE * (cond.double() - uncond.double())


def _drawing_upstream(call: Callable[..., object], judge: Callable[..., None]) -> Rival:
    """Upstream draws its own noise: judged without any, timed with it."""
    return Rival(
        partial(call, noise_temperature=TEMPERATURE), lambda: judge(call(noise_temperature=0.0))
    )


def remask_case(spec: Spec, device: torch.device) -> Case:
    """From the unknown tokens and the schedule's ratio: half of all tokens are masked again."""
    m, B = MODELS[spec.model], spec.batch
    candidates = torch.randint(m.N, (B, m.K), device=device)
    scores = torch.randn(B, m.K, device=device)
    unknown = torch.ones(B, m.K, dtype=torch.bool, device=device)
    seeds = torch.arange(B, device=device)
    positions = torch.arange(m.K, device=device)
    noise = TEMPERATURE * gumbel(seeds, STEP, positions, 1, REMASK_STREAM).squeeze(-1).double()

    def ours() -> Tensor:
        return remask(
            candidates, scores, num_masked(unknown, m.K, 0.5), mask_id=m.N, seeds=seeds, step=STEP,
            noise_temperature=TEMPERATURE,
        )  # fmt: skip

    def reference() -> Tensor:
        count = num_masked(unknown, m.K, 0.5)
        return remask_ref(
            candidates, scores, count, seeds, None, m.N, STEP, TEMPERATURE, "logit"
        )  # fmt: skip

    def judge(got: Tensor, drawn: Tensor | None = noise) -> None:
        confidence = scores.double() if drawn is None else scores + drawn
        masked = got == m.N
        assert torch.equal(got[~masked], candidates[~masked]), "a kept token has changed"
        assert bool((masked.sum(1) == m.K // 2).all()), "another number of tokens is masked"
        highest = confidence.masked_fill(~masked, -torch.inf).amax(1)
        lowest = confidence.masked_fill(masked, torch.inf).amin(1)
        assert bool((highest <= lowest + 1e-5).all()), "a masked token is surer than a kept one"

    upstream = partial(rivals.remask_upstream, candidates, scores, unknown, m.N, 0.5)
    return Case(
        judged({"ours": ours, "reference": reference}, judge)
        | {"upstream": _drawing_upstream(upstream, partial(judge, drawn=None))},
        judge,
        bytes_min=20 * B * m.K + 16 * B,
        flops=50.0 * B * m.K,
    )


def lm_head_sample_case(spec: Spec, device: torch.device) -> Case:
    """The head and the draw for every token, as in the first guided step."""
    m = MODELS[spec.model]
    R = spec.batch * m.K
    hidden, uncond = torch.randn(2, R, m.D, device=device).to(spec.dtype)
    weight = (0.1 * torch.randn(m.N, m.D, device=device)).to(spec.dtype)
    bias = torch.randn(m.N, device=device).to(spec.dtype)
    seeds = torch.arange(spec.batch, device=device).repeat_interleave(m.K)
    positions = torch.arange(m.K, device=device).repeat(spec.batch)
    tensors = (hidden, uncond, weight, bias)

    def ours() -> tuple[Tensor, Tensor]:
        return lm_head_sample(
            *tensors, seeds=seeds, positions=positions, step=STEP, guidance=GUIDANCE,
            noise_temperature=TEMPERATURE,
        )  # fmt: skip

    def reference() -> tuple[Tensor, Tensor]:
        return lm_head_sample_ref(
            *tensors, None, seeds, positions, STEP, GUIDANCE, 1.0, TEMPERATURE, "logit"
        )

    l = _mixed(hidden, uncond) @ weight.double().T + bias.double()
    noise = TEMPERATURE * row_gumbel(seeds, STEP, positions, m.N, TOKEN_STREAM).double()
    judge = partial(judge_draws, l=l, noise=noise, dtype=spec.dtype)
    upstream = partial(rivals.lm_head_sample_upstream, *tensors, guidance=GUIDANCE)
    greedy = partial(judge_draws, l=l, noise=None, dtype=spec.dtype)
    width = spec.dtype.itemsize
    return Case(
        judged({"ours": ours, "reference": reference}, judge)
        | {"upstream": _drawing_upstream(upstream, greedy)},
        judge,
        bytes_min=width * (2 * R * m.D + m.N * m.D + m.N) + 28 * R,
        flops=2.0 * R * m.N * m.D + 50.0 * R * m.N,
    )
