"""Every public kernel refuses arguments that do not fit, and the message names them."""

from typing import Any

import pytest
import torch
from calls import call_with
from torch import Tensor

INF, NAN = float("inf"), float("nan")


def f(*shape: int) -> Tensor:
    return torch.zeros(shape)


def i(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


# by op: changed arguments, what the message says; shapes of the others are in calls.py
SCALARS: list[tuple[dict[str, Any], str]] = [
    ({"rule": "entropy"}, "rule .*entropy"),
    ({"step": -1}, "step >= 0"),
    ({"noise_temperature": -1.0}, "noise_temperature >= 0"),
    ({"noise_temperature": NAN}, "noise_temperature >= 0"),
    ({"noise_temperature": INF}, "noise_temperature .*float32; got inf"),
]
GUIDED = [
    *SCALARS,
    ({"softmax_temperature": 0.0}, "softmax_temperature > 0"),
    ({"softmax_temperature": NAN}, "softmax_temperature > 0"),
    ({"softmax_temperature": INF}, "softmax_temperature .*float32; got inf"),
    ({"softmax_temperature": 1e39}, r"softmax_temperature .*float32; got 1e\+39"),
    ({"guidance": NAN}, "guidance to be finite.*nan"),
    ({"guidance": -INF}, "guidance to be finite.*-inf"),
]
NORM: list[tuple[dict[str, Any], str]] = [
    ({"x": f(2, 4, 4)}, r"x \(B, C, H, W\).*\(2, 4, 4\)"),
    ({"weight": f(5)}, r"weight \(C=4\).*\(5,\)"),
    ({"weight": i(4)}, "weight .*int64"),
    ({"bias": i(4)}, "bias .*int64"),
    ({"bias": f(4).to("meta")}, "bias .* on cpu; got .* on meta"),
    ({"groups": 3}, "divides 4 channels; got 3"),
    ({"groups": 0}, "divides 4 channels; got 0"),
    *(({"eps": eps}, f"a finite eps of at least 0; got {eps}") for eps in (-1e-6, INF, NAN)),
]
REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "guided_sample": [
        *GUIDED,
        ({"logits": f(3, 5)}, r"logits \(B, K, N\).*\(3, 5\)"),
        ({"logits": i(2, 3, 5)}, "logits .*float32 or bfloat16 or float16.*int64"),
        ({"uncond_logits": f(1, 3, 5)}, "uncond_logits"),
        ({"uncond_logits": f(2, 3, 5).half()}, "uncond_logits .*float32.*float16"),
        ({"uncond_logits": f(2, 3, 5).to("meta")}, "uncond_logits .*cpu.*meta"),
        ({"mask": i(2, 3)}, "mask .*bool.*int64"),
        ({"mask": f(2, 2).bool()}, r"mask \(B=2, K=3\).*\(2, 2\)"),
        ({"ids": i(2, 3).int()}, "ids .*int64.*int32"),
        ({"seeds": i(3)}, r"seeds \(B=2\).*\(3,\)"),
        ({"noise": None}, "seeds or noise"),
        ({"noise": f(2, 3, 5).half()}, "noise .*float32.*float16"),
        ({"noise": f(1, 3, 5)}, "noise"),
    ],
    "lm_head_sample": [
        *GUIDED,
        ({"hidden": f(6)}, r"hidden \(M, D\).*\(6,\)"),
        ({"hidden": i(4, 6)}, "hidden .*float32.*int64"),
        ({"weight": f(7, 5)}, r"weight \(N, D=6\).*\(7, 5\)"),
        ({"weight": f(0, 6), "bias": None}, "N at least 1"),
        ({"weight": f(1, 6).expand(2**20 + 1, 6), "bias": None}, "N .*1048576; got 1048577"),
        ({"weight": f(7, 6).half()}, "weight .*float32.*float16"),
        ({"weight": f(7, 6).to("meta")}, "weight .*cpu.*meta"),
        ({"uncond_hidden": f(2, 6)}, r"uncond_hidden \(M=4, D=6\).*\(2, 6\)"),
        ({"bias": f(6)}, r"bias \(N=7\).*\(6,\)"),
        ({"rows": i(2).int()}, "rows .*int64.*int32"),
        ({"rows": i(3)}, r"seeds \(R=3\).*\(2,\)"),
        ({"rows": None}, r"seeds \(M=4\).*\(2,\)"),
        ({"positions": f(2)}, "positions .*int64.*float32"),
        ({"seeds": None}, "seeds and positions"),
        ({"positions": None}, "seeds and positions"),
    ],
    "remask": [
        *SCALARS,
        ({"scores": f(4)}, r"scores \(B, K\).*\(4,\)"),
        ({"scores": f(2, 4).half()}, "scores .*float32.*float16"),
        ({"candidates": i(1, 4)}, "candidates"),
        ({"candidates": i(2, 4).int()}, "candidates .*int64.*int32"),
        ({"candidates": i(2, 4).to("meta")}, "candidates .*cpu.*meta"),
        ({"num_masked": i(4)}, r"num_masked \(B=2\).*\(4,\)"),
        ({"num_masked": f(2)}, "num_masked .*int64.*float32"),
        ({"seeds": i(1)}, "seeds"),
        ({"noise": None}, "seeds or noise"),
        ({"noise": f(1, 4)}, "noise"),
        *(
            ({"scores": f(1, K), "candidates": i(1, K), "num_masked": i(1), "noise": None}, told)
            for K, told in ((0, "K at least 1 and at most 1024; got 0"), (1025, "1024; got 1025"))
        ),
    ],
    "nearest_code": [
        ({"z": f(2, 3, 4)}, r"z \(R, C\).*\(2, 3, 4\)"),
        ({"codebook": f(5, 4)}, r"codebook \(N, C=3\).*\(5, 4\)"),
        ({"z": f(2, 0), "codebook": f(5, 0)}, "C at least 1 and at most 256; got 0"),
        ({"z": f(2, 257), "codebook": f(5, 257)}, "C at least 1 and at most 256; got 257"),
        ({"codebook": f(0, 3)}, "N at least 1 .*; got 0"),
        ({"codebook": f(1, 3).expand(2**18 + 1, 3)}, "N .*at most 262144; got 262145"),
        ({"z": i(2, 3)}, "z .*int64"),
        ({"codebook": f(5, 3).double()}, "codebook .*float64"),
        ({"codebook": f(5, 3).to("meta")}, "codebook .*cpu.*meta"),
        ({"metric": "dot"}, "metric .*'dot'"),
    ],
    "nearest_code_stats": [
        ({"codebook": f(5, 4)}, r"codebook \(N, C=3\).*\(5, 4\)"),
        ({"metric": "l1"}, "metric .*'l1'"),
        *(({"beta": beta}, f"a finite beta.*{beta}") for beta in (-0.25, INF, NAN)),
    ],
    "soft_codes": [
        ({"logits": f(2, 3, 4)}, r"logits \(R, N\).*\(2, 3, 4\)"),
        ({"codebook": f(4, 5)}, r"codebook \(N=9, C\).*\(4, 5\)"),
        ({"logits": f(2, 0), "codebook": f(0, 5)}, "N at least 1; got 0"),
        ({"codebook": f(9, 0)}, "C at least 1; got 0"),
        ({"logits": f(2, 9).double()}, "logits .*float64"),
        ({"codebook": i(9, 5)}, "codebook .*int64"),
        ({"codebook": f(9, 5).to("meta")}, "codebook .*cpu.*meta"),
    ],
    "group_norm_silu": [
        *NORM,
        ({"x": f(2, 4, 0, 4)}, "H at least 1; got 0"),
        ({"x": i(2, 4, 4, 4)}, "x .*int64"),
    ],
    "add_group_norm_silu": [
        *NORM,
        ({"residual": f(1, 4, 2, 1)}, r"residual \(B=1, C=4, H=2, W=2\).*\(1, 4, 2, 1\)"),
        ({"residual": f(1, 4, 2, 2).double()}, "residual .*float32.*float64"),
        ({"residual": f(1, 4, 2, 2).to("meta")}, "residual .* on cpu; got .* on meta"),
    ],
    "masked_cross_entropy": [
        ({"hidden": f(4, 5)}, r"weight \(N, D=5\).*\(7, 6\)"),
        ({"weight": f(7)}, r"weight \(N, D=6\).*\(7,\)"),
        ({"bias": f(6)}, r"bias \(N=7\).*\(6,\)"),
        ({"targets": i(5)}, r"targets \(R=4\).*\(5,\)"),
        ({"weights": f(4, 1)}, r"weights \(R=4\).*\(4, 1\)"),
        ({"targets": i(4).int()}, "targets .*int64.*int32"),
        ({"bias": f(7).to("meta")}, "bias .* on cpu; got .* on meta"),
        ({"weight": f(7, 6).to("meta")}, "weight .* on cpu; got .* on meta"),
        ({"weights": f(4).bool()}, "weights .*float32.*bool"),
        ({"weight": f(0, 6), "bias": f(0)}, "N at least 1; got 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing in \[0, 1\); got 1.0"),
        ({"label_smoothing": -0.1}, "got -0.1"),
    ],
}


@pytest.mark.parametrize(
    ("op", "change", "message"), [(op, *row) for op, rows in REFUSED.items() for row in rows]
)
def test_bad_arguments_are_named(
    op_device: torch.device, op: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{op} wants .*{message}"):
        call_with(op, **change)


@pytest.mark.parametrize(("K", "N", "message"), [(3, 0, "N at least 1"), (2**16 + 1, 1, "65537")])
def test_sizes_of_logits_are_limited(K: int, N: int, message: str) -> None:
    logits, mask, ids = f(1).expand(1, K, N), f(1).bool().expand(1, K), i(1).expand(1, K)
    with pytest.raises(ValueError, match=f"^guided_sample wants .*{message}"):
        call_with(
            "guided_sample", logits=logits, mask=mask, ids=ids, uncond_logits=None, noise=None
        )
