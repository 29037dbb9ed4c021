"""Draw masked tokens from hidden states: head, guidance, noise and argmax without logits in memory.

R masked rows. Guidance is linear, so it is applied to the hidden state: one matmul instead of the
two of a pair of logits. One program makes one BLOCK_R x BLOCK_N tile of logits in registers, adds
bias and noise, and writes each row's best code of that tile; a second launch, one program per row,
picks among the tiles. No running argmax over tiles inside a program: with 32 rows a tile per
program is what fills the chip, and the partial results are a few percent of the logits.
bfloat16 and float16 run on tensor cores, float32 in IEEE arithmetic without them.
Floor at R = 256, D = 768, N = 4096, bfloat16: 7 MB and 1.6 GFLOP, 2.1 us on an H100; the noise of
65 instructions per code adds 2.4 us. Predicted: half of the floor; unfused, 4 MB of logits would
be written and read several times. At R = 32 the weight is the floor, 1.9 us: predicted 60 %.
Definition: guided_sample.py on the logits; use that where the logits are needed.
"""

from math import inf
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.library import wrap_triton

from titok_fast.kernels._launch import lazy_triton_op, runs_triton
from titok_fast.kernels._lm_head_device import head_kernel, pick_kernel
from titok_fast.kernels._offline import OfflineCase
from titok_fast.kernels._sampling import check_sampling, draw_ref, unit_stride
from titok_fast.kernels._values import (
    FLOAT_TYPES,
    INT64,
    TRITON_NAMES,
    check_finite,
    check_in_range,
    check_no_nan,
    check_tensors,
    looks_at_values,
)
from titok_fast.kernels.philox import MAX_POSITIONS, TOKEN_STREAM, row_gumbel

MAX_CODES = 2**20  # a tile has at least 32, a grid at most 65535 tiles


def lm_head_sample_ref(
    hidden: Tensor,
    uncond_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    step: int,
    guidance: float,
    softmax_temperature: float,
    noise_temperature: float,
    rule: str,
) -> tuple[Tensor, Tensor]:
    """Reference of `lm_head_sample`; unlike the kernel it rounds logits to the weight's dtype."""
    h = hidden if rows is None else hidden[rows]
    if uncond_hidden is not None:
        h_uncond = uncond_hidden if rows is None else uncond_hidden[rows]
        h = (h.float() + guidance * (h.float() - h_uncond.float())).to(weight.dtype)
    l = F.linear(h, weight, bias).float()
    if softmax_temperature != 1.0:
        l = l / softmax_temperature
    noise = None
    if noise_temperature != 0.0:
        assert seeds is not None  # lm_head_sample has checked both
        assert positions is not None
        noise = row_gumbel(seeds, step, positions, l.shape[1], TOKEN_STREAM)
    return draw_ref(l, noise, noise_temperature, rule)


def _plan(R: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile, warps and stages: enough programs for few rows, enough reuse for many."""
    if dtype == torch.float32:
        sizes = (32, 64, 32, 4, 3) if R <= 128 else (64, 128, 16, 8, 3)
    elif R <= 512:
        sizes = (32, 32, 128, 4, 4) if R <= 32 else (64, 64, 64, 4, 4)
    else:
        sizes = (128, 128, 32, 8, 4)
    names = ("BLOCK_R", "BLOCK_N", "BLOCK_D", "num_warps", "num_stages")
    return dict(zip(names, sizes, strict=True))


@lazy_triton_op("lm_head_sample", like=lm_head_sample_ref)
def _lm_head_sample(
    hidden: Tensor, uncond_hidden: Tensor | None, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    rows, seeds, positions, step, guidance, softmax_temperature, noise_temperature, rule = rest
    (N, D), R = weight.shape, (hidden if rows is None else rows).shape[0]
    device = hidden.device
    candidates = torch.empty(R, dtype=torch.int64, device=device)
    scores = torch.empty(R, dtype=torch.float32, device=device)
    if R == 0:
        return candidates, scores
    hidden, weight = unit_stride(hidden), unit_stride(weight)
    uncond = hidden if uncond_hidden is None else unit_stride(uncond_hidden)
    plan = _plan(R, weight.dtype)
    tiles = triton.cdiv(N, plan["BLOCK_N"])
    parts = torch.empty((4, R, tiles), dtype=torch.float32, device=device)
    codes = torch.empty((R, tiles), dtype=torch.int32, device=device)
    # the kernel takes no None: pass a tensor that it does not read
    vectors = [codes if x is None else x.contiguous() for x in (rows, seeds, positions)]
    offset = weight if bias is None else bias.contiguous()
    sizes = (hidden.shape[0], R, N, D, hidden.stride(0), uncond.stride(0), weight.stride(0))
    scalars = (step, guidance, 1.0 / softmax_temperature, noise_temperature)
    flags = {"GUIDED": uncond_hidden is not None, "BIASED": bias is not None}
    flags |= {"GATHERED": rows is not None, "NOISY": noise_temperature != 0.0}
    flags |= {"PROBABILITY": rule == "probability", "EVEN_D": D % plan["BLOCK_D"] == 0}
    # row tiles run fastest, so that neighbouring programs share a tile of the weight in L2
    wrap_triton(head_kernel)[(triton.cdiv(R, plan["BLOCK_R"]), tiles)](
        hidden, uncond, weight, offset, *vectors, parts, codes, *sizes, *scalars, **flags, **plan
    )
    block, probability = triton.next_power_of_2(tiles), flags["PROBABILITY"]
    wrap_triton(pick_kernel)[(R,)](
        parts, codes, candidates, scores, R, N, tiles, PROBABILITY=probability, BLOCK_T=block
    )
    return candidates, scores


def lm_head_sample(
    hidden: Tensor,
    uncond_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    rows: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    step: int = 0,
    guidance: float = 0.0,
    softmax_temperature: float = 1.0,
    noise_temperature: float,
    rule: str = "logit",
) -> tuple[Tensor, Tensor]:
    """Draw a code for each masked row straight from the last hidden states.

    The same draw as `guided_sample(hidden @ weight.T + bias, ...)`, with the same noise: ids differ
    only where rounding of the logits or of the guided hidden state decides between close codes.

    Args:
        hidden: (M, D) conditional hidden states, float32, bfloat16 or float16. Any strides; no copy
            is made where the last one is 1.
        uncond_hidden: (M, D), same dtype and device, or None for no guidance.
        weight: (N, D) head, same dtype and device, N at most 2**20; may be a slice of a larger one.
        bias: (N,), same dtype and device, or None.
        rows: (R,) int64 in [0, M), the rows to draw for, or None for all, R = M.
        seeds: (R,) int64, the seed of each row's sample. May be None, like positions, if
            noise_temperature is 0.
        positions: (R,) int64 in [0, 2**16), each row's token position in its sample.
        step: sampling step, in [0, 2**15).
        guidance: 0 means none; the customary scale w is guidance + 1. Finite, as the next two.
        softmax_temperature: above 0.
        noise_temperature: at least 0; 0 is greedy.
        rule: "logit" scores a candidate by its logit (TiTok), "probability" by its log-softmax.

    Returns:
        Candidates (R,) int64 in [0, N), and scores (R,) float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, an unknown rule, a scalar out of range or
            not finite, or no source of noise. Also hidden states that are not finite, and rows or
            positions out of range: on a GPU, where the check waits, only under
            TITOK_FAST_CHECK_VALUES=1, which also finds NaN in the head. Otherwise NaN gives an
            unspecified candidate in [0, N), and a row out of range reads as zeros.
    """
    op = "lm_head_sample"
    sizes = check_tensors(
        op,
        {"N": MAX_CODES, "D": inf},
        hidden=(hidden, "MD", FLOAT_TYPES),
        uncond_hidden=(uncond_hidden, "MD", (hidden.dtype,)),
        weight=(weight, "ND", (hidden.dtype,)),
        bias=(bias, "N", (hidden.dtype,)),
        rows=(rows, "R", INT64),
        seeds=(seeds, "M" if rows is None else "R", INT64),
        positions=(positions, "M" if rows is None else "R", INT64),
    )
    check_sampling(op, rule, step, noise_temperature, softmax_temperature, guidance)
    if (seeds is None or positions is None) and noise_temperature != 0.0:
        raise ValueError(f"{op} wants seeds and positions unless noise_temperature is 0")
    if looks_at_values(hidden, ids_only=True):
        check_finite(op, hidden=hidden, uncond_hidden=uncond_hidden)
        check_in_range(op, "rows", rows, 0, sizes["M"])
        check_in_range(op, "positions", positions, 0, MAX_POSITIONS)
    if looks_at_values(hidden, ids_only=False):  # weights do not change between calls
        check_no_nan(op, weight=weight, bias=bias)
    implementation = _lm_head_sample if runs_triton(hidden) else lm_head_sample_ref
    tensors = (hidden, uncond_hidden, weight, bias, rows, seeds, positions)
    scalars = (step, guidance, softmax_temperature, noise_temperature, rule)
    return implementation(*tensors, *scalars)


def offline_cases() -> list[OfflineCase]:
    """The heads of both generators, D = 768 and 1024, for one image, eight and sixty-four.

    The last of them is plain: no guidance, no bias, all rows, no noise.
    """
    both, L32 = (torch.float32, torch.bfloat16), ("L-32 B=8", 256, 4096, 768)
    small, large = ("L-32 B=1", 32, 4096, 768), ("S-128 B=64", 8192, 4096, 1024)
    shapes = (small, L32, large, ("8k codes B=8", 512, 8192, 768))
    cases = [_head_case(*shape, dtype, "logit") for shape in shapes for dtype in both]
    cases += [_head_case(*L32, dtype, "probability") for dtype in FLOAT_TYPES]
    cases.append(_head_case(*L32, torch.bfloat16, "logit", plain=True))
    return cases + [
        _pick_case(256, tiles, probability) for tiles in (64, 128) for probability in (False, True)
    ]


def _head_case(
    name: str, R: int, N: int, D: int, dtype: torch.dtype, rule: str, plain: bool = False
) -> OfflineCase:
    kind, width, streams = TRITON_NAMES[dtype], dtype.itemsize, 1 if plain else 2
    plan = _plan(R, dtype)
    options = {name: plan.pop(name) for name in ("num_warps", "num_stages")}
    flags: dict[str, int] = dict.fromkeys(("GUIDED", "BIASED", "GATHERED", "NOISY"), not plain)
    flags |= {"PROBABILITY": rule == "probability", "EVEN_D": True}
    types = {"*i64": "rows_ptr seeds_ptr positions_ptr", "*i32": "codes_ptr", "i32": "M R step"}
    types |= {"fp32": "guidance inv_temperature noise_temperature"}
    return OfflineCase.of(
        head_kernel,
        f"{name} D={D} {kind} {plan['BLOCK_R']}x{plan['BLOCK_N']} {rule}" + " plain" * plain,
        types | {f"*{kind}": "hidden_ptr uncond_ptr weight_ptr bias_ptr"},
        flags | plan,
        **options,
        expects_mma=dtype != torch.float32,
        flops=2.0 * R * N * D + (1.0 if plain else 50.0) * R * N,
        bytes_min=width * (streams * R * D + N * D) + (12 * R if plain else width * N + 36 * R),
        # a head per stream, then guided_sample's 29 passes over their logits, or 6
        bytes_unfused=width * (streams * (R * D + N * D + R * N) + (6 if plain else 29) * R * N),
    )


def _pick_case(R: int, tiles: int, probability: bool) -> OfflineCase:
    moved = float(R * tiles * (20 if probability else 12) + 12 * R)
    return OfflineCase.of(
        pick_kernel,
        f"R={R} tiles={tiles} {'probability' if probability else 'logit'}",
        {"*i32": "codes_ptr", "*i64": "candidates_ptr", "i32": "R"},
        {"PROBABILITY": probability, "BLOCK_T": tiles},
        vector_loads=False,  # 64 values are half a value per thread: the launch is the cost
        flops=4.0 * R * tiles,
        bytes_min=moved,
        bytes_unfused=moved,
    )
