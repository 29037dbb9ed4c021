"""Every kernel on a GPU against float64: published shapes and odd ones, every dtype.

One table, TABLE: a check and the shapes it takes. A check makes inputs, runs the public function on
the device and compares with float64, or with the reference where both draw from the same counters.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from calls import DTYPES, any_seeds, assert_same_draws
from support.tolerances import ROUNDOFF, assert_near
from torch import Tensor

from titok_fast.kernels._sampling import RULES
from titok_fast.kernels.group_norm_silu import add_group_norm_silu, group_norm_silu
from titok_fast.kernels.guided_sample import guided_sample, guided_sample_ref
from titok_fast.kernels.lm_head_sample import lm_head_sample, lm_head_sample_ref
from titok_fast.kernels.masked_cross_entropy import masked_cross_entropy, masked_cross_entropy_ref
from titok_fast.kernels.nearest_code import METRICS, nearest_code, nearest_code_ref
from titok_fast.kernels.nearest_code_stats import nearest_code_stats, nearest_code_stats_ref
from titok_fast.kernels.philox import TOKEN_STREAM, gumbel, row_gumbel
from titok_fast.kernels.remask import remask, remask_ref
from titok_fast.kernels.soft_codes import soft_codes

pytestmark = pytest.mark.gpu
Shape, Scales, Tensors = tuple[int, ...], Sequence[float], Sequence[Tensor]
Check = Callable[[Shape, torch.dtype, torch.device], None]


def clear_codes(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(R, C) latents, (N, C) codes, and the clearly nearest ids (R,)."""
    R, N, C = shape
    codebook = torch.randn(N, C, device=device)
    want = torch.randint(N, (R,), device=device)
    z = codebook[want] + 0.01 * torch.randn(R, C, device=device)
    return z.to(dtype), codebook, want


def check_nearest_code(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    z, codebook, want = clear_codes(shape, dtype, device)
    for metric in METRICS:
        assert torch.equal(nearest_code(z, codebook, metric=metric), want)
    rivals = torch.randn_like(z)  # no clear winner: sums are in another order
    for metric in METRICS:
        ids = nearest_code(rivals, codebook, metric=metric)
        same = ids == nearest_code_ref(rivals, codebook, metric)
        assert same.double().mean() > 0.999


def check_nearest_code_stats(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    z, codebook, ids = clear_codes(shape, dtype, device)
    R, C = z.shape
    g = torch.randn(R, C, device=device)
    for metric in METRICS:
        leaves = [x.detach().clone().requires_grad_() for x in (z, codebook)]
        wide = [x.detach().double().requires_grad_() for x in (z, codebook)]
        got, want = (
            nearest_code_stats(*leaves, metric=metric),
            nearest_code_stats_ref(*wide, metric=metric),
        )
        assert torch.equal(got.ids, ids)
        assert torch.equal(want.ids, ids)
        assert torch.equal(got.counts, want.counts)
        # f + (q - f) rounds at the size of f, not of q
        assert_near(got.quantized, want.quantized, scale=float(codebook.abs().max()))
        for mine, theirs in zip(got[2:4], want[2:4], strict=True):
            assert_near(mine, theirs, terms=R * C)
        mine, theirs = (
            torch.autograd.grad((s.quantized * g).sum() + s.commitment_loss + s.codebook_loss, x)
            for s, x in ((got, leaves), (want, wide))
        )
        # gradients along a unit row cancel; and q - f is smaller than either
        shortest = [float(x.detach().float().norm(dim=1).min()) for x in (z, codebook)]
        rows_of_code = max(1.0, R / len(codebook))
        scales = (float(g.norm()) / shortest[0], 2 / C * (rows_of_code / R) ** 0.5 / shortest[1])
        near_in_norm(mine, theirs, (dtype, torch.float32), terms=R, scales=scales)


def near_in_norm(
    got: Tensors, want: Tensors, dtypes: Sequence[torch.dtype], terms: int, scales: Scales = ()
) -> None:
    """Assert that the norm of each gradient's error is within a few roundings of its dtype.

    An entry sums `terms` numbers, which may cancel: `scales` are their norms, 0 where none do.
    """
    for i, (mine, theirs, dtype) in enumerate(zip(got, want, dtypes, strict=True)):
        size = float(theirs.norm()) + (scales[i] if scales else 0.0)
        drift = terms**0.5 if dtype == torch.float32 else 1.0
        error = float((mine.double() - theirs).norm())
        assert error <= 4 * drift * ROUNDOFF[dtype] * size, f"gradient {i}"


def check_guided_sample(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    B, K, N = shape
    logits, uncond = (4 * torch.randn(2, B, K, N, device=device)).to(dtype)
    mask = torch.rand(B, K, device=device) < 0.7
    ids, seeds = torch.randint(N, (B, K), device=device), any_seeds(B, device)
    noise = gumbel(seeds, 5, torch.arange(K, device=device), N, TOKEN_STREAM)
    mixed = (logits.float() + 2.25 * (logits.float() - uncond.float())) / 0.9
    options = {"mask": mask, "ids": ids, "seeds": seeds, "step": 5, "guidance": 2.25}
    options |= {"softmax_temperature": 0.9, "noise_temperature": 4.75}
    for rule in RULES:
        got = guided_sample(logits, uncond, **options, rule=rule)
        want = guided_sample_ref(logits, uncond, mask, ids, seeds, None, 5, 2.25, 0.9, 4.75, rule)
        assert torch.equal(got[0][~mask], ids[~mask])
        assert (got[1][~mask] == torch.inf).all()
        noisy = (mixed + 4.75 * noise)[mask]
        pairs = [(x[mask], y[mask]) for x, y in (got, want)]
        assert_same_draws(noisy, pairs[0], pairs[1], 1e-5)


def check_remask(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    B, K = shape
    candidates = torch.randint(4096, (B, K), device=device)
    scores = torch.randn(B, K, device=device)
    scores[torch.rand(B, K, device=device) < 0.3] = torch.inf
    count = torch.randint(-1, K + 2, (B,), device=device)
    noise = torch.randn(B, K, device=device)
    for rule in RULES:
        got = remask(
            candidates, scores, count, mask_id=4096, noise_temperature=2.0, rule=rule, noise=noise
        )
        want = remask_ref(candidates, scores, count, None, noise, 4096, 0, 2.0, rule)
        assert torch.equal(got, want)


def check_lm_head_sample(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    R, N, D = shape
    # few bits, so that guidance is exact in every dtype: another rounding would change a logit
    hidden, uncond = (torch.randint(-8, 9, (2, R + 3, D), device=device) / 4).to(dtype)
    weight = (torch.randn(N, D, device=device) / D**0.5).to(dtype)
    bias = torch.randn(N, device=device).to(dtype)
    rows = torch.randperm(R + 3, device=device)[:R]
    seeds, positions = any_seeds(R, device), torch.randint(256, (R,), device=device)
    mixed = (hidden.float() + 2.0 * (hidden.float() - uncond.float())).to(dtype)[rows]
    l = F.linear(mixed.double(), weight.double(), bias.double()).float()
    noisy = l + 4.75 * row_gumbel(seeds, 5, positions, N, TOKEN_STREAM)
    options = {"rows": rows, "seeds": seeds, "positions": positions, "step": 5}
    options |= {"guidance": 2.0, "noise_temperature": 4.75}
    # the reference on float32: the kernel's logits are float32 too
    head = (mixed.float(), None, weight.float(), bias.float(), None)
    for rule in RULES:
        got = lm_head_sample(hidden, uncond, weight, bias, **options, rule=rule)
        want = lm_head_sample_ref(*head, seeds, positions, 5, 0.0, 1.0, 4.75, rule)
        # sums of D terms in another order
        assert_same_draws(noisy, got, want, 1e-5 + D**0.5 * 2.0**-21)


def check_soft_codes(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    M, N, C = shape
    logits = (3 * torch.randn(M, N, device=device)).to(dtype).requires_grad_()
    codebook = torch.randn(N, C, device=device).to(dtype).requires_grad_()
    g = torch.randn(M, C, device=device).to(dtype)
    wide = [x.detach().double().requires_grad_() for x in (logits, codebook)]
    got, want = soft_codes(logits, codebook), torch.softmax(wide[0], -1) @ wide[1]
    assert_near(got, want, terms=N, scale=4.0)
    mine = torch.autograd.grad(got, (logits, codebook), g)
    theirs = torch.autograd.grad(want, wide, g.double())
    if N > 1:  # a single code has probability 1 and gradient 0
        near_in_norm(mine, theirs, (dtype, dtype), terms=max(M, N))


def check_group_norm_silu(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    B, C, side, groups = shape
    x, residual, g = (
        t.to(dtype).to(memory_format=torch.channels_last)
        for t in torch.randn(3, B, C, side, side, device=device)
    )
    weight, bias = torch.rand(2, C, device=device) + 0.5
    leaves = [t.requires_grad_() for t in (x + 3, residual, weight, bias)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    got, added = add_group_norm_silu(*leaves, groups=groups)
    total = wide[0] + wide[1]
    assert_near(added, total)
    # by definition the sum is rounded to the dtype before the normalisation
    rounded = total + (added.double() - total).detach()
    want = F.silu(F.group_norm(rounded, groups, wide[2], wide[3], 1e-6))
    terms = C // groups * side * side
    assert_near(got, want, terms=terms, scale=4.0)
    plain = group_norm_silu(added.detach(), weight.detach(), bias.detach(), groups)
    assert_near(plain, want, terms=terms, scale=4.0)
    mine = torch.autograd.grad(got, leaves, g)
    theirs = torch.autograd.grad(want, wide, g.double())
    # two numbers are always normalised to -1 and 1: their gradients cancel
    spread = added.detach().double().reshape(B, groups, -1).var(dim=2, correction=0)
    cancels = float(g.double().norm() * (spread + 1e-6).rsqrt().max())
    near_in_norm(mine, theirs, [dtype] * 4, terms=B * terms, scales=(cancels, cancels, 0.0, 0.0))


def check_masked_cross_entropy(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    R, N, D = shape
    hidden = torch.randn(R, D, device=device).to(dtype)
    weight = (torch.randn(N, D, device=device) / D**0.5).to(dtype)
    bias = torch.randn(N, device=device).to(dtype)
    targets = torch.randint(N, (R,), device=device)
    weights = torch.where(torch.rand(R, device=device) < 0.6, 1.0, 0.1)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    got = masked_cross_entropy(*leaves, targets, weights)
    want = masked_cross_entropy_ref(*wide, targets, weights)
    # logits are rounded to the dtype before the loss, which then averages over rows
    assert abs(float(got - want)) <= 8 * ROUNDOFF[dtype] * (1 + float(want))
    mine, theirs = torch.autograd.grad(got, leaves), torch.autograd.grad(want, wide)
    near_in_norm(mine, theirs, [dtype] * 3, terms=max(R, N))


# published shapes first, then single, prime and just-beyond-a-tile sizes
CODES = ((32, 4096, 12), (8192, 4096, 12), (256, 8192, 64), (16384, 8192, 64))
CODES += ((1, 1, 1), (33, 2, 3), (4099, 4099, 13), (2049, 65, 256), (256, 1024, 256))
HEADS = ((32, 4096, 768), (256, 4096, 768), (8192, 4096, 1024), (1, 1, 1), (67, 4099, 77))
ODD_LOGITS = ((1, 1, 1), (3, 7, 4099), (5, 2, 31))
ODD_BLOCKS = ((1, 2, 1, 1), (3, 6, 7, 3), (1, 96, 33, 32))
TABLE: dict[Check, tuple[tuple[Shape, ...], Sequence[torch.dtype]]] = {
    check_nearest_code: (CODES, DTYPES),
    check_nearest_code_stats: (CODES, DTYPES),
    check_guided_sample: (
        ((1, 32, 4096), (8, 32, 4096), (8, 64, 4096), (64, 128, 4096), (2, 64, 8192), *ODD_LOGITS),
        DTYPES,
    ),
    # scores are float32 always
    check_remask: (((1, 32), (8, 64), (128, 128), (3, 1), (5, 1000), (2, 1024)), DTYPES[:1]),
    check_lm_head_sample: (HEADS, DTYPES),
    check_soft_codes: (
        ((256, 1024, 256), (16384, 1024, 256), (1, 1, 1), (67, 1021, 33), (4099, 70, 257)),
        DTYPES,
    ),
    check_group_norm_silu: (
        ((8, 512, 16, 32), (2, 256, 64, 32), (1, 128, 256, 32), *ODD_BLOCKS),
        DTYPES,
    ),
    check_masked_cross_entropy: (((*HEADS[:2], (8200, 4096, 768), *HEADS[3:])), DTYPES),
}


@pytest.mark.parametrize(
    ("check", "shape", "dtype"),
    [
        pytest.param(check, shape, dtype, id=f"{check.__name__[6:]}-{shape}-{str(dtype)[6:]}")
        for check, (shapes, dtypes) in TABLE.items()
        for shape in shapes
        for dtype in dtypes
    ],
)
def test_kernel_against_definition(
    device: torch.device, check: Check, shape: Shape, dtype: torch.dtype
) -> None:
    check(shape, dtype, device)
