"""Masks, dropped labels and the generator's loss: float64 counts, upstream, formulas by hand."""

from math import pi
from types import SimpleNamespace

import pytest
import torch
from support.official import needs_upstream, official
from torch import Tensor, nn

from titok_fast.models.generator import ImageBert
from titok_fast.sampling import masking as module
from titok_fast.sampling.masking import (
    Noise,
    draw_noise,
    drop_labels,
    mask_counts,
    mask_tokens,
    masked_accuracy,
    masked_token_loss,
    token_weights,
)
from titok_fast.sampling.schedules import mask_ratio
from titok_fast.sampling_config import SCHEDULES

B, K, D, N = 6, 16, 24, 40


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("K", [4, 16, 32, 256])
def test_counts_follow_the_schedules_of_sampling(schedule: str, K: int) -> None:
    u = torch.linspace(0, 1, 997)[1:]  # upstream's arccos of exactly 1 is 0, clipped
    exact = [K * max(mask_ratio(schedule, float(v)), 1e-6) for v in u]
    got = mask_counts(u, K, schedule)
    # where float32 may fall on the other side of a half, either neighbour will do
    for count, value in zip(got.tolist(), exact, strict=True):
        assert abs(count - value) <= 0.5 + 1e-5 * K or (value < 0.5 and count == 1)
    assert got.min() == 1
    assert got.max() <= K


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_uniform_of_zero_masks_all_and_near_one_masks_one(schedule: str) -> None:
    u = torch.tensor([0.0, 1 - 2**-24])
    assert mask_counts(u, 32, schedule).tolist() == [32, 1]


def test_halves_are_rounded_to_even() -> None:
    # linear: K (1 - u) = 0.5, 1.5, 2.5, 3.5
    u = 1 - torch.tensor([0.5, 1.5, 2.5, 3.5]) / 4
    assert mask_counts(u, 4, "linear").tolist() == [1, 2, 2, 4]


@pytest.mark.parametrize(
    ("schedule", "share"),
    [("arccos", 2 / pi), ("cosine", 2 / pi), ("linear", 1 / 2), ("sqrt", 1 / 3)],
)
def test_expected_share(schedule: str, share: float) -> None:
    counts = mask_counts((torch.arange(20_000) + 0.5) / 20_000, 1024, schedule)
    assert float(counts.mean()) / 1024 == pytest.approx(share, abs=1e-3)


def test_masks_have_their_count_and_hide_nothing_else() -> None:
    ids, noise = torch.randint(N, (200, K)), draw_noise(200, K, torch.Generator().manual_seed(0))
    masked, mask = mask_tokens(ids, noise, N)
    assert torch.equal(mask.sum(1).float(), mask_counts(noise.ratio, K))
    assert torch.equal(masked, torch.where(mask, N, ids))
    assert mask.dtype == torch.bool


def test_every_position_is_masked_as_often() -> None:
    M = 20_000
    noise = draw_noise(M, 8, torch.Generator().manual_seed(0))
    _, mask = mask_tokens(torch.zeros(M, 8, dtype=torch.int64), noise, N)
    share = mask.float().mean(0)
    # five standard deviations of a share near 0.64
    assert (share - share.mean()).abs().max() < 5 * (0.64 * 0.36 / M) ** 0.5


def test_noise_is_uniform_repeatable_and_sliced_for_ranks() -> None:
    noise = draw_noise(4000, 4, torch.Generator().manual_seed(5))
    again = draw_noise(4000, 4, torch.Generator().manual_seed(5))
    for a, b in zip(noise, again, strict=True):
        assert torch.equal(a, b)
        assert 0 <= float(a.min()) <= float(a.max()) < 1
        assert float(a.mean()) == pytest.approx(0.5, abs=0.03)
    assert abs(float(torch.corrcoef(torch.stack([noise.ratio, noise.drop]))[0, 1])) < 0.08
    ids = torch.randint(N, (4000, 4))
    whole = mask_tokens(ids, noise, N)[0]
    halves = [
        mask_tokens(ids[a:b], Noise(*(x[a:b] for x in noise)), N)[0]
        for a, b in ((0, 2000), (2000, 4000))
    ]
    assert torch.equal(whole, torch.cat(halves))


def test_labels_are_dropped_below_the_probability() -> None:
    noise = draw_noise(5000, 1, torch.Generator().manual_seed(0))
    labels = torch.arange(5000) % 10
    assert torch.equal(drop_labels(labels, noise, 99, 0.0), labels)
    assert (drop_labels(labels, noise, 99, 1.0) == 99).all()
    dropped = drop_labels(labels, noise, 99) == 99
    assert torch.equal(dropped, noise.drop < 0.1)
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.02)
    at_the_bound = Noise(*(torch.tensor([0.25]),) * 3)
    assert drop_labels(torch.tensor([3]), at_the_bound, 99, 0.25).item() == 3


def test_wrong_shapes_are_named() -> None:
    noise = draw_noise(2, 4, torch.Generator())
    with pytest.raises(ValueError, match=r"mask_tokens wants ids .*; got \(2, 5\), \(2,\) and"):
        mask_tokens(torch.zeros(2, 5, dtype=torch.int64), noise, N)
    hidden, head, targets, mask = tokens()
    for call in (masked_token_loss, masked_accuracy):
        with pytest.raises(ValueError, match=r"got \(6, 16, 24\), \(6, 16\) and \(6, 15\)"):
            call(hidden, head, targets, mask[:, 1:])


def tokens() -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(2)
    head = nn.Linear(D, N)
    hidden = torch.randn(B, K, D, requires_grad=True)
    return hidden, head, torch.randint(N, (B, K)), torch.rand(B, K) < 0.6


def test_loss_by_hand() -> None:
    hidden, head, targets, mask = tokens()
    got = masked_token_loss(hidden, head, targets, mask, label_smoothing=0.2, unmasked_weight=0.3)
    logp = head(hidden).double().log_softmax(-1)
    ce = -0.8 * logp.gather(-1, targets[..., None])[..., 0] - 0.2 * logp.mean(-1)
    weights = torch.where(mask, 1.0, 0.3)
    want = (weights * ce).sum() / weights.sum()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    assert torch.equal(token_weights(mask, 0.3), weights)


def test_parts_of_a_batch_average_to_the_whole() -> None:
    hidden, head, targets, mask = tokens()
    mask[: B // 2] = True  # parts of unequal weight
    leaves = [hidden, head.weight, head.bias]
    whole = masked_token_loss(hidden, head, targets, mask)
    parts = [slice(0, B // 2), slice(B // 2, B)]
    mean = torch.stack([token_weights(mask[p]).sum() for p in parts]).mean()
    losses = [
        masked_token_loss(hidden[p], head, targets[p], mask[p], total_weight=mean) for p in parts
    ]
    joint = torch.stack(losses).mean()
    torch.testing.assert_close(joint, whole, rtol=1e-6, atol=0)
    assert abs(float((losses[0] - losses[1]).detach())) > 0.1
    got, want = (torch.autograd.grad(x, leaves) for x in (joint, whole))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("at_once", [1, 7 * N, 1 << 22])
def test_accuracy_counts_masked_tokens(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ACCURACY_ELEMENTS", at_once)
    hidden, head, targets, mask = tokens()
    targets = torch.where(torch.rand(B, K) < 0.5, head(hidden).argmax(-1), targets)
    right = head(hidden).argmax(-1) == targets
    want = sum(float(right[b][mask[b]].float().mean()) for b in range(B)) / B
    got = masked_accuracy(hidden, head, targets, mask)
    assert float(got) == pytest.approx(want, rel=1e-6)
    assert 0.3 < want < 0.8
    assert not got.requires_grad


def test_the_generators_own_method_gives_the_same_masks() -> None:
    ids = torch.randint(N, (64, K))
    torch.manual_seed(7)
    ratio, order = torch.rand(64), torch.rand(64, K)
    torch.manual_seed(7)
    want = ImageBert.masking_input_tokens(SimpleNamespace(mask_token_id=N), ids)  # type: ignore[arg-type]
    got = mask_tokens(ids, Noise(ratio, order, ratio), N)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@needs_upstream
@pytest.mark.parametrize("K", [16, 32, 128])
def test_masks_are_upstreams(K: int) -> None:
    ids = torch.randint(N, (500, K))
    torch.manual_seed(7)
    ratio = torch.zeros(500).uniform_(0, 1.0)
    order = torch.rand(500, K)
    with official("modeling.maskgit") as upstream:
        torch.manual_seed(7)
        want = upstream.ImageBert.masking_input_tokens(SimpleNamespace(mask_token_id=N), ids)
    for a, b in zip(mask_tokens(ids, Noise(ratio, order, ratio), N), want, strict=True):
        assert torch.equal(a, b)


@needs_upstream
def test_loss_gradients_and_accuracy_are_upstreams() -> None:
    hidden, head, targets, mask = tokens()
    leaves = [hidden, head.weight, head.bias]
    numbers = SimpleNamespace(label_smoothing=0.1, loss_weight_unmasked_token=0.1)
    with official("modeling.modules.losses") as upstream:
        theirs = upstream.MLMLoss(SimpleNamespace(losses=numbers))
        want, logs = theirs(head(hidden), targets, mask)
    got = masked_token_loss(hidden, head, targets, mask)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(x, leaves) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
    assert masked_accuracy(hidden, head, targets, mask) == logs["correct_tokens"]
