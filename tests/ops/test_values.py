"""Values that no op can use: named before a launch, on a CPU always where ids would hide them."""

import runpy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from titok_fast import kernels
from titok_fast.kernels import _values
from titok_fast.kernels._values import ENVIRONMENT, check_finite

NAN, INF = float("nan"), float("inf")


def put(x: Tensor, value: float, *at: int) -> Tensor:
    x = x.clone()
    x[at or (-1,) * x.ndim] = value
    return x


def guided(**change: Any) -> Any:
    given: dict[str, Any] = {
        "logits": torch.randn(2, 3, 5), "uncond_logits": torch.randn(2, 3, 5),
        "mask": torch.ones(2, 3, dtype=torch.bool), "ids": torch.zeros(2, 3, dtype=torch.int64),
        "noise": torch.randn(2, 3, 5), "guidance": 1.0, "noise_temperature": 1.0,
    }  # fmt: skip
    return kernels.guided_sample(**given | change)


def head(**change: Any) -> Any:
    given: dict[str, Any] = {
        "hidden": torch.randn(4, 6), "uncond_hidden": torch.randn(4, 6),
        "weight": torch.randn(7, 6), "bias": torch.randn(7), "rows": torch.tensor([0, 3]),
        "seeds": torch.tensor([1, 2]), "positions": torch.tensor([0, 9]), "guidance": 1.0,
        "noise_temperature": 1.0,
    }  # fmt: skip
    return kernels.lm_head_sample(**given | change)


def remask(**change: Any) -> Any:
    given: dict[str, Any] = {
        "candidates": torch.zeros(2, 4, dtype=torch.int64), "scores": torch.randn(2, 4),
        "num_masked": torch.tensor([1, 2]), "noise": torch.randn(2, 4), "mask_id": 9,
        "noise_temperature": 1.0,
    }  # fmt: skip
    return kernels.remask(**given | change)


def nearest(**change: Any) -> Any:
    return kernels.nearest_code(**{"z": torch.randn(4, 3), "codebook": torch.randn(9, 3)} | change)


def stats(**change: Any) -> Any:
    given = {"z": torch.randn(4, 3), "codebook": torch.randn(9, 3)}
    return kernels.nearest_code_stats(**given | change)


def soft(**change: Any) -> Any:
    return kernels.soft_codes(
        **{"logits": torch.randn(4, 9), "codebook": torch.randn(9, 3)} | change
    )


def norm(**change: Any) -> Any:
    given = {"x": torch.randn(1, 4, 2, 2), "weight": torch.ones(4), "bias": torch.zeros(4)}
    return kernels.group_norm_silu(**given | change, groups=2)


def add_norm(**change: Any) -> Any:
    given = {"x": torch.randn(1, 4, 2, 2), "residual": torch.randn(1, 4, 2, 2)}
    given |= {"weight": torch.ones(4), "bias": torch.zeros(4)}
    return kernels.add_group_norm_silu(**given | change, groups=2)


def loss(**change: Any) -> Any:
    given = {"hidden": torch.randn(4, 6), "weight": torch.randn(7, 6), "bias": torch.randn(7)}
    given |= {"targets": torch.tensor([0, 6, 1, 2]), "weights": torch.ones(4)}
    return kernels.masked_cross_entropy(**given | change)


# op, argument, its bad value, what the error says
HIDDEN_BY_IDS: list[tuple[Callable[..., Any], str, Tensor, str]] = [
    (guided, "logits", put(torch.zeros(2, 3, 5), NAN, 1, 2, 0),
     r"guided_sample wants logits without NaN; got nan at \[1, 2, 0\], 1 such of 30"),
    (guided, "uncond_logits", put(torch.zeros(2, 3, 5), NAN), "uncond_logits without NaN"),
    (guided, "noise", put(torch.zeros(2, 3, 5), NAN), "noise without NaN"),
    (head, "hidden", put(torch.zeros(4, 6), -INF),
     r"lm_head_sample wants hidden with finite values; got -inf at \[3, 5\]"),
    (head, "uncond_hidden", put(torch.zeros(4, 6), NAN), "uncond_hidden with finite values"),
    (head, "rows", torch.tensor([0, 4]), r"rows in \[0, 4\); got 4 at \[1\]"),
    (head, "rows", torch.tensor([-1, 0]), r"rows in \[0, 4\); got -1 at \[0\]"),
    (head, "positions", torch.tensor([0, 2**16]), r"positions in \[0, 65536\); got 65536"),
    (remask, "scores", put(torch.zeros(2, 4), NAN), "remask wants scores without NaN"),
    (remask, "noise", put(torch.zeros(2, 4), NAN), "noise without NaN"),
    (remask, "num_masked", torch.tensor([1, -1]),
     r"remask wants num_masked in \[0, inf\); got -1 at \[1\]"),
    (nearest, "z", put(torch.zeros(4, 3), INF),
     r"nearest_code wants z with finite values; got inf at \[3, 2\]"),
    (loss, "targets", torch.tensor([0, 7, 1, 2]),
     r"masked_cross_entropy wants targets in \[0, 7\); got 7 at \[1\], 1 such of 4"),
]  # fmt: skip
ON_REQUEST: list[tuple[Callable[..., Any], str, Tensor, str]] = [
    (head, "weight", put(torch.zeros(7, 6), NAN), "lm_head_sample wants weight without NaN"),
    (head, "bias", put(torch.zeros(7), NAN), "bias without NaN"),
    (nearest, "codebook", put(torch.zeros(9, 3), NAN), "nearest_code wants codebook with finite"),
    (stats, "z", put(torch.zeros(4, 3), NAN), "nearest_code_stats wants z with finite values"),
    (stats, "codebook", put(torch.zeros(9, 3), INF), "codebook with finite values"),
    (soft, "logits", put(torch.zeros(4, 9), NAN), "soft_codes wants logits without NaN"),
    (soft, "codebook", put(torch.zeros(9, 3), INF), "codebook with finite values"),
    (norm, "x", put(torch.zeros(1, 4, 2, 2), INF), "group_norm_silu wants x with finite values"),
    (norm, "bias", put(torch.zeros(4), NAN), "bias with finite values"),
    (add_norm, "x", put(torch.zeros(1, 4, 2, 2), NAN), "add_group_norm_silu wants x with finite"),
    (add_norm, "residual", put(torch.zeros(1, 4, 2, 2), INF), "residual with finite values"),
    (loss, "hidden", put(torch.zeros(4, 6), INF), "masked_cross_entropy wants hidden with finite"),
    (loss, "weight", put(torch.zeros(7, 6), NAN), "weight without NaN"),
    (loss, "bias", put(torch.zeros(7), NAN), "bias without NaN"),
    (loss, "weights", put(torch.ones(4), -0.5), r"weights in \[0, inf\); got -0.5 at \[3\]"),
    (loss, "weights", put(torch.ones(4), NAN), r"weights in \[0, inf\); got nan"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_values, "_asked_for", False)


@pytest.mark.parametrize(("op", "name", "value", "message"), HIDDEN_BY_IDS)
def test_ids_hide_no_bad_value_on_a_cpu(
    op: Callable[..., Any], name: str, value: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        op(**{name: value})


@pytest.mark.parametrize("rule", ["logit", "probability"])
def test_the_logits_of_a_drawn_token_alone_are_looked_at(rule: str) -> None:
    logits, mask = put(torch.zeros(1, 2, 5), NAN, 0, 1, 3), torch.tensor([[True, False]])
    inputs = {"ids": torch.zeros(1, 2, dtype=torch.int64), "noise_temperature": 0.0, "rule": rule}
    candidates, scores = kernels.guided_sample(logits, mask=mask, **inputs)
    assert candidates.tolist() == [[0, 0]]
    assert not scores.isnan().any()
    for drawn in (~mask, mask | True):
        with pytest.raises(ValueError, match=r"got nan at \[0, 1, 3\]"):
            kernels.guided_sample(logits, mask=drawn, **inputs)


@pytest.mark.parametrize(("op", "name", "value", "message"), [*HIDDEN_BY_IDS, *ON_REQUEST])
def test_every_op_looks_when_asked_before_its_launch(
    op: Callable[..., Any],
    name: str,
    value: Tensor,
    message: str,
    interpreted: None,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_values, "_asked_for", True)
    with torch.device(device), pytest.raises(ValueError, match=message):
        op(**{name: value.to(device)})


@pytest.mark.parametrize("op", [guided, head, remask, nearest, stats, soft, norm, add_norm, loss])
def test_good_values_pass_when_looked_at(
    op: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    want = op()
    monkeypatch.setattr(_values, "_asked_for", True)
    torch.manual_seed(0)
    torch.testing.assert_close(op(), want, rtol=0, atol=0)


@pytest.mark.parametrize("op", [stats, norm, loss, soft])
def test_training_meets_a_nan_in_its_loss(op: Callable[..., Any]) -> None:
    """Unasked, what has a gradient passes a NaN on, for the loop to skip the update."""
    name = {stats: "z", norm: "x", loss: "hidden", soft: "logits"}[op]
    shape = {stats: (4, 3), norm: (1, 4, 2, 2), loss: (4, 6), soft: (4, 9)}[op]
    out = op(**{name: torch.full(shape, NAN)})
    assert (out if isinstance(out, Tensor) else out.commitment_loss).isnan().all()


def test_infinite_logits_and_empty_tensors_pass() -> None:
    guided(logits=put(torch.zeros(2, 3, 5), -INF), uncond_logits=None)
    remask(scores=put(torch.zeros(2, 4), INF))
    nearest(z=torch.empty(0, 3))
    check_finite("op", x=torch.full((70000,), 60000.0, dtype=torch.float16))  # its sum is infinite


def test_compiled_calls_look_at_no_value() -> None:
    """A look would break the graph."""

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(scores: Tensor) -> Tensor:
        out: Tensor = remask(scores=scores)
        return out

    assert compiled(torch.full((2, 4), NAN)).shape == (2, 4)


@pytest.mark.parametrize("asked", [False, True])
def test_transformed_calls_look_at_no_value(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values under vmap are those of all samples, and cannot be asked for."""
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
    bad = torch.vmap(ids)(put(z, NAN))
    assert ((bad >= 0) & (bad < 9)).all()


def test_fake_tensors_have_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_values, "_asked_for", True)
    with FakeTensorMode():
        assert nearest(z=torch.empty(4, 3)).shape == (4,)


@pytest.mark.parametrize(("value", "asked"), [("", False), ("0", False), ("1", True)])
def test_the_environment_asks_as_python_starts(
    value: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, value)
    assert runpy.run_path(_values.__file__)["_asked_for"] is asked
