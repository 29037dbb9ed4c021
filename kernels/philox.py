"""Counter-based noise: the same number for (seed, position, step, stream, code) on every path.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is
the sample's own 64-bit seed, so a sample does not depend on its batch, its device or neighbours;
the counter is (code // 4, position, step, stream), and code % 4 picks one of its four 32-bit
results. Nothing is stored and nothing advances: kernels make their noise in registers where it is
used, and the torch functions here make the same bits.
Cost in a kernel (sm_90): some 65 instructions per code, half of them for the two logarithms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKEN_STREAM = 0  # noise on logits, one value per code
REMASK_STREAM = 1  # noise on confidences, one value per position: code 0

_TOKEN = tl.constexpr(TOKEN_STREAM)  # device code reads no plain globals
_REMASK = tl.constexpr(REMASK_STREAM)

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 10


def _philox4(seeds: Tensor, step: int, positions: Tensor, quads: int, stream: int) -> list[Tensor]:
    """The four results of each counter, int64 holding uint32, of the shape (*S, quads).

    S is what seeds and positions broadcast to. 64-bit products wrap, but their bits are right, so
    an arithmetic shift and one mask give the high word. In the full-size rounds the low words keep
    stray high bits until they are masked at the end.
    """
    device = positions.device
    shape = (*torch.broadcast_shapes(seeds.shape, positions.shape), quads)
    k0 = (seeds & _LOW).unsqueeze(-1)
    k1 = ((seeds >> 32) & _LOW).unsqueeze(-1)
    c0 = torch.arange(quads, device=device)
    c1 = positions.unsqueeze(-1)
    c2 = torch.full((1,), step, dtype=torch.int64, device=device)
    c3 = torch.full((1,), stream, dtype=torch.int64, device=device)
    # two rounds mix the counter so little that broadcasting does most of their work
    for _ in range(2):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # masked before c1 and c3 come in, while the operands are small
        c0, c2 = (((p1 >> 32) ^ k0) & _LOW) ^ c1, (((p0 >> 32) ^ k1) & _LOW) ^ c3
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    # the rest in one block of memory: on a CPU fresh pages cost several times the arithmetic
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
    """The 32 random bits of each code: what the kernels must draw.

    Args:
        seeds: (B,) int64, one key per sample.
        step: sampling step, in [0, 2**32).
        positions: (P,) int64 in [0, 2**32), same device.
        codes: how many codes, from code 0.
        stream: `TOKEN_STREAM` or `REMASK_STREAM`.

    Returns:
        (B, P, codes) int64 in [0, 2**32).
    """
    lanes = _philox4(seeds[:, None], step, positions[None], -(-codes // 4), stream)
    return torch.stack(lanes, dim=-1).flatten(-2)[..., :codes]


def gumbel(seeds: Tensor, step: int, positions: Tensor, codes: int, stream: int) -> Tensor:
    """Standard Gumbel noise of each code, in float32 from the bits of `philox_bits_ref`.

    u = (bits // 2**9 + 1/2) / 2**23 is exact in float32 and never 0 or 1, so -log(-log(u)) needs
    no guard and lies in [-2.82, 16.64]. Torch operations only: it compiles and never waits for a
    device.

    Args:
        seeds: (B,) int64, one key per sample: all 64 bits count.
        step: sampling step, in [0, 2**32).
        positions: (P,) int64 in [0, 2**32), same device.
        codes: how many codes, from code 0.
        stream: `TOKEN_STREAM` or `REMASK_STREAM`.

    Returns:
        (B, P, codes) float32. The kernels' values agree to a few units in the last place: the bits
        are the same, the logarithms are each library's own.

    Raises:
        ValueError: seeds or positions are no int64 vectors on one device, or codes is negative.
    """
    _check_counters("gumbel", seeds, positions, step, codes)
    return _gumbel(seeds[:, None], step, positions[None], codes, stream)


def row_gumbel(seeds: Tensor, step: int, positions: Tensor, codes: int, stream: int) -> Tensor:
    """`gumbel` for rows that each have their own seed and position.

    Args:
        seeds: (R,) int64.
        step: sampling step, in [0, 2**32).
        positions: (R,) int64 in [0, 2**32), same device.
        codes: how many codes, from code 0.
        stream: `TOKEN_STREAM` or `REMASK_STREAM`.

    Returns:
        (R, codes) float32.

    Raises:
        ValueError: seeds and positions are no int64 vectors of one length on one device, or codes
            is negative.
    """
    _check_counters("row_gumbel", seeds, positions, step, codes)
    if seeds.shape != positions.shape:
        got = f"{tuple(seeds.shape)} and {tuple(positions.shape)}"
        raise ValueError(f"row_gumbel wants as many seeds as positions; got {got}")
    return _gumbel(seeds, step, positions, codes, stream)


def _gumbel(seeds: Tensor, step: int, positions: Tensor, codes: int, stream: int) -> Tensor:
    lanes = _philox4(seeds, step, positions, -(-codes // 4), stream)
    u = torch.empty((*lanes[0].shape, 4), dtype=torch.float32, device=lanes[0].device)
    for i, lane in enumerate(lanes):
        u[..., i] = lane.bitwise_right_shift_(9)
    noise = u.add_(0.5).mul_(2.0**-23).log_().neg_().log_().neg_()
    return noise.flatten(-2)[..., :codes]


def _check_counters(op: str, seeds: Tensor, positions: Tensor, step: int, codes: int) -> None:
    if codes < 0 or step < 0:
        raise ValueError(f"{op} wants codes >= 0 and step >= 0; got {codes} and {step}")
    for name, x in (("seeds", seeds), ("positions", positions)):
        if x.ndim != 1 or x.dtype != torch.int64:
            got = f"{tuple(x.shape)} {x.dtype}"
            raise ValueError(f"{op} wants {name} as an int64 vector; got {got}")
    if seeds.device != positions.device:
        got = f"{seeds.device} and {positions.device}"
        raise ValueError(f"{op} wants seeds and positions on one device; got {got}")


@triton.jit
def _neg_log(x):
    """-log(x) of positive normal float32, to 1.2e-7 relative everywhere, near 1 too.

    x = 2**e * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); log(1 + f) = f - f**2 / 2 + f**3 P(f),
    P a minimax fit. As exact as tl.log, which also serves zeros, subnormals and infinities: two
    logarithms a code take 33 instructions this way and 51 that way (sm_90).
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
    """Standard Gumbel noise, float32, of uint32 bits: `gumbel` on the device."""
    # through int32: the signed conversion is one instruction, and 23 bits fit
    u = ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return _neg_log(_neg_log(u))


@triton.jit
def token_gumbel(seeds, step, positions, quad0, QUADS: tl.constexpr):
    """Noise for 4 * QUADS codes from code 4 * quad0, for each of R rows.

    Args:
        seeds: [R] int64.
        step: scalar.
        positions: [R] int32.
        quad0: first code // 4.
        QUADS: how many counters per row, a power of two.

    Returns:
        [R, 4 * QUADS] float32.
    """
    quads = quad0 + tl.arange(0, QUADS)[None, :]
    zero = quads * 0 + positions[:, None] * 0
    stream = zero + _TOKEN
    r0, r1, r2, r3 = tl.philox(
        seeds[:, None], zero + quads, zero + positions[:, None], zero + step, stream
    )
    # code = 4 * quad + lane: interleaving pairs of pairs puts the lanes in order
    return tl.interleave(
        tl.interleave(gumbel_from_bits(r0), gumbel_from_bits(r2)),
        tl.interleave(gumbel_from_bits(r1), gumbel_from_bits(r3)),
    )


@triton.jit
def remask_gumbel(seed, step, positions):
    """Noise for positions [P] int32 of the sample with this seed: [P] float32."""
    zero = positions * 0
    bits, _, _, _ = tl.philox(seed, zero, positions, zero + step, zero + _REMASK)
    return gumbel_from_bits(bits)
