"""The fast sampler against its definition, and what a sample may depend on."""

import pytest
import torch
from support.tiny_models import CountingForwards, tiny_generator
from test_schedules import MASKED_AFTER
from torch import Tensor

from titok_fast import SamplingConfig
from titok_fast.kernels.philox import REMASK_STREAM, TOKEN_STREAM, gumbel
from titok_fast.models.generator import MaskedGenerator
from titok_fast.sampling import reference
from titok_fast.sampling.schedules import mask_ratio, masked_after
from titok_fast.sampling.unmask import sample, sample_seeds
from titok_fast.sampling_config import GUIDANCE_DECAYS, SCHEDULES


def generate(model: MaskedGenerator, labels: list[int], config: SamplingConfig) -> Tensor:
    return sample(model, labels, sample_seeds(0, len(labels)), config)


@torch.no_grad()
def plain(
    model: MaskedGenerator,
    labels: Tensor,
    seeds: Tensor,
    config: SamplingConfig,
    tokens: Tensor | None = None,
) -> Tensor:
    """Both published samplers, one sample at a time, from their descriptions."""
    K, N, T = model.image_seq_len, model.target_codebook_size, config.num_sample_steps
    out = []
    for i in range(len(labels)):
        ids = torch.full((K,), N) if tokens is None else tokens[i].clone()
        label, unknown = labels[i : i + 1], int((ids == N).sum())
        for s in range(T):
            r, t = (s + 1) / T, config.randomize_temperature * (1 - (s + 1) / T)
            cond, uncond = (model(ids[None], label, cond_drop_prob=p)[0] for p in (0.0, 1.0))
            logits = guided(cond, uncond, config, s)
            if config.softmax_temperature_annealing:
                logits = logits / (0.5 + 0.8 * (1 - r))
            token_noise = gumbel(seeds[i : i + 1], s, torch.arange(K), N, TOKEN_STREAM)[0]
            rank_noise = gumbel(seeds[i : i + 1], s, torch.arange(K), 1, REMASK_STREAM)[0, :, 0]
            titok = config.confidence == "logit"
            drawn = (logits + (t if titok else 1.0) * token_noise).argmax(dim=1)
            score = (logits if titok else logits.log_softmax(dim=1))[range(K), drawn]
            confidence = (score + t * rank_noise).masked_fill(ids != N, torch.inf)
            masked = int((ids == N).sum())
            ids = torch.where(ids == N, drawn, ids)
            share = mask_ratio(config.schedule, r)
            if s < T - 1 and masked:
                L = max(1, min(masked - 1, int((K if titok else unknown) * share)))
                order = [*confidence.sort().values.tolist(), torch.inf]
                again = confidence <= order[L - 1] if titok else confidence < order[L]
                ids = torch.where(again, N, ids)
        out.append(ids)
    return torch.stack(out)


def guided(cond: Tensor, uncond: Tensor, config: SamplingConfig, s: int) -> Tensor:
    T, g = config.num_sample_steps, config.guidance_scale
    if config.guidance_decay == "power-cosine":
        rise = 1 - torch.cos(torch.pi * torch.tensor(s / T) ** config.guidance_scale_pow)
        return uncond + (1 + (g - 1) * rise / 2) * (cond - uncond)
    return cond + (g if config.guidance_decay == "constant" else g * s / T) * (cond - uncond)


@pytest.mark.parametrize("model_type", ["ViT", "UViT"])
@pytest.mark.parametrize("decay", GUIDANCE_DECAYS)
@pytest.mark.parametrize("annealing", [False, True])
def test_fast_equals_reference_without_noise(model_type: str, decay: str, annealing: bool) -> None:
    model, labels = tiny_generator(model_type), torch.tensor([0, 7, 500, 999])
    config = SamplingConfig(8, 4.5, decay, 3.0, 0.0, annealing)
    want = reference.generate(model, labels, config)
    assert torch.equal(sample(model, labels, sample_seeds(3, 4), config), want)
    assert torch.equal(model.generate(labels, 4.5, decay, 3.0, 0.0, annealing, 8), want)
    assert len(want.unique()) > 2  # else the model says too little to tell anything
    part = config.updated(guidance_interval=(0.25, 0.75))
    want_part = reference.generate(model, labels, part)
    assert torch.equal(sample(model, labels, sample_seeds(3, 4), part), want_part)


@pytest.mark.parametrize("T", [1, 2, 8, 64])
@pytest.mark.parametrize("confidence", ["logit", "probability"])
def test_fast_equals_the_plain_loop_on_the_same_noise(confidence: str, T: int) -> None:
    model, seeds = tiny_generator("ViT"), sample_seeds(5, 3)
    config = SamplingConfig(T, 3.0, "linear", 3.0, 2.0, True, "arccos", confidence)
    labels = torch.tensor([1, 2, 3])
    got = sample(model, labels, seeds, config)
    assert torch.equal(got, plain(model, labels, seeds, config))
    assert got.max() < 64


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("decay", GUIDANCE_DECAYS)
@pytest.mark.parametrize("confidence", ["logit", "probability"])
def test_all_settings_on_partial_masks(schedule: str, decay: str, confidence: str) -> None:
    model, seeds = tiny_generator("UViT"), sample_seeds(6, 5)
    config = SamplingConfig(6, 2.5, decay, 2.0, 1.5, False, schedule, confidence)
    labels, tokens = torch.arange(5), torch.randint(64, (5, 8))
    unknown = [8, 5, 2, 1, 0]  # per sample
    for row, count in zip(tokens, unknown, strict=True):
        row[torch.randperm(8)[:count]] = 64
    got = sample(model, labels, seeds, config, tokens)
    known = tokens != 64
    assert torch.equal(got[known], tokens[known])
    assert got.max() < 64
    assert torch.equal(got, plain(model, labels, seeds, config, tokens))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("confidence", ["logit", "probability"])
def test_observed_counts(schedule: str, confidence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked tokens of each sample when the generator is asked, and at the end."""
    seen: list[list[int]] = []
    hidden = MaskedGenerator.hidden

    def spy(model: MaskedGenerator, ids: Tensor, class_ids: Tensor) -> Tensor:
        seen.append((ids == model.mask_token_id).sum(dim=1).tolist())
        return hidden(model, ids, class_ids)

    monkeypatch.setattr(MaskedGenerator, "hidden", spy)
    for K, T in ((32, 8), (8, 12)):
        seen.clear()
        model = tiny_generator("ViT", K=K)
        config = SamplingConfig(T, 0.0, schedule=schedule, confidence=confidence)
        out = generate(model, [4, 5], config)
        seen.append((out == model.mask_token_id).sum(dim=1).tolist())
        want = [K, *masked_after(config, K)]
        assert seen == [[n, n] for n in want]
        assert T != 8 or want[1:] == MASKED_AFTER[K, schedule]


@pytest.mark.parametrize("T", [1, 8])
def test_no_unconditional_pass_where_its_weight_is_zero(T: int) -> None:
    model = tiny_generator("ViT")
    for config, rows in (
        (SamplingConfig(T, 3.0, "linear"), [4] + [8] * (T - 1)),
        (SamplingConfig(T, 6.9, "power-cosine"), [4] + [8] * (T - 1)),
        (SamplingConfig(T, 3.0, "constant"), [8] * T),
        (SamplingConfig(T, 0.0, "constant"), [4] * T),
        (SamplingConfig(T, 1.0, "power-cosine"), [4] * T),
    ):
        with CountingForwards(model) as passes:
            generate(model, [1, 2, 3, 4], config)
        assert passes.rows == rows, config


def joint_counts(ids: Tensor) -> Tensor:
    """(B, K) of 4 codes -> histogram of the pairs of its first three tokens."""
    a, b, c = ids[:, 0], ids[:, 1], ids[:, 2]
    return torch.bincount(a * 16 + b * 4 + c, minlength=64).double()


def distance(a: Tensor, b: Tensor) -> float:
    """Two-sample chi-square over its expectation: 1 if both are draws of one distribution."""
    a, b = joint_counts(a), joint_counts(b)
    used = (a + b) > 0
    return (((a - b) ** 2)[used] / (a + b)[used]).sum().item() / (int(used.sum()) - 1)


@pytest.mark.parametrize("decay", ["constant", "linear"])
def test_fast_and_reference_draw_from_one_distribution(decay: str) -> None:
    model, B = tiny_generator("ViT", K=4, N=4), 6000
    config = SamplingConfig(3, 1.0, decay, 3.0, 1.5)
    labels = torch.full((B,), 17)
    fast = sample(model, labels, sample_seeds(1, B), config)
    want = reference.generate(model, labels, config)
    # 63 degrees of freedom: 1 + 4 standard deviations is 1.71
    assert distance(fast, want) < 1.7
    assert distance(fast, reference.generate(model, labels, config.updated(num_sample_steps=1))) > 3


@pytest.mark.parametrize("model_type", ["ViT", "UViT"])
def test_a_sample_depends_on_its_seed_label_and_settings_only(model_type: str) -> None:
    model, count = tiny_generator(model_type), 32
    config = SamplingConfig(8, 4.5, "linear", 3.0, 9.5, True)
    labels, seeds = torch.arange(count) * 31, sample_seeds(2024, count)
    want = sample(model, labels, seeds, config)
    assert len({tuple(row) for row in want.tolist()}) == count
    for B in (1, 2, 7):
        parts = [
            sample(model, labels[i : i + B], seeds[i : i + B], config) for i in range(0, count, B)
        ]
        assert torch.equal(torch.cat(parts), want), B
    order = torch.randperm(count)
    assert torch.equal(sample(model, labels[order], seeds[order], config), want[order])
    torch.manual_seed(99)  # the global stream plays no part
    assert torch.equal(model.generate(labels, 4.5, "linear", 3.0, 9.5, True, 8, seeds=seeds), want)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_seeds_do_not_depend_on_the_split(ranks: int) -> None:
    whole = sample_seeds(7, 24)
    share = 24 // ranks
    assert torch.equal(torch.cat([sample_seeds(7, share, r * share) for r in range(ranks)]), whole)


def test_seeds_of_runs_share_nothing() -> None:
    runs = [0, 1, 2, -1, 2**63, 2**64 - 2, 0x9E3779B97F4A7C15]
    seeds = torch.cat([sample_seeds(run, 500) for run in runs])
    assert seeds.dtype == torch.int64
    assert len(seeds.unique()) == len(seeds)
    assert sample_seeds(5, 0).shape == (0,)


def test_empty_batch() -> None:
    model = tiny_generator()
    for labels in ([], torch.empty(0, dtype=torch.int64)):
        got = sample(model, labels, sample_seeds(0, 0))
        assert (got.shape, got.dtype) == ((0, 8), torch.int64)
    assert model.generate(torch.empty(0, dtype=torch.int64)).shape == (0, 8)


def test_on_step_is_called_after_each_step() -> None:
    calls: list[int] = []
    model = tiny_generator()
    sample(
        model, [1], sample_seeds(0, 1), SamplingConfig(5), on_step=lambda: calls.append(len(calls))
    )
    assert calls == [0, 1, 2, 3, 4]


def test_bfloat16_draws_valid_ids() -> None:
    model = tiny_generator().to(torch.bfloat16)
    ids = generate(model, [1, 2, 3], SamplingConfig(4, 4.5, "linear"))
    assert (ids.dtype, bool(((ids >= 0) & (ids < 64)).all())) == (torch.int64, True)


def test_wrong_labels_are_named() -> None:
    model, seeds = tiny_generator(), sample_seeds(0, 2)
    for labels, message in (
        ([0, 1000], r"labels lie in 0\.\.999; got 0\.\.1000"),
        ([-1, 3], r"labels lie in 0\.\.999; got -1\.\.3"),
        ([0.5, 1.0], r"labels want shape \(B,\), integers; got \(2,\) torch\.float32"),
        ([[1], [2]], r"labels want shape \(B,\), integers; got \(2, 1\)"),
        ([True, False], r"integers; got \(2,\) torch\.bool"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(model, torch.tensor(labels), seeds)
        with pytest.raises(ValueError, match=message):
            model.generate(torch.tensor(labels))


def test_wrong_seeds_and_tokens_are_named() -> None:
    model, seeds = tiny_generator(), sample_seeds(0, 2)
    for bad in (seeds[:1], seeds.int(), seeds.float()):
        with pytest.raises(ValueError, match=r"seeds want shape \(2,\) int64, one per label; got"):
            sample(model, [1, 2], bad)
    for tokens, message in (
        (torch.zeros(2, 7).long(), r"tokens want shape \(2, 8\), integers; got \(2, 7\)"),
        (torch.zeros(2, 8), r"integers; got \(2, 8\) torch\.float32"),
        (torch.full((2, 8), 65), r"tokens lie in 0\.\.63, or 64 where one is to be drawn; got 65"),
        (torch.full((2, 8), -1), r"got -1\.\.-1"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(model, [1, 2], seeds, tokens=tokens)


@pytest.mark.parametrize("change", [{"schedule": "cosine"}, {"confidence": "probability"}])
def test_reference_refuses_what_upstream_lacks(change: dict[str, str]) -> None:
    config = SamplingConfig().updated(**change)
    with pytest.raises(ValueError, match=r"reference sampler knows schedule 'arccos'.*got"):
        reference.generate(tiny_generator(), torch.tensor([1]), config)
