"""Numbers of a run: the published tables, the ends, and float64 where float32 loses a token."""

from dataclasses import replace
from itertools import pairwise
from math import acos, cos, floor, pi

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import CountingForwards, tiny_generator

from titok_fast import SamplingConfig
from titok_fast.sampling.schedules import guidance_weight, mask_ratio, masked_after, steps
from titok_fast.sampling.unmask import sample, sample_seeds
from titok_fast.sampling_config import SCHEDULES

# tokens still masked after each of 8 steps
MASKED_AFTER = {
    (32, "arccos"): [29, 26, 24, 21, 18, 14, 10, 0],
    (32, "cosine"): [31, 29, 26, 22, 17, 12, 6, 0],
    (32, "linear"): [28, 24, 20, 16, 12, 8, 4, 0],
    (32, "sqrt"): [20, 16, 12, 9, 6, 4, 2, 0],
    (64, "arccos"): [58, 53, 48, 42, 36, 29, 20, 0],
    (64, "cosine"): [62, 59, 53, 45, 35, 24, 12, 0],
    (64, "linear"): [56, 48, 40, 32, 24, 16, 8, 0],
    (64, "sqrt"): [41, 32, 24, 18, 13, 8, 4, 0],
    (128, "arccos"): [117, 107, 96, 85, 72, 58, 41, 0],
    (128, "cosine"): [125, 118, 106, 90, 71, 48, 24, 0],
    (128, "linear"): [112, 96, 80, 64, 48, 32, 16, 0],
    (128, "sqrt"): [82, 64, 49, 37, 26, 17, 8, 0],
    (256, "arccos"): [235, 214, 193, 170, 145, 117, 82, 0],
    (256, "cosine"): [251, 236, 212, 181, 142, 97, 49, 0],
    (256, "linear"): [224, 192, 160, 128, 96, 64, 32, 0],
    (256, "sqrt"): [165, 128, 99, 74, 53, 34, 16, 0],
}
S_128_IN_64_STEPS = """
126 125 124 122 121 120 119 117 116 115 113 112 111 110 108 107 106 104 103 102 100 99 98 96 95 93
92 91 89 88 86 85 83 82 80 79 77 76 74 72 71 69 67 66 64 62 60 58 56 54 52 50 48 46 43 41 38 35 32
28 25 20 14 0"""


@pytest.mark.parametrize(("K", "schedule"), MASKED_AFTER)
def test_counts_of_eight_steps(K: int, schedule: str) -> None:
    assert masked_after(SamplingConfig(8, schedule=schedule), K) == MASKED_AFTER[K, schedule]


def test_counts_of_64_steps() -> None:
    config = SamplingConfig(64)
    assert masked_after(config, 128) == [int(n) for n in S_128_IN_64_STEPS.split()]
    # more steps than tokens: one token a step, then the last one waits for the end
    assert masked_after(config, 32) == [*range(31, 0, -1), *[1] * 32, 0]


@given(st.integers(1, 300), st.integers(1, 70), st.sampled_from(SCHEDULES))
def test_counts_fall_and_end_at_zero(K: int, T: int, schedule: str) -> None:
    counts = masked_after(SamplingConfig(T, schedule=schedule), K)
    assert len(counts) == T
    assert counts[-1] == 0
    for before, after in pairwise([K, *counts[:-1]]):
        assert after == 1 or 1 <= after < before


def test_cosine_keeps_the_token_that_float32_loses() -> None:
    r = 2 / 3
    in_float32 = torch.cos(torch.tensor(r, dtype=torch.float32) * (pi / 2))
    assert floor(64 * in_float32.item()) == 31
    assert masked_after(SamplingConfig(12, schedule="cosine"), 64)[7] == floor(64 * cos(pi / 3))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ratio_falls_from_one_to_zero(schedule: str) -> None:
    ratios = [mask_ratio(schedule, r / 100) for r in range(1, 101)]
    assert all(a > b for a, b in pairwise(ratios))
    assert mask_ratio(schedule, 1e-12) == pytest.approx(1.0, abs=1e-5)
    assert ratios[-1] == pytest.approx(0.0, abs=1e-12)
    want = {"arccos": acos(0.25) / (pi / 2), "cosine": cos(pi / 8), "linear": 0.75, "sqrt": 0.5}
    assert mask_ratio(schedule, 0.25) == pytest.approx(want[schedule], rel=1e-15)


def test_guidance_of_eight_steps() -> None:
    constant, linear, power = (
        [guidance_weight(SamplingConfig(8, g, decay, 3.0), s) for s in range(8)]
        for g, decay in ((4.5, "constant"), (4.5, "linear"), (6.9, "power-cosine"))
    )
    assert constant == [4.5] * 8
    assert linear == [0, 0.5625, 1.125, 1.6875, 2.25, 2.8125, 3.375, 3.9375]
    # the published scale multiplies from the unconditional side: the weight is one less
    scales = [1, 1.0001, 1.0036, 1.0404, 1.2246, 1.8260, 3.2332, 5.4510]
    assert [w + 1 for w in power] == pytest.approx(scales, abs=6e-5)
    last = SamplingConfig(64, 6.9, "power-cosine", 3.0)
    assert guidance_weight(last, 63) + 1 == pytest.approx(6.8691, abs=5e-5)


@pytest.mark.parametrize("decay", ["constant", "linear", "power-cosine"])
def test_guidance_acts_inside_its_interval_alone(decay: str) -> None:
    always = SamplingConfig(8, 4.5, decay, 3.0, 9.5, True)
    whole = [guidance_weight(always, s) for s in range(8)]
    for interval, inside in (
        ((0.0, 1.0), range(8)),
        ((0.5, 1.0), range(4, 8)),
        ((0.25, 0.75), range(2, 6)),
        ((0.0, 0.3), range(3)),  # steps 0, 1 and 2 begin before 0.3
        ((0.9, 1.0), range(0)),  # no step begins there
    ):
        some = always.updated(guidance_interval=interval)
        want = [w if s in inside else 0.0 for s, w in enumerate(whole)]
        assert [guidance_weight(some, s) for s in range(8)] == want
        # nothing else changes
        assert [replace(s, guidance=0) for s in steps(some)] == [
            replace(s, guidance=0) for s in steps(always)
        ]
        assert [s.guidance for s in steps(some)] == want


def test_steps_outside_the_interval_run_one_pass() -> None:
    model = tiny_generator()
    config = SamplingConfig(8, 3.0, "constant", guidance_interval=(0.25, 0.75))
    with CountingForwards(model) as passes:
        sample(model, [1, 2, 3], sample_seeds(0, 3), config)
    assert passes.rows == [3, 3, 6, 6, 6, 6, 3, 3]
    off = config.updated(guidance_scale=0.0)
    ids, none = (sample(model, [1, 2, 3], sample_seeds(0, 3), c) for c in (config, off))
    assert not torch.equal(ids, none)  # inside, guidance acts
    outside = config.updated(guidance_interval=(0.9, 1.0))
    assert torch.equal(sample(model, [1, 2, 3], sample_seeds(0, 3), outside), none)


def test_temperatures_of_eight_steps() -> None:
    plan = steps(SamplingConfig(8, 4.5, "linear", 3.0, 9.5, True))
    noise = [8.3125, 7.125, 5.9375, 4.75, 3.5625, 2.375, 1.1875, 0]
    assert [s.token_noise for s in plan] == noise
    assert [s.remask_noise for s in plan] == noise
    softmax = [1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert [s.softmax_temperature for s in plan] == pytest.approx(softmax, rel=1e-15)
    assert [s.index for s in plan] == list(range(8))
    assert [s.last for s in plan] == [False] * 7 + [True]
    # MaskGIT's rule draws tokens at temperature 1 to the end
    plan = steps(SamplingConfig(8, randomize_temperature=9.5, confidence="probability"))
    assert [s.token_noise for s in plan] == [1.0] * 8
    assert [s.remask_noise for s in plan] == noise
    assert {s.softmax_temperature for s in plan} == {1.0}


def test_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="unknown mask schedule 'root'; known: arccos, cosine"):
        mask_ratio("root", 0.5)
