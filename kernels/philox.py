"""Gumbel noise that depends on (seed, position, step, stream, code) alone, the same on every path.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is
the sample's own 64-bit seed, so noise does not depend on batch, device or other samples. The first
of the counter's four words is code // 4, the second packs position, step and stream; code % 4
selects one of the four 32-bit results. There is no state: kernels make noise in registers, and the
torch functions here make the same bits. The last two words are 0, because torch's own CPU Philox
has no others. Cost in a kernel (sm_90): about 65 instructions per code, half for two logarithms.
"""

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from titok_fast.kernels._launch import is_plain_cpu
from titok_fast.kernels._values import INT64, check_tensors

TOKEN_STREAM = 0  # noise on logits, one value per code
REMASK_STREAM = 1  # noise on confidences, one value per position: code 0
MAX_POSITIONS, MAX_NOISE_STEPS = 2**16, 2**15  # what fits into the second word

_STEP_UNIT, _STREAM_UNIT = MAX_POSITIONS, MAX_POSITIONS * MAX_NOISE_STEPS
_STEP = tl.constexpr(_STEP_UNIT)  # device code reads no plain globals
_REMASK = tl.constexpr(-(2**31))  # the stream's bit of an int32

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 10
_SMALLEST = 2.0**-25  # stands for the uniform 0, whose logarithm does not exist


def _second_word(positions: Tensor, step: int, stream: int) -> Tensor:
    """Position, step and stream as one int64 below 2**32."""
    return positions + (step * _STEP_UNIT + stream * _STREAM_UNIT)


def _philox4(seeds: Tensor, words: Tensor, quads: int) -> list[Tensor]:
    """The four results of each counter: int64 holding uint32, (*broadcast shape, quads) each.

    64-bit products wrap but keep the right bits, so an arithmetic shift and a mask give the high
    word. In the in-place rounds the low words keep stray high bits until the final mask.
    """
    device = words.device
    shape = (*torch.broadcast_shapes(seeds.shape, words.shape), quads)
    k0 = (seeds & _LOW).unsqueeze(-1)
    k1 = ((seeds >> 32) & _LOW).unsqueeze(-1)
    c0 = torch.arange(quads, device=device)
    c1 = words.unsqueeze(-1)
    c2 = c3 = torch.zeros(1, dtype=torch.int64, device=device)
    # the first two rounds still have small operands: broadcasting saves most of their work
    for _ in range(2):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # masked while the operands are small
        c0, c2 = (((p1 >> 32) ^ k0) & _LOW) ^ c1, (((p0 >> 32) ^ k1) & _LOW) ^ c3
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    # the rest in place: on a CPU touching fresh memory costs several times the arithmetic
    block = torch.empty((6, *shape), dtype=torch.int64, device=device).unbind(0)
    c0, c1, c2, c3 = (part.copy_(c) for part, c in zip(block[:4], (c0, c1, c2, c3), strict=True))
    p0, p1 = block[4:]
    for _ in range(2, _ROUNDS):
        torch.mul(c0, _MULTIPLIERS[0], out=p0)
        torch.mul(c2, _MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1)
        c0.bitwise_and_(_LOW)
        c2.bitwise_and_(_LOW)
        c1, p1, c3, p0 = p1, c1, p0, c3
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return [c0, c1.bitwise_and_(_LOW), c2, c3.bitwise_and_(_LOW)]


def philox_bits_ref(seeds: Tensor, step: int, positions: Tensor, codes: int, stream: int) -> Tensor:
    """The kernels' 32 random bits per code, (B, K, codes) int64; arguments as in `gumbel`."""
    return _bits(seeds[:, None], _second_word(positions, step, stream)[None], codes)


def _bits(seeds: Tensor, words: Tensor, codes: int) -> Tensor:
    lanes = _philox4(seeds, words, -(-codes // 4))
    return torch.stack(lanes, dim=-1).flatten(-2)[..., :codes]


def gumbel(seeds: Tensor, step: int, positions: Tensor, codes: int, stream: int) -> Tensor:
    """Standard Gumbel noise of each code, in float32 from the bits of `philox_bits_ref`.

    u = (bits % 2**24) / 2**24 is exact in float32 and below 1; 2**-25 replaces 0, so -log(-log(u))
    lies in [-2.86, 16.64]. Works under torch.compile, and never waits for a device.

    Args:
        seeds: (B,) int64, one key per sample: all 64 bits count.
        step: sampling step, in [0, 2**15).
        positions: (K,) int64 in [0, 2**16), same device.
        codes: number of codes, from code 0.
        stream: `TOKEN_STREAM` or `REMASK_STREAM`.

    Returns:
        (B, K, codes) float32. The kernels use the same bits but other logarithms, which agree to a
        few units in the last place.

    Raises:
        ValueError: seeds or positions are no int64 vectors on one device, or codes is negative.
    """
    _check_counters("gumbel", seeds, positions, step, codes, per_row=False)
    return _gumbel(seeds[:, None], _second_word(positions, step, stream)[None], codes)


def row_gumbel(seeds: Tensor, step: int, positions: Tensor, codes: int, stream: int) -> Tensor:
    """`gumbel` with one seed and one position per row: (R,) and (R,) give (R, codes).

    Raises:
        ValueError: as in `gumbel`, or seeds and positions differ in length.
    """
    _check_counters("row_gumbel", seeds, positions, step, codes, per_row=True)
    return _gumbel(seeds, _second_word(positions, step, stream), codes)


def remask_noise(seeds: Tensor, step: int, K: int) -> Tensor:
    """`gumbel` of code 0 on the remask stream for positions 0..K-1, unchecked: (B,) to (B, K)."""
    if is_plain_cpu(seeds):
        return torch.from_numpy(remask_noise_numpy(seeds, step, K))
    words = _second_word(torch.arange(K, device=seeds.device), step, REMASK_STREAM)
    return _gumbel(seeds[:, None], words[None], 1).squeeze(-1)


def remask_noise_numpy(seeds: Tensor, step: int, K: int) -> np.ndarray:
    """`remask_noise` on a CPU, where NumPy's calls cost half as much as torch's."""
    words = _remask_words(step, K)
    if _torch_draws_these_bits():
        u = _native_uniforms(seeds.numpy()[:, None], words, (len(seeds), K), 1).numpy()[..., 0]
    else:
        u = _uniforms(seeds[:, None], torch.from_numpy(words), 1)[..., 0].numpy()
    np.maximum(u, np.float32(_SMALLEST), out=u)
    for _ in range(2):
        np.negative(np.log(u, out=u), out=u)
    return u


@lru_cache(maxsize=64)
def _remask_words(step: int, K: int) -> np.ndarray:
    """(1, K) int64, read-only by convention: the second words of an image's positions."""
    first = step * _STEP_UNIT + REMASK_STREAM * _STREAM_UNIT
    return np.arange(first, first + K)[None]


def _uniforms(seeds: Tensor, words: Tensor, codes: int) -> Tensor:
    return (_bits(seeds, words, codes) & 0xFFFFFF).float().mul_(2.0**-24)


def _gumbel(seeds: Tensor, words: Tensor, codes: int) -> Tensor:
    if is_plain_cpu(seeds) and _torch_draws_these_bits():
        shape = torch.broadcast_shapes(seeds.shape, words.shape)
        u = _native_uniforms(seeds.numpy(), words.numpy(), shape, codes)
    else:
        u = _uniforms(seeds, words, codes)
    # in place: on a CPU touching fresh memory costs more than the arithmetic
    return u.clamp_(min=_SMALLEST).log_().neg_().log_().neg_()


def _native_uniforms(
    seeds: np.ndarray, words: np.ndarray, shape: tuple[int, ...], codes: int
) -> Tensor:
    """`_uniforms` by torch's own Philox in one pass; seeds and words broadcast to `shape`."""
    keys = np.empty((*shape, 1, 2), np.int64)
    keys[..., 0, 0], keys[..., 0, 1] = seeds, words << 32
    u = torch.empty((*shape, codes))
    if u.numel():  # torch refuses none
        # .default: resolving the overload costs as much as 500 draws
        torch.ops.aten._philox_uniform_.default(u, torch.from_numpy(keys).view(torch.uint64))
    return u


@lru_cache(maxsize=1)
def _torch_draws_these_bits() -> bool:
    """Whether torch's CPU Philox, a private operator of torch 2.14, exists and gives our bits."""
    if not hasattr(torch.ops.aten, "_philox_uniform_"):
        return False
    seeds = torch.tensor([5, -3, 2**62 + 12345])[:, None]
    words = torch.tensor([0, 1, 77 * _STEP_UNIT + 3, _STREAM_UNIT + _STEP_UNIT + 65535])[None]
    try:
        drawn = _native_uniforms(seeds.numpy(), words.numpy(), (3, 4), 23)
    except (AttributeError, RuntimeError, TypeError):  # another signature
        return False
    return torch.equal(drawn, _uniforms(seeds, words, 23))


def _check_counters(
    op: str, seeds: Tensor, positions: Tensor, step: int, codes: int, per_row: bool
) -> None:
    if codes < 0 or not 0 <= step < MAX_NOISE_STEPS:
        raise ValueError(
            f"{op} wants codes >= 0 and step >= 0, below {MAX_NOISE_STEPS}; got {codes} and {step}"
        )
    letters = "RR" if per_row else "BK"
    check_tensors(
        op, {}, seeds=(seeds, letters[0], INT64), positions=(positions, letters[1], INT64)
    )


@triton.jit
def _neg_log(x):
    """-log(x) of positive normal float32, to 1.2e-7 relative everywhere, near 1 too.

    x = 2**e * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); log(1 + f) = f - f**2 / 2 + f**3 P(f),
    P a minimax fit. As exact as tl.log, which also handles zeros, subnormals and infinities: two
    logarithms take 33 instructions this way and 51 with tl.log (sm_90).
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the constant is sqrt(1/2)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = 0.08700434863567352 * f - 0.14267486333847046
    p = p * f + 0.14914768934249878
    p = p * f - 0.1657758504152298
    p = p * f + 0.19963063299655914
    p = p * f - 0.2500133812427521
    p = p * f + 0.3333390951156616
    square = f * f
    log1p_f = f + (p * f - 0.5) * square
    return -(exponent.to(tl.float32) * 0.6931471805599453 + log1p_f)


@triton.jit
def gumbel_from_bits(bits):
    """Standard Gumbel noise in float32 from uint32 bits, as in `gumbel`."""
    # through int32: the signed conversion is one instruction, and 24 bits fit
    u = (bits & 0xFFFFFF).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)
    return _neg_log(_neg_log(tl.maximum(u, 1.0 / 33554432.0)))


@triton.jit
def token_gumbel(seeds, step, positions, quad0, QUADS: tl.constexpr):
    """[R, 4 * QUADS] float32 noise from code 4 * quad0 on, for seeds [R] and positions [R] int32.

    QUADS, the number of counters per row, is a power of two.
    """
    quads = quad0 + tl.arange(0, QUADS)[None, :]
    words = positions[:, None] + step * _STEP
    zero = quads * 0 + words * 0
    r0, r1, r2, r3 = tl.philox(seeds[:, None], zero + quads, zero + words, zero, zero)
    # code = 4 * quad + lane: interleaving pairs of pairs puts the lanes in order
    return tl.interleave(
        tl.interleave(gumbel_from_bits(r0), gumbel_from_bits(r2)),
        tl.interleave(gumbel_from_bits(r1), gumbel_from_bits(r3)),
    )


@triton.jit
def remask_gumbel(seed, step, positions):
    """[K] float32 noise for positions [K] int32 of one sample."""
    zero = positions * 0
    words = positions + step * _STEP + _REMASK
    bits, _, _, _ = tl.philox(seed, zero, words, zero, zero)
    return gumbel_from_bits(bits)
