"""The sampling ops draw the same on every path, and from the softmax."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from calls import DEVICE, any_seeds, arguments_of
from torch import Tensor

from titok_fast import kernels
from titok_fast.kernels._launch import runs_triton
from titok_fast.kernels._sampling import RULES
from titok_fast.kernels.guided_sample import guided_sample
from titok_fast.kernels.lm_head_sample import lm_head_sample
from titok_fast.kernels.remask import remask

B, K, D, N = 3, 5, 8, 70  # codes of more than one tile of the head
Inputs = dict[str, Tensor]


def inputs_of(numbers: str) -> Inputs:
    """Sums of whole numbers are exact in any order, so all paths have the same logits."""
    shapes = {"hidden": (B, K, D), "uncond": (B, K, D), "weight": (N, D), "bias": (N,)}
    inputs = {
        name: torch.randint(-2, 3, shape).float() if numbers == "whole" else torch.randn(shape)
        for name, shape in shapes.items()
    }
    inputs["bias"][::7] = -torch.inf  # forbidden codes: -inf in both streams
    return inputs | {"ids": torch.randint(N, (B, K)), "seeds": any_seeds(B)}


def draw(
    inputs: Inputs, mask: Tensor, guidance: float | None, noise_temperature: float, rule: str
) -> list[tuple[Tensor, Tensor]]:
    """Candidates and scores of the masked tokens by guided_sample and by lm_head_sample."""
    hidden, uncond, seeds = inputs["hidden"], inputs["uncond"], inputs["seeds"]
    head = inputs["weight"], inputs["bias"]
    common = {"step": 4, "guidance": guidance or 0.0, "softmax_temperature": 0.5}
    common |= {"noise_temperature": noise_temperature, "rule": rule}
    logits = [F.linear(x, *head) for x in (hidden, uncond)]
    if guidance is None:
        logits.pop()
    candidates, scores = guided_sample(*logits, mask=mask, ids=inputs["ids"], seeds=seeds, **common)
    sample, position = mask.nonzero(as_tuple=True)
    states = hidden.flatten(0, 1), None if guidance is None else uncond.flatten(0, 1)
    common |= {"rows": sample * K + position, "seeds": seeds[sample], "positions": position}
    fused = lm_head_sample(*states, *head, **common)
    return [(candidates[mask], scores[mask]), fused]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("noise_temperature", [0.0, 3.0])  # greedy: ties of whole numbers
@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("known", [0.0, 0.4])  # all rows or some: two paths on a CPU
@pytest.mark.parametrize("numbers", ["whole", "real"])
def test_kernels_and_cpu_draw_the_same(
    request: pytest.FixtureRequest,
    numbers: str,
    known: float,
    guidance: float | None,
    noise_temperature: float,
    rule: str,
) -> None:
    inputs, mask = inputs_of(numbers), torch.rand(B, K) >= known
    settings = guidance, noise_temperature, rule
    on_cpu = draw(inputs, mask, *settings)
    device = request.getfixturevalue("device")  # from here on the kernels
    assert runs_triton(mask.to(device))
    in_kernels = draw({k: x.to(device) for k, x in inputs.items()}, mask.to(device), *settings)
    ids, scores = on_cpu[0]
    assert scores.isfinite().all()
    assert (ids % 7 != 0).all()
    for other_ids, other_scores in (on_cpu[1], *in_kernels):
        assert torch.equal(other_ids.cpu(), ids)
        # a whole logit is exact; a log-softmax is summed in another order
        tolerance = 0.0 if (numbers, rule) == ("whole", "logit") else 1e-5
        torch.testing.assert_close(other_scores.cpu(), scores, rtol=tolerance, atol=tolerance)


def assert_drawn_from(logits: Tensor, ids: Tensor) -> None:
    """Chi-square: ids (R,) are draws from the softmax of logits (N,)."""
    freedom = len(logits) - 1
    limit = freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations above the mean
    counts = torch.bincount(ids, minlength=len(logits))
    expected, warmer = ((logits.double() / t).softmax(0) * len(ids) for t in (1.0, 1.05))
    assert expected.min() > 5  # below, the chi-square approximation is poor
    assert ((counts - expected) ** 2 / expected).sum() < limit
    # the test can fail: it rejects a temperature 5 % higher
    assert ((counts - warmer) ** 2 / warmer).sum() > limit


@pytest.mark.parametrize(("softmax", "noise"), [(0.5, 4.75), (0.8, 1.5), (1.3, 0.25)])
@pytest.mark.parametrize("op", ["guided_sample", "lm_head_sample"])
def test_draws_follow_the_softmax(op: str, softmax: float, noise: float) -> None:
    codes, images, tokens = 24, 1000, 100
    weight = (torch.rand(codes, 4) - 0.5) * softmax * noise
    logits, R = weight.sum(1), images * tokens
    options = {"softmax_temperature": softmax, "noise_temperature": noise}
    if op == "guided_sample":
        mask = torch.ones(images, tokens, dtype=torch.bool)
        options |= {"mask": mask, "ids": mask.long(), "seeds": any_seeds(images), "step": 5}
        drawn, _ = guided_sample(logits.expand(images, tokens, codes), **options)
    else:
        options |= {"seeds": any_seeds(R), "positions": torch.arange(R) % 2**16}
        drawn, _ = lm_head_sample(torch.ones(R, 4), None, weight, None, **options)
    assert_drawn_from(logits / (softmax * noise), drawn.flatten())


@pytest.mark.parametrize("noise_temperature", [0.25, 1.5, 4.75])
def test_token_that_remask_keeps_follows_the_softmax(noise_temperature: float) -> None:
    """With all but one masked, the one kept is a draw from softmax(score / temperature)."""
    images, tokens = 100_000, 6
    scores = (torch.arange(tokens, device=DEVICE) / 3 * noise_temperature).expand(images, tokens)
    ids = remask(
        torch.zeros_like(scores, dtype=torch.int64),
        scores,
        torch.full((images,), tokens - 1, device=DEVICE),
        mask_id=1,
        seeds=any_seeds(images, DEVICE),
        step=2,
        noise_temperature=noise_temperature,
    )
    kept = ids.cpu() == 0
    assert (kept.sum(1) == 1).all()
    assert_drawn_from(scores[0].cpu() / noise_temperature, kept.nonzero()[:, 1])


@pytest.mark.parametrize("op", ["guided_sample", "lm_head_sample", "remask"])
@pytest.mark.parametrize(
    ("backend", "steps"),
    [("aot_eager", (1, 2)), pytest.param("inductor", range(4), marks=pytest.mark.slow)],
)
def test_compiled_equals_eager_at_every_step(backend: str, steps: Sequence[int], op: str) -> None:
    eager = getattr(kernels, op)
    compiled = torch.compile(eager, fullgraph=True, backend=backend)
    for step in steps:  # step 3 without noise
        arguments = arguments_of(op) | {"seeds": any_seeds(2), "step": step}
        arguments |= {"noise_temperature": 3.0 - step, "rule": RULES[step % 2]}
        if op != "lm_head_sample":
            arguments["noise"] = None
        if op != "remask":
            arguments |= {"guidance": 0.5 * step, "softmax_temperature": 1.2 - 0.1 * step}
        got, want = compiled(**arguments), eager(**arguments)
        if op == "remask":
            assert torch.equal(got, want)
        else:
            assert torch.equal(got[0], want[0])
            torch.testing.assert_close(got[1], want[1])
