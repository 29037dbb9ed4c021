"""guided_sample: the official arithmetic, and the kernel against the reference."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calls import DTYPES, any_seeds, assert_same_draws, cases
from hypothesis import strategies as st
from torch import Tensor

from titok_fast.kernels._sampling import RULES
from titok_fast.kernels.guided_sample import guided_sample, guided_sample_ref
from titok_fast.kernels.philox import TOKEN_STREAM, gumbel


def laid_out(x: Tensor, layout: str) -> Tensor:
    B, K, N = x.shape
    if layout == "sliced":  # as a generator returns them, class token and special ids cut off
        big = x.new_full((B, K + 1, N + 3), float("nan"))
        big[:, 1:, :N] = x
        return big[:, 1:, :N]
    if layout == "transposed":
        return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return x


def filled(shape: tuple[int, ...], values: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape) * 4
    if values == "equal":
        x = torch.full(shape, 1.5)
    elif values == "one +inf":
        x[..., -1] = float("inf")
    elif values == "mostly -inf":
        x[..., 1:] = float("-inf")
    elif values == "forbidden":
        x[..., 1:][torch.rand(x[..., 1:].shape) < 0.5] = float("-inf")
    elif values == "all -inf":
        x = torch.full(shape, float("-inf"))
    elif values == "subnormal":
        x *= 1e-39
    elif values == "huge":
        x *= torch.finfo(dtype).max / 32
    return x.to(dtype)


@cases(
    B=st.integers(0, 3),
    K=st.sampled_from((1, 2, 5)),
    N=st.one_of(st.integers(1, 9), st.sampled_from((31, 128, 997, 2048, 2049, 4099))),
    dtype=st.sampled_from(DTYPES),
    values=st.sampled_from(("normal", "equal", "mostly -inf", "forbidden", "subnormal", "huge")),
    layout=st.sampled_from(("contiguous", "sliced", "transposed")),
    guidance=st.sampled_from((None, None, -0.5, 0.0, 2.25, 2.25)),  # None: without uncond_logits
    source=st.sampled_from(("counter", "given", "none")),
    temperature=st.sampled_from((0.5, 1.0, 1.2)),
    rule=st.sampled_from(RULES),
    known=st.sampled_from((0.0, 0.4, 1.0)),
)
def test_kernel_follows_the_reference(device: torch.device, case: SimpleNamespace) -> None:
    B, K, N, dtype, values = case.B, case.K, case.N, case.dtype, case.values
    layout, guidance, rule = case.layout, case.guidance, case.rule
    cond, uncond = filled((B, K, N), values, dtype), None
    if guidance is not None:
        uncond = torch.randn(B, K, N).to(dtype)
        if values == "forbidden":  # in both streams; of "mostly -inf" in one
            uncond[cond == float("-inf")] = float("-inf")
        uncond = laid_out(uncond, layout).to(device)
    logits, guidance = laid_out(cond, layout).to(device), guidance or 0.0
    mask = torch.rand(B, K, device=device) >= case.known
    ids = torch.randint(N, (B, K), device=device)
    seeds = any_seeds(B, device)
    noise = gumbel(seeds, 3, torch.arange(K, device=device), N, TOKEN_STREAM)
    noise_temperature = 0.0 if case.source == "none" else 4.75
    given = noise if case.source == "given" else None
    options = {"mask": mask, "ids": ids, "seeds": seeds, "step": 3, "guidance": guidance}
    options |= {"softmax_temperature": case.temperature, "noise_temperature": noise_temperature}
    got = guided_sample(logits, uncond, **options, rule=rule, noise=given)
    common = (mask, ids, seeds, given, 3, guidance, case.temperature, noise_temperature, rule)
    want = guided_sample_ref(logits, uncond, *common)
    assert torch.equal(got[0][~mask], ids[~mask])
    assert (got[1][~mask] == float("inf")).all()
    l = logits.float()
    if uncond is not None:
        l = torch.where(l == float("-inf"), l, l + guidance * (l - uncond.float()))
    exact = values == "equal" and case.source != "counter" and uncond is None
    chosen = [(x[mask], y[mask]) for x, y in (got, want)]
    assert values != "forbidden" or not got[1].isnan().any()
    noisy = (l / case.temperature + noise_temperature * noise)[mask]
    assert_same_draws(noisy, chosen[0], chosen[1], 0.0 if exact else 1e-5)


def draw(logits: Tensor, uncond: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """guided_sample with every token masked, greedy unless the options say otherwise."""
    mask = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    options = {"noise_temperature": 0.0} | options
    return guided_sample(logits, uncond, mask=mask, ids=mask.long(), **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("values", ["all -inf", "one +inf"])
def test_infinite_logits(device: torch.device, values: str, rule: str) -> None:
    logits = filled((2, 3, 11), values, torch.float32).to(device)
    candidates, scores = draw(logits, seeds=any_seeds(2, device), noise_temperature=2.0, rule=rule)
    assert (candidates == (0 if values == "all -inf" else 10)).all()
    if rule == "logit":
        assert (scores == logits[0, 0, -1]).all()


@pytest.mark.parametrize("guidance", [-1.5, 0.0, 2.0])
@pytest.mark.parametrize("rule", RULES)
def test_forbidden_stays_forbidden(op_device: torch.device, rule: str, guidance: float) -> None:
    inf = torch.inf
    logits = torch.tensor([[[-inf, -inf, 1.0, 3.0, -inf]]], device=op_device)
    uncond = torch.tensor([[[-inf, 0.0, 0.5, 2.5, inf]]], device=op_device)
    candidates, scores = draw(logits, uncond, guidance=guidance, rule=rule)
    l = torch.tensor([1.0, 3.0]) + guidance * 0.5
    want = l if rule == "logit" else l.log_softmax(0)
    assert candidates.item() == 3
    assert scores.item() == pytest.approx(want[1].item(), rel=1e-5, abs=1e-5)


def test_a_code_forbidden_only_without_condition_wins(op_device: torch.device) -> None:
    """Its logit minus -inf is +inf; without guidance it has no effect."""
    logits = torch.tensor([[[1.0, 0.0]]], device=op_device)
    uncond = torch.tensor([[[1.0, -torch.inf]]], device=op_device)
    for guidance, code, score in ((0.0, 0, 1.0), (0.5, 1, torch.inf)):
        assert [x.item() for x in draw(logits, uncond, guidance=guidance)] == [code, score]


def test_nan_logits_give_codes_in_range(device: torch.device) -> None:
    candidates, _ = draw(torch.full((1, 2, 5), torch.nan, device=device))
    assert ((candidates >= 0) & (candidates < 5)).all()


def test_first_of_equal_codes_wins(op_device: torch.device) -> None:
    logits = torch.zeros(1, 3, 5000, device=op_device)
    logits[0, 1, [4999, 4000, 70]] = 2.0
    logits[0, 2, [2048, 2047]] = 2.0
    candidates, scores = draw(logits)
    assert candidates.tolist() == [[0, 70, 2047]]
    assert scores.tolist() == [[0.0, 2.0, 2.0]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("step", range(8))
def test_official_arithmetic_on_given_noise(step: int, rule: str) -> None:
    """Steps 3 to 6 of `ImageBert.generate` at T = 8, one token after the other, in float64."""
    ratio = (step + 1) / 8
    guidance, t, anneal = 4.5 * step / 8, 9.5 * (1 - ratio), 0.5 + 0.8 * (1 - ratio)
    cond, uncond, noise = torch.randn(3, 4, 50), torch.randn(3, 4, 50), -torch.rand(3, 4, 50).log()
    mask, ids = torch.rand(3, 4) < 0.6, torch.randint(50, (3, 4))
    options = {"mask": mask, "ids": ids, "noise": noise, "guidance": guidance, "rule": rule}
    options |= {"softmax_temperature": anneal, "noise_temperature": t}
    candidates, scores = guided_sample(cond, uncond, **options)
    for b in range(3):
        for k in range(4):
            if not mask[b, k]:
                assert candidates[b, k] == ids[b, k]
                assert scores[b, k] == float("inf")
                continue
            l = cond[b, k].double() + guidance * (cond[b, k].double() - uncond[b, k].double())
            l = l / anneal
            winner = max(range(50), key=lambda n: (l[n] + t * noise[b, k, n].double()).item())
            score = l[winner]
            if rule == "probability":
                score = (l.exp() / l.exp().sum())[winner].log()
            assert candidates[b, k] == winner
            assert scores[b, k].item() == pytest.approx(score.item(), rel=1e-5, abs=1e-5)
