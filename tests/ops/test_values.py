"""Bad values are refused before a launch: on a CPU if ids would hide them, anywhere on request."""

import runpy

import pytest
import torch
from calls import call_with
from torch import Tensor
from torch._subclasses import FakeTensorMode

from titok_fast import kernels
from titok_fast.kernels import _values
from titok_fast.kernels._values import ENVIRONMENT, check_finite

NAN, INF = float("nan"), float("inf")


def put(value: float, *shape: int) -> Tensor:
    """Zeros, but for the last element."""
    x = torch.zeros(shape)
    x.view(-1)[-1] = value
    return x


Refusal = tuple[str, str, Tensor, str]  # op, argument, its bad value, what the error says of it
HIDDEN_BY_IDS: list[Refusal] = [
    (
        "guided_sample",
        "logits",
        put(NAN, 2, 3, 5),
        r"without NaN; got nan at \[1, 2, 4\], 1 such of 30",
    ),
    ("guided_sample", "uncond_logits", put(NAN, 2, 3, 5), "without NaN"),
    ("guided_sample", "noise", put(NAN, 2, 3, 5), "without NaN"),
    ("lm_head_sample", "hidden", put(-INF, 4, 6), r"with finite values; got -inf at \[3, 5\]"),
    ("lm_head_sample", "uncond_hidden", put(NAN, 4, 6), "with finite values"),
    ("lm_head_sample", "rows", torch.tensor([0, 4]), r"in \[0, 4\); got 4 at \[1\]"),
    ("lm_head_sample", "rows", torch.tensor([-1, 0]), r"in \[0, 4\); got -1 at \[0\]"),
    ("lm_head_sample", "positions", torch.tensor([0, 2**16]), r"in \[0, 65536\); got 65536"),
    ("remask", "scores", put(NAN, 2, 4), "without NaN"),
    ("remask", "noise", put(NAN, 2, 4), "without NaN"),
    ("remask", "num_masked", torch.tensor([1, -1]), r"in \[0, inf\); got -1 at \[1\]"),
    ("nearest_code", "z", put(INF, 4, 3), r"with finite values; got inf at \[3, 2\]"),
    ("masked_cross_entropy", "targets", torch.tensor([0, 7, 1, 2]), r"in \[0, 7\); got 7 at \[1\]"),
]
ON_REQUEST: list[Refusal] = [
    ("lm_head_sample", "weight", put(NAN, 7, 6), "without NaN"),
    ("lm_head_sample", "bias", put(NAN, 7), "without NaN"),
    ("nearest_code", "codebook", put(NAN, 9, 3), "with finite values"),
    ("nearest_code_stats", "z", put(NAN, 4, 3), "with finite values"),
    ("nearest_code_stats", "codebook", put(INF, 9, 3), "with finite values"),
    ("soft_codes", "logits", put(NAN, 4, 9), "without NaN"),
    ("soft_codes", "codebook", put(INF, 9, 3), "with finite values"),
    ("group_norm_silu", "x", put(INF, 1, 4, 2, 2), "with finite values"),
    ("group_norm_silu", "bias", put(NAN, 4), "with finite values"),
    ("add_group_norm_silu", "x", put(NAN, 1, 4, 2, 2), "with finite values"),
    ("add_group_norm_silu", "residual", put(INF, 1, 4, 2, 2), "with finite values"),
    ("masked_cross_entropy", "hidden", put(INF, 4, 6), "with finite values"),
    ("masked_cross_entropy", "weight", put(NAN, 7, 6), "without NaN"),
    ("masked_cross_entropy", "bias", put(NAN, 7), "without NaN"),
    ("masked_cross_entropy", "weights", put(-0.5, 4), r"in \[0, inf\); got -0.5 at \[3\]"),
    ("masked_cross_entropy", "weights", put(NAN, 4), r"in \[0, inf\); got nan"),
]


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_values, "_asked_for", False)


@pytest.mark.parametrize("refusal", HIDDEN_BY_IDS)
def test_ids_hide_no_bad_value_on_a_cpu(refusal: Refusal) -> None:
    op, name, value, message = refusal
    with pytest.raises(ValueError, match=f"{op} wants {name} {message}"):
        call_with(op, **{name: value})


@pytest.mark.parametrize("rule", ["logit", "probability"])
def test_the_logits_of_a_drawn_token_alone_are_looked_at(rule: str) -> None:
    logits, mask = put(NAN, 1, 2, 5), torch.tensor([[True, False]])
    inputs = {"ids": torch.zeros(1, 2, dtype=torch.int64), "noise_temperature": 0.0, "rule": rule}
    candidates, scores = kernels.guided_sample(logits, mask=mask, **inputs)
    assert candidates.tolist() == [[0, 0]]
    assert not scores.isnan().any()
    for drawn in (~mask, mask | True):
        with pytest.raises(ValueError, match=r"got nan at \[0, 1, 4\]"):
            kernels.guided_sample(logits, mask=drawn, **inputs)


@pytest.mark.parametrize("refusal", [*HIDDEN_BY_IDS, *ON_REQUEST])
def test_every_op_looks_before_its_launch_when_asked(
    refusal: Refusal, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, name, value, message = refusal
    monkeypatch.setattr(_values, "_asked_for", True)
    with torch.device(device), pytest.raises(ValueError, match=f"{op} wants {name} {message}"):
        call_with(op, **{name: value.to(device)})


@pytest.mark.parametrize("op", [name for name in kernels.__all__ if name.islower()])
def test_good_values_pass_when_looked_at(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    want = call_with(op)
    monkeypatch.setattr(_values, "_asked_for", True)
    torch.manual_seed(0)
    torch.testing.assert_close(call_with(op), want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("op", "name", "shape"),
    [
        ("nearest_code_stats", "z", (4, 3)),
        ("group_norm_silu", "x", (1, 4, 2, 2)),
        ("masked_cross_entropy", "hidden", (4, 6)),
        ("soft_codes", "logits", (4, 9)),
    ],
)
def test_nan_reaches_the_training_loss(op: str, name: str, shape: tuple[int, ...]) -> None:
    """Unless checks are on, NaN passes: the training loop then skips the update."""
    out = call_with(op, **{name: torch.full(shape, NAN)})
    assert (out if isinstance(out, Tensor) else out.commitment_loss).isnan().all()


def test_infinite_logits_and_empty_tensors_pass() -> None:
    call_with("guided_sample", logits=put(-INF, 2, 3, 5), uncond_logits=None)
    call_with("remask", scores=put(INF, 2, 4))
    call_with("nearest_code", z=torch.empty(0, 3))
    check_finite("op", x=torch.full((70000,), 60000.0, dtype=torch.float16))  # its sum is infinite


@pytest.mark.parametrize("asked", [False, True])
def test_transformed_calls_look_at_no_value(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under vmap a tensor stands for all samples and has no values of its own."""
    monkeypatch.setattr(_values, "_asked_for", asked)
    z, codebook = torch.randn(5, 4, 3), torch.randn(9, 3)

    def ids(rows: Tensor) -> Tensor:
        return kernels.nearest_code(rows, codebook)

    def commitment(rows: Tensor) -> Tensor:
        return kernels.nearest_code_stats(rows, codebook).commitment_loss

    assert torch.equal(torch.vmap(ids)(z), torch.stack([ids(rows) for rows in z]))
    leaf = z.clone().requires_grad_()
    torch.stack([commitment(rows) for rows in leaf]).sum().backward()
    torch.testing.assert_close(torch.vmap(torch.func.grad(commitment))(z), leaf.grad)
    bad = torch.vmap(ids)(z * put(NAN, 5, 4, 3))
    assert ((bad >= 0) & (bad < 9)).all()


def test_fake_tensors_have_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_values, "_asked_for", True)
    with FakeTensorMode():
        ids = kernels.nearest_code(torch.empty(4, 3), torch.empty(9, 3))
        assert ids.shape == (4,)


@pytest.mark.parametrize(("value", "asked"), [("", False), ("0", False), ("1", True)])
def test_the_environment_asks(value: str, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, value)
    assert runpy.run_path(_values.__file__)["_asked_for"] is asked
