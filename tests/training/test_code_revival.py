"""Code usage by hand; revival against upstream's quantizer, and two ranks against one."""

from math import exp, log2
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.official import needs_upstream, official
from support.ranks import assert_two_ranks_do_as_one
from torch import Tensor

from titok_fast.models.code_usage import CodeUsage, UsageReport
from titok_fast.models.quantizer import VectorQuantizer
from titok_fast.training.code_revival import CodeRevival

N, C = 24, 4


def test_usage_by_hand() -> None:
    usage = CodeUsage(8)
    usage.update(torch.tensor([[0, 0], [1, 0]]))
    usage.update(torch.tensor([5, 5, 1, 0]))
    report = usage.report()
    assert (report.tokens, report.dead, report.usage) == (8, 5, 3 / 8)
    want = -(0.5 * log2(0.5) + 2 * 0.25 * log2(0.25))
    assert report.entropy_bits == pytest.approx(want, rel=1e-12)
    usage.reset()
    assert usage.report() == UsageReport(tokens=0, dead=8, usage=0.0, entropy_bits=0.0)


def test_usage_at_its_ends() -> None:
    even, single = CodeUsage(64), CodeUsage(64)
    even.update(torch.arange(64).repeat(3).view(3, 8, 8))
    single.update(torch.full((5,), 63))
    assert even.report().entropy_bits == pytest.approx(6.0, rel=1e-12)
    assert (even.report().usage, even.report().dead) == (1.0, 0)
    assert (single.report().entropy_bits, single.report().dead) == (0.0, 63)


def quantizer(*, l2: bool) -> VectorQuantizer:
    torch.manual_seed(4)
    made = VectorQuantizer(N, C, use_l2_norm=l2)
    with torch.no_grad():
        made.embedding.weight.copy_(torch.randn(N, C))
    return made


def latents(B: int = 6) -> Tensor:
    # near three directions: most codes stay unused
    centres = torch.tensor([[3.0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 1]])
    z = centres[torch.randint(3, (B, 1, 5))] + 0.1 * torch.randn(B, 1, 5, C)
    return z.permute(0, 3, 1, 2)


@pytest.mark.parametrize("l2", [True, False])
def test_dead_rows_move_to_their_nearest_latent_and_others_stay(l2: bool) -> None:
    q, z = quantizer(l2=l2), latents()
    before = q.embedding.weight.detach().clone()
    ids = q(z)[1]["min_encoding_indices"]
    revival = CodeRevival(N)
    revival.update(q, z, ids)
    after, rows = q.embedding.weight.detach(), z.permute(0, 2, 3, 1).reshape(-1, C)
    used = torch.bincount(ids.flatten(), minlength=N)
    assert 0 < (used > 0).sum() < N
    a, b = (F.normalize(before), F.normalize(rows)) if l2 else (before, rows)
    nearest = rows[torch.cdist(a.double(), b.double()).argmin(1)]
    for code in range(N):
        # share after one step: 0.01 of the batch's
        rate = exp(-10 * N * 0.01 * int(used[code]) / len(rows) / 0.01 - 1e-3)
        want = (1 - rate) * before[code] + rate * nearest[code]
        torch.testing.assert_close(after[code], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(revival.embed_prob, 0.01 * used / len(rows))


def test_revival_raises_usage() -> None:
    torch.manual_seed(0)
    q, revival = quantizer(l2=True), CodeRevival(N)
    seen = []
    for _ in range(40):
        z, usage = latents(B=16), CodeUsage(N)
        ids = q(z)[1]["min_encoding_indices"]
        usage.update(ids)
        seen.append(usage.report().usage)
        revival.update(q, z, ids)
    # latents stay where they are, so without revival usage would stay as it began
    assert sum(seen[-10:]) / 10 > 1.5 * seen[0]


def test_the_model_keeps_its_published_keys_and_its_graph() -> None:
    q, z = quantizer(l2=True), latents().requires_grad_()
    codes, result = q(z)
    loss = codes.square().sum() + result["quantizer_loss"]
    CodeRevival(N).update(q, z, result["min_encoding_indices"])
    loss.backward()  # nothing the backward needs was overwritten
    assert z.grad is not None
    assert list(q.state_dict()) == ["embedding.weight"]


@pytest.mark.parametrize("shape", [(6, C + 1, 1, 5), (6, C, 1, 4), (0, C, 1, 5)])
def test_wrong_shapes_are_named(shape: tuple[int, ...]) -> None:
    ids = torch.zeros(shape[0], 1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"CodeRevival wants z \(B, 4, H, W\) and ids"):
        CodeRevival(N).update(quantizer(l2=True), torch.zeros(shape), ids)


def _revive(rank: int, world: int, folder: Path) -> None:
    result: dict[str, Any] = {}
    for l2 in (True, False):
        q, revival, usage = quantizer(l2=l2), CodeRevival(N), CodeUsage(N)
        for step in range(3):
            torch.manual_seed(step)
            z = latents(B=6).chunk(world)[rank]
            ids = q(z)[1]["min_encoding_indices"]
            usage.update(ids)
            revival.update(q, z, ids)
        result |= {f"table {l2}": q.embedding.weight.detach(), f"p {l2}": revival.embed_prob}
        report = usage.report()
        result[f"usage {l2}"] = torch.tensor(
            [report.tokens, report.dead, report.usage, report.entropy_bits], dtype=torch.float64
        )
    torch.save(result, folder / f"{world}-{rank}.pt")


@pytest.mark.usefixtures("one_thread")
def test_two_ranks_revive_as_one_with_both_batches(tmp_path: Path) -> None:
    assert_two_ranks_do_as_one(_revive, tmp_path, rtol=1e-6)


@needs_upstream
@pytest.mark.parametrize("l2", [True, False])
def test_tables_are_upstreams(l2: bool) -> None:
    ours, revival = quantizer(l2=l2), CodeRevival(N)
    with official("modeling.quantizer.quantizer") as upstream:
        theirs = upstream.VectorQuantizer(N, C, 0.25, use_l2_norm=l2, clustering_vq=True)
    theirs.load_state_dict(ours.state_dict() | {"embed_prob": revival.embed_prob})
    for _ in range(4):
        z = latents()
        want = theirs(z)[1]["min_encoding_indices"]
        ids = ours(z)[1]["min_encoding_indices"]
        revival.update(ours, z, ids)
        assert torch.equal(ids, want)
        torch.testing.assert_close(revival.embed_prob, theirs.embed_prob)
        torch.testing.assert_close(ours.embedding.weight, theirs.embedding.weight)
