"""remask: both rules with their ties, and the kernel against them."""

from types import SimpleNamespace

import pytest
import torch
from calls import any_seeds, cases
from hypothesis import strategies as st
from torch import Tensor

from titok_fast.kernels._launch import runs_triton
from titok_fast.kernels._sampling import RULES
from titok_fast.kernels.philox import REMASK_STREAM, gumbel
from titok_fast.kernels.remask import MAX_TOKENS, remask, remask_ref

MASK_ID = 4096
INF = float("inf")


def plain_remask(
    candidates: Tensor, confidence: Tensor, num_masked: Tensor, rule: str
) -> list[list[int]]:
    """The definition on Python numbers; known tokens have confidence +inf."""
    out = []
    for ids, values, n in zip(
        candidates.tolist(), confidence.tolist(), num_masked.tolist(), strict=True
    ):
        ascending = sorted(values)
        if rule == "logit":
            cutoff = ascending[max(1, min(n, len(values))) - 1]
            gone = [n > 0 and v <= cutoff and v != INF for v in values]
        else:
            cutoff = ascending[n] if 0 <= n < len(values) else INF
            gone = [n > 0 and v < cutoff for v in values]
        out.append([MASK_ID if g else i for g, i in zip(gone, ids, strict=True)])
    return out


@cases(
    B=st.integers(0, 3),
    K=st.one_of(st.integers(1, 9), st.sampled_from((31, 32, 33, 127))),
    known=st.sampled_from((0.0, 0.4, 1.0)),
    values=st.sampled_from(("normal", "ties", "equal", "infinite", "subnormal")),
    source=st.sampled_from(("counter", "given", "none")),
    rule=st.sampled_from(RULES),
    strided=st.booleans(),
)
def test_follows_the_definition(op_device: torch.device, case: SimpleNamespace) -> None:
    B, K, values, source, rule = case.B, case.K, case.values, case.source, case.rule
    scores = torch.randn(B, K) * 3
    if values == "ties":
        scores = scores.round()
    elif values == "equal":
        scores = torch.full((B, K), 0.25)
    elif values == "infinite":
        scores[torch.rand(B, K) < 0.3] = -INF
    elif values == "subnormal":
        scores *= 1e-39
    scores[torch.rand(B, K) < case.known] = INF
    candidates = torch.randint(MASK_ID, (B, K))
    num_masked = torch.randint(K + 2, (B,))
    seeds = any_seeds(B)
    noise = gumbel(seeds, 3, torch.arange(K), 1, REMASK_STREAM).squeeze(-1)
    given = None
    if source == "given":
        given = noise = noise.round()  # keeps ties
    if case.strided:
        scores, candidates = (x.T.contiguous().T for x in (scores, candidates))
        seeds, num_masked = (x.repeat_interleave(2)[::2] for x in (seeds, num_masked))
    t = 0.0 if source == "none" else 2.0
    moved = [x.to(op_device) for x in (candidates, scores, num_masked)]
    options = {"seeds": seeds.to(op_device), "step": 3, "noise_temperature": t, "rule": rule}
    options |= {"noise": None if given is None else given.to(op_device)}
    got = remask(*moved, mask_id=MASK_ID, **options)
    confidence = scores if t == 0.0 else scores + t * noise
    if source == "counter":
        assert_cut_where_expected(got.cpu(), candidates, confidence, num_masked, rule)
    else:
        assert got.tolist() == plain_remask(candidates, confidence, num_masked, rule)
    if not runs_triton(got):  # NumPy, with the very noise of the reference
        plain = remask_ref(candidates, scores, num_masked, seeds, given, MASK_ID, 3, t, rule)
        assert torch.equal(got, plain)


def assert_cut_where_expected(
    got: Tensor, candidates: Tensor, confidence: Tensor, num_masked: Tensor, rule: str
) -> None:
    """Equal, except for tokens whose confidence is within rounding of the cutoff."""
    want = torch.tensor(plain_remask(candidates, confidence, num_masked, rule), dtype=torch.int64)
    for b, k in (got != want.view_as(got)).nonzero().tolist():
        others = torch.cat([confidence[b, :k], confidence[b, k + 1 :]])
        assert (others - confidence[b, k]).abs().min() < 1e-5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("K", [257, MAX_TOKENS])
def test_many_tokens(op_device: torch.device, K: int, rule: str) -> None:
    candidates, scores = torch.randint(MASK_ID, (2, K)), (torch.randn(2, K) * 50).round()
    scores[torch.rand(2, K) < 0.3] = INF
    num_masked = torch.tensor([K // 3, 7])
    moved = [x.to(op_device) for x in (candidates, scores, num_masked)]
    ids = remask(*moved, mask_id=MASK_ID, noise_temperature=0.0, rule=rule)
    assert ids.tolist() == plain_remask(candidates, scores, num_masked, rule)


@pytest.mark.parametrize(
    ("rule", "num_masked", "masked"),
    [
        ("logit", 2, [1, 3]),
        ("logit", 3, [1, 3, 4, 5]),  # ties at the cut-off enlarge the mask
        ("logit", 4, [1, 3, 4, 5]),
        ("probability", 2, [1, 3]),
        ("probability", 3, [1, 3]),  # and shrink it
        ("probability", 4, [1, 3, 4, 5]),
        ("logit", 0, []),
        ("probability", 0, []),
        ("logit", 5, [0, 1, 3, 4, 5]),
        ("probability", 5, [0, 1, 3, 4, 5]),
        ("logit", 99, [0, 1, 3, 4, 5]),  # more than are unknown: the known one stays
        ("probability", 99, [0, 1, 3, 4, 5]),
    ],
)
def test_ties_and_ends(
    op_device: torch.device, rule: str, num_masked: int, masked: list[int]
) -> None:
    scores = torch.tensor([[9.0, -2.0, INF, 0.0, 3.0, 3.0]], device=op_device)
    candidates = torch.arange(6, device=op_device)[None]
    n = torch.tensor([num_masked], device=op_device)
    ids = remask(candidates, scores, n, mask_id=MASK_ID, noise_temperature=0.0, rule=rule)
    assert (ids == MASK_ID).nonzero()[:, 1].tolist() == masked
    assert torch.equal(ids[ids != MASK_ID], candidates[ids != MASK_ID])


@pytest.mark.parametrize("rule", RULES)
def test_negative_count_masks_none_in_the_kernel(device: torch.device, rule: str) -> None:
    scores, candidates = torch.randn(1, 6, device=device), torch.arange(6, device=device)[None]
    n = torch.tensor([-3], device=device)
    ids = remask(candidates, scores, n, mask_id=MASK_ID, noise_temperature=0.0, rule=rule)
    assert torch.equal(ids, candidates)


@pytest.mark.parametrize("rule", RULES)
def test_noise_of_minus_infinity_masks_no_known_token(op_device: torch.device, rule: str) -> None:
    scores = torch.tensor([[INF, 1.0, 2.0]], device=op_device)
    noise, count = torch.full_like(scores, -INF), torch.tensor([3], device=op_device)
    options = {"noise_temperature": 1.0, "noise": noise, "rule": rule}
    ids = remask(torch.zeros_like(scores).long(), scores, count, mask_id=7, **options)
    assert ids[0, 0] == 0
