"""lm_head_sample against the head and guided_sample one after the other."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from calls import DTYPES, any_seeds, assert_same_draws, cases
from hypothesis import strategies as st

from titok_fast.kernels._sampling import RULES
from titok_fast.kernels.lm_head_sample import lm_head_sample, lm_head_sample_ref
from titok_fast.kernels.philox import TOKEN_STREAM, row_gumbel


@cases(
    M=st.one_of(st.integers(0, 5), st.sampled_from((31, 33, 70))),
    N=st.one_of(st.integers(1, 9), st.sampled_from((64, 65, 200))),
    D=st.one_of(st.integers(1, 9), st.sampled_from((48, 64, 130))),
    dtype=st.sampled_from(DTYPES),
    subnormal=st.booleans(),
    guided=st.booleans(),
    biased=st.booleans(),
    gathered=st.booleans(),
    strided=st.booleans(),
    noise_temperature=st.sampled_from((0.0, 4.75)),
    rule=st.sampled_from(RULES),
)
def test_kernel_follows_the_reference(device: torch.device, case: SimpleNamespace) -> None:
    M, N, D, dtype, guided = case.M, case.N, case.D, case.dtype, case.guided
    small = torch.finfo(dtype).tiny / 16 if case.subnormal else 1.0
    big = 2.0**-8 / small if case.subnormal else 1.0  # so that logits are of normal size
    hidden, uncond = (torch.randn(2, M, D, device=device) * small).to(dtype)
    weight = (torch.randn(N, D, device=device) * 3 / D**0.5 * big).to(dtype)
    bias = torch.randn(N, device=device).to(dtype) if case.biased else None
    rows = torch.randint(M, (M // 2 + 1,), device=device) if case.gathered and M else None
    R = M if rows is None else len(rows)
    seeds, positions = any_seeds(R, device), torch.randint(1024, (R,), device=device)
    if case.strided:  # a slice of a wider tensor, a transpose, every other value
        hidden = F.pad(hidden, (2, 3), value=torch.nan)[:, 2 : 2 + D]
        weight = weight.T.contiguous().T
        bias, rows, seeds, positions = (
            None if x is None else x.repeat_interleave(2)[::2]
            for x in (bias, rows, seeds, positions)
        )
    options = {"rows": rows, "seeds": seeds, "positions": positions, "step": 3, "rule": case.rule}
    options |= {"guidance": 2.25 if guided else 0.0, "softmax_temperature": 0.8}
    options |= {"noise_temperature": case.noise_temperature}
    got = lm_head_sample(hidden, uncond if guided else None, weight, bias, **options)
    # the kernel rounds the guided hidden states, then multiplies in float32
    if guided:
        hidden = (hidden.float() + 2.25 * (hidden.float() - uncond.float())).to(dtype)
    bias32 = None if bias is None else bias.float()
    head = (hidden.float(), None, weight.float(), bias32, rows, seeds, positions)
    want = lm_head_sample_ref(*head, 3, 0.0, 0.8, case.noise_temperature, case.rule)
    picked = hidden if rows is None else hidden[rows]
    noise = row_gumbel(seeds, 3, positions, N, TOKEN_STREAM)
    noisy = F.linear(picked.float(), weight.float(), bias32) / 0.8 + case.noise_temperature * noise
    # float32 sums of D terms in two orders; logits reach 20
    assert_same_draws(noisy, got, want, 2e-5)


@pytest.mark.parametrize("R", [20, 100, 600])  # one of each tile
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_size(device: torch.device, R: int, dtype: torch.dtype) -> None:
    hidden = torch.randn(R, 128, device=device).to(dtype)
    weight = torch.randn(300, 128, device=device).to(dtype)
    got = lm_head_sample(hidden, None, weight, None, noise_temperature=0.0, rule="probability")
    l = hidden.double() @ weight.double().T
    assert (l.gather(1, got[0][:, None])[:, 0] >= l.amax(1) - 1e-4).all()
    scores = l.log_softmax(1).gather(1, got[0][:, None])[:, 0]
    torch.testing.assert_close(got[1].double(), scores, rtol=1e-4, atol=1e-4)


def test_first_of_equal_codes_wins_across_tiles(op_device: torch.device) -> None:
    hidden, weight = torch.ones(2, 1, device=op_device), torch.zeros(300, 1, device=op_device)
    weight[[299, 70, 64]] = 2.0
    candidates, scores = lm_head_sample(hidden, None, weight, None, noise_temperature=0.0)
    assert candidates.tolist() == [64, 64]
    assert scores.tolist() == [2.0, 2.0]


def test_forbidden_codes_are_never_drawn(op_device: torch.device) -> None:
    """A bias of -inf forbids a code, even a whole tile of them."""
    hidden, weight = torch.randn(40, 8, device=op_device), torch.randn(200, 8, device=op_device)
    bias = torch.full((200,), -torch.inf, device=op_device)
    bias[[130, 199]] = 0.0
    noise = {"seeds": any_seeds(40, op_device), "positions": torch.arange(40, device=op_device)}
    candidates, scores = lm_head_sample(
        hidden, None, weight, bias, **noise, noise_temperature=1.0, rule="probability"
    )
    assert set(candidates.tolist()) == {130, 199}
    l = F.linear(hidden, weight[[130, 199]]).log_softmax(1)
    want = l.gather(1, (candidates == 199).long()[:, None])[:, 0]
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guided", [False, True])
def test_rows_out_of_range_read_zeros(device: torch.device, guided: bool) -> None:
    """They do not read the memory around the hidden states, here NaN; the bias decides the code."""
    hidden, weight = torch.randn(5, 8, device=device), torch.randn(70, 8, device=device)
    beside = F.pad(hidden, (0, 0, 2, 2), value=torch.nan)[2:-2]
    bias = torch.randn(70, device=device)
    rows = torch.tensor([-2, -1, 4, 5, 6, 0], device=device)
    uncond = beside if guided else None
    got = lm_head_sample(
        beside, uncond, weight, bias, rows=rows, guidance=1.0, noise_temperature=0.0
    )
    zeros = F.pad(hidden, (0, 0, 2, 2))[rows + 2]
    want = lm_head_sample_ref(
        zeros, None, weight, bias, None, None, None, 0, 0.0, 1.0, 0.0, "logit"
    )
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


def test_nan_gives_codes_in_range(device: torch.device) -> None:
    hidden = torch.full((3, 4), torch.nan, device=device)
    weight = torch.randn(70, 4, device=device)
    candidates, _ = lm_head_sample(hidden, None, weight, None, noise_temperature=0.0)
    assert ((candidates >= 0) & (candidates < 70)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference_in_low_precision(dtype: torch.dtype) -> None:
    """On a CPU logits are rounded once, to the weight's dtype."""
    hidden, uncond = torch.randn(2, 50, 64).to(dtype)
    weight = torch.randn(90, 64).to(dtype)
    got = lm_head_sample(hidden, uncond, weight, None, guidance=2.0, noise_temperature=0.0)
    mixed = hidden.double() + 2.0 * (hidden.double() - uncond.double())
    l = mixed @ weight.double().T
    rounding = torch.finfo(dtype).eps / 2
    bound = 3 * rounding * (l.abs().amax(1) + mixed.norm(dim=1) * 8)
    assert (l.amax(1) - l.gather(1, got[0][:, None])[:, 0] <= bound).all()
