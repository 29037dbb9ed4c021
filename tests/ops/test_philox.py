"""The noise: right bits, the same bits on every path, and exact logarithms."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from calls import any_seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from titok_fast.kernels import philox
from titok_fast.kernels.philox import (
    MAX_NOISE_STEPS,
    MAX_POSITIONS,
    REMASK_STREAM,
    TOKEN_STREAM,
    gumbel,
    gumbel_from_bits,
    philox_bits_ref,
    remask_gumbel,
    remask_noise,
    row_gumbel,
    token_gumbel,
)

WORD = 2**32
# Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, result
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 on Python integers, which do not overflow."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 // WORD ^ c1 ^ k0, p1 % WORD, p0 // WORD ^ c3 ^ k1, p0 % WORD
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0, c1, c2, c3


@triton.jit
def _bits_kernel(counter_ptr, seed_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    words = [tl.load(counter_ptr + w * BLOCK + i).to(tl.int32) for w in tl.static_range(4)]
    r0, r1, r2, r3 = tl.philox(tl.load(seed_ptr + i), words[0], words[1], words[2], words[3])
    tl.store(out_ptr + i, r0.to(tl.int64))
    tl.store(out_ptr + BLOCK + i, r1.to(tl.int64))
    tl.store(out_ptr + 2 * BLOCK + i, r2.to(tl.int64))
    tl.store(out_ptr + 3 * BLOCK + i, r3.to(tl.int64))


@triton.jit
def _gumbel_of_kernel(bits_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, gumbel_from_bits(tl.load(bits_ptr + i).to(tl.uint32)))


@triton.jit
def _token_gumbel_kernel(
    seeds_ptr, positions_ptr, out_ptr, step, quad0, R: tl.constexpr, QUADS: tl.constexpr
):
    r = tl.arange(0, R)
    positions = tl.load(positions_ptr + r).to(tl.int32)
    noise = token_gumbel(tl.load(seeds_ptr + r), step, positions, quad0, QUADS)
    codes = tl.arange(0, 4 * QUADS)
    tl.store(out_ptr + r[:, None] * (4 * QUADS) + codes[None, :], noise)


@triton.jit
def _remask_gumbel_kernel(seed_ptr, out_ptr, step, BLOCK: tl.constexpr):
    k = tl.arange(0, BLOCK)
    tl.store(out_ptr + k, remask_gumbel(tl.load(seed_ptr), step, k))


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], result: tuple[int, ...], device: torch.device
) -> None:
    assert plain_philox(counter, key) == result
    seed = key[0] + key[1] * WORD
    seeds = torch.tensor([seed - 2**64 if seed >= 2**63 else seed], device=device)
    counters = torch.tensor(counter, device=device)[:, None]
    out = torch.full((4, 1), -1, device=device)
    _bits_kernel[(1,)](counters, seeds, out, 1)
    assert tuple(out[:, 0].tolist()) == result
    if counter == (0, 0, 0, 0):
        positions = torch.tensor([0], device=device)
        bits = philox_bits_ref(seeds, 0, positions, 4, 0)
        assert tuple(bits.flatten().tolist()) == result


@settings(max_examples=40, deadline=None)
@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, MAX_POSITIONS - 1),
    st.integers(0, MAX_NOISE_STEPS - 1),
    st.integers(0, 30),
    st.integers(0, 1),
)
def test_bits_by_definition(seed: int, position: int, step: int, codes: int, stream: int) -> None:
    bits = philox_bits_ref(torch.tensor([seed]), step, torch.tensor([position]), codes, stream)
    key = (seed % WORD, seed // WORD % WORD)
    word = position + 2**16 * step + 2**31 * stream
    want = [plain_philox((c // 4, word, 0, 0), key)[c % 4] for c in range(codes)]
    assert bits.shape == (1, 1, codes)
    assert bits.flatten().tolist() == want


def test_kernel_noise_is_the_reference_noise(device: torch.device) -> None:
    seeds, positions = any_seeds(8, device), torch.randint(0, MAX_POSITIONS, (8,), device=device)
    out = torch.full((8, 64), torch.nan, device=device)
    _token_gumbel_kernel[(1,)](seeds, positions, out, 7, 5, 8, 16)
    want = row_gumbel(seeds, 7, positions, 4 * 5 + 64, TOKEN_STREAM)[:, 4 * 5 :]
    torch.testing.assert_close(out, want, rtol=2e-6, atol=2e-6)
    grid = gumbel(seeds, 7, positions, 84, TOKEN_STREAM)
    assert torch.equal(grid[torch.arange(8), torch.arange(8), 20:], want)

    out = torch.full((64,), torch.nan, device=device)
    _remask_gumbel_kernel[(1,)](seeds[:1], out, 3, 64)
    want = gumbel(seeds[:1], 3, torch.arange(64, device=device), 1, REMASK_STREAM)
    torch.testing.assert_close(out, want.flatten(), rtol=2e-6, atol=2e-6)


def test_logarithms_are_exact_for_every_uniform(device: torch.device) -> None:
    # all 2**24 uniforms; the largest Gumbel values, which win most draws, come from u next to 1
    bits = torch.arange(2**24, device=device) + (173 << 24)  # the highest byte does not count
    out = torch.full((2**24,), torch.nan, device=device)
    block = 2**17
    _gumbel_of_kernel[(2**24 // block,)](bits, out, block)
    u = np.maximum(np.arange(2**24) / 2.0**24, 2.0**-25)
    want = -np.log(-np.log(u))
    got = out.double().cpu().numpy()
    assert np.abs(got - want).max() < 1.2e-6  # half an ulp at 16.6 is 9.5e-7
    small = np.abs(want) < 2
    assert np.abs(got - want)[small].max() < 3e-7
    assert got.min() > -2.86
    assert got.max() < 16.64


def test_torchs_own_philox_and_ours_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = any_seeds(3)
    positions = torch.tensor([0, 5, MAX_POSITIONS - 1])

    def draw() -> list[Tensor]:
        rows = [row_gumbel(seeds, step, positions, 37, REMASK_STREAM) for step in (0, 1, 2**15 - 1)]
        return [*rows, gumbel(seeds, 4, positions, 6, TOKEN_STREAM), remask_noise(seeds, 9, 33)]

    as_chosen = draw()  # torch's, where it has one
    assert philox._torch_draws_these_bits() == hasattr(torch.ops.aten, "_philox_uniform_")
    monkeypatch.setattr(philox, "_torch_draws_these_bits", lambda: False)
    for native, plain in zip(as_chosen, draw(), strict=True):
        assert torch.equal(native, plain)


def test_a_torch_that_draws_other_bits_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    philox._torch_draws_these_bits.cache_clear()
    monkeypatch.setattr(philox, "_native_uniforms", lambda *_: torch.zeros(3, 4, 23))
    assert not philox._torch_draws_these_bits()
    philox._torch_draws_these_bits.cache_clear()


def test_a_sample_does_not_depend_on_its_batch() -> None:
    seeds, positions = any_seeds(5), torch.arange(7)
    together = gumbel(seeds, 3, positions, 13, TOKEN_STREAM)
    for b in range(5):
        alone = gumbel(seeds[b : b + 1], 3, positions[2:4], 9, TOKEN_STREAM)
        assert torch.equal(alone[0], together[b, 2:4, :9])


def test_empty_shapes() -> None:
    none, one = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    assert gumbel(none, 0, one, 5, TOKEN_STREAM).shape == (0, 1, 5)
    assert gumbel(one, 0, none, 5, TOKEN_STREAM).shape == (1, 0, 5)
    assert gumbel(one, 0, one, 0, TOKEN_STREAM).shape == (1, 1, 0)
    assert row_gumbel(none, 0, none, 5, TOKEN_STREAM).shape == (0, 5)


def test_compiles_and_waits_for_no_device() -> None:
    seeds, positions = any_seeds(2), torch.arange(3)
    compiled = torch.compile(gumbel, fullgraph=True, backend="aot_eager")
    for step in (0, 1, 2):  # the second step makes it a symbol of the graph
        want = gumbel(seeds, step, positions, 6, TOKEN_STREAM)
        assert torch.equal(compiled(seeds, step, positions, 6, TOKEN_STREAM), want)
    with FakeTensorMode():
        seeds = torch.empty(2, dtype=torch.int64, device="cuda")
        positions = torch.arange(3, device="cuda")
        noise = gumbel(seeds, 1, positions, 6, TOKEN_STREAM)
    assert noise.device.type == "cuda"
    assert noise.shape == (2, 3, 6)


@pytest.mark.parametrize(
    ("seeds", "step", "positions", "codes", "message"),
    [
        (torch.zeros(2), 0, torch.arange(2), 4, "seeds .*int64"),
        (torch.zeros(1, 2, dtype=torch.int64), 0, torch.arange(2), 4, "seeds .*int64"),
        (torch.arange(2), 0, torch.zeros(2), 4, "positions .*int64"),
        (torch.arange(2), 0, torch.arange(2, device="meta"), 4, "positions .*cpu.*meta"),
        (torch.arange(2), -1, torch.arange(2), 4, "step >= 0"),
        (torch.arange(2), 2**15, torch.arange(2), 4, "below 32768"),
        (torch.arange(2), 0, torch.arange(2), -1, "codes >= 0"),
    ],
)
def test_bad_input_is_named(
    seeds: Tensor, step: int, positions: Tensor, codes: int, message: str
) -> None:
    for function in (gumbel, row_gumbel):
        with pytest.raises(ValueError, match=f"{function.__name__} wants .*{message}"):
            function(seeds, step, positions, codes, TOKEN_STREAM)


def test_rows_need_as_many_seeds_as_positions() -> None:
    with pytest.raises(ValueError, match=r"positions \(R=2\).*\(3,\)"):
        row_gumbel(torch.arange(2), 0, torch.arange(3), 4, TOKEN_STREAM)
