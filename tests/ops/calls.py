"""Shared by the kernel tests: calls of every kernel, checks of operators, seeds and draws."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from titok_fast import kernels
from titok_fast.kernels import (
    add_group_norm_silu,
    group_norm_silu,
    guided_sample,
    lm_head_sample,
    masked_cross_entropy,
    nearest_code,
    nearest_code_stats,
    remask,
    soft_codes,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_QUICK = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
Test = Callable[..., None]
Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class OpCall:
    """`fn(*leaves, *others)`, a public kernel with its options set; leaves have gradients."""

    fn: Function
    leaves: tuple[Tensor, ...] = ()
    others: tuple[Tensor, ...] = ()

    def outputs(self, fn: Function | None = None) -> list[Tensor]:
        """Outputs of `fn` or of a compiled form of it."""
        out = (fn or self.fn)(*self.leaves, *self.others)
        return [out] if isinstance(out, Tensor) else list(out)

    def results(self, fn: Function | None = None) -> list[Tensor]:
        """The outputs, then the gradients of the leaves."""
        if not self.leaves:
            return self.outputs(fn)
        call = self.with_gradients()
        outputs = call.outputs(fn)
        # every number has its own weight, so that swapped numbers change the loss
        loss = sum(
            (x * torch.arange(1.0, x.numel() + 1, device=x.device).cos().view(x.shape)).sum()
            for x in outputs
            if x.requires_grad
        )
        return outputs + list(torch.autograd.grad(loss, call.leaves))

    def with_gradients(self) -> "OpCall":
        """The same call on copies of the leaves that ask for gradients."""
        leaves = tuple(x.detach().clone().requires_grad_() for x in self.leaves)
        return OpCall(self.fn, leaves, self.others)


def calls(device: torch.device | str, batch: int = 2) -> dict[str, OpCall]:
    """Calls by name of the public function, with a suffix for further options.

    Sizes are odd, and small: Triton's interpreter takes milliseconds for a program.
    """
    B, K, N, D = batch, 6, 70, 24
    R = B * K

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def below(end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, device=device)

    z, codebook = normal(16 * B + 1, 12), normal(130, 12)
    logits, uncond, noise = normal(B, K, N), normal(B, K, N), normal(B, K, N)
    mask, ids, seeds = below(3, B, K) > 0, below(N, B, K), any_seeds(B, device)
    hidden, unguided, weight, bias = normal(R, D), normal(R, D), normal(N, D), normal(N)
    rows, row_seeds, positions = below(R, R), any_seeds(R, device), below(2**16, R)
    x, residual = (
        normal(B, 64, 5, 3).to(memory_format=torch.channels_last) for _ in ("x", "residual")
    )
    scale, shift = normal(64), normal(64)
    return {
        "nearest_code": OpCall(nearest_code, others=(z, codebook)),
        "nearest_code cosine": OpCall(
            lambda z, e: nearest_code(z, e, metric="cosine"), others=(z, codebook)
        ),
        "nearest_code_stats": OpCall(
            lambda z, e: nearest_code_stats(z, e, metric="cosine"), leaves=(z, codebook)
        ),
        "guided_sample": OpCall(
            lambda l, u, m, i, s: guided_sample(
                l, u, mask=m, ids=i, seeds=s, step=3, guidance=2.0, noise_temperature=3.0
            ),
            others=(logits, uncond, mask, ids, seeds),
        ),
        "guided_sample given": OpCall(
            lambda l, m, i, g: guided_sample(
                l, mask=m, ids=i, noise=g, noise_temperature=3.0, rule="probability"
            ),
            others=(logits, mask, ids, noise),
        ),
        "remask": OpCall(
            lambda i, x, n, s: remask(i, x, n, mask_id=N, seeds=s, noise_temperature=3.0),
            others=(ids, normal(B, K), below(K, B), seeds),
        ),
        "lm_head_sample": OpCall(
            lambda h, u, w, b, r, s, p: lm_head_sample(
                h, u, w, b, rows=r, seeds=s, positions=p, guidance=2.0, noise_temperature=3.0
            ),
            others=(hidden, unguided, weight, bias, rows, row_seeds, positions),
        ),
        "lm_head_sample greedy": OpCall(
            lambda h, w: lm_head_sample(
                h, None, w, None, noise_temperature=0.0, rule="probability"
            ),
            others=(hidden, weight),
        ),
        "soft_codes": OpCall(soft_codes, leaves=(normal(R, N), normal(N, D))),
        "group_norm_silu": OpCall(partial(group_norm_silu, groups=4), leaves=(x, scale, shift)),
        "add_group_norm_silu": OpCall(
            partial(add_group_norm_silu, groups=4), leaves=(x, residual, scale, shift)
        ),
        "masked_cross_entropy": OpCall(
            masked_cross_entropy,
            leaves=(hidden, weight, bias),
            others=(below(N, R), torch.rand(R, device=device)),
        ),
    }


def call_with(name: str, **change: Any) -> Any:
    """The public kernel `name` on small valid arguments, some of them changed."""
    return getattr(kernels, name)(**arguments_of(name) | change)


def arguments_of(name: str) -> dict[str, Any]:
    """Small valid arguments of the public kernel `name`, by keyword."""
    logits, noise = torch.randn(2, 2, 3, 5).unbind()
    hidden, head = torch.randn(4, 6), {"weight": torch.randn(7, 6), "bias": torch.randn(7)}
    latents = {"z": torch.randn(4, 3), "codebook": torch.randn(9, 3)}
    x = {"x": torch.randn(1, 4, 2, 2), "weight": torch.ones(4), "bias": torch.zeros(4), "groups": 2}
    arguments: dict[str, dict[str, Any]] = {
        "guided_sample": {"logits": logits, "uncond_logits": torch.randn(2, 3, 5)}
        | {"mask": torch.ones(2, 3, dtype=torch.bool), "ids": torch.zeros(2, 3).long()}
        | {"noise": noise, "guidance": 1.0, "noise_temperature": 1.0},
        "lm_head_sample": {"hidden": hidden, "uncond_hidden": torch.randn(4, 6), **head}
        | {"rows": torch.tensor([0, 3]), "seeds": torch.tensor([1, 2])}
        | {"positions": torch.tensor([0, 9]), "guidance": 1.0, "noise_temperature": 1.0},
        "remask": {"candidates": torch.zeros(2, 4).long(), "scores": torch.randn(2, 4)}
        | {"num_masked": torch.tensor([1, 2]), "noise": torch.randn(2, 4)}
        | {"mask_id": 9, "noise_temperature": 1.0},
        "nearest_code": latents,
        "nearest_code_stats": latents,
        "soft_codes": {"logits": torch.randn(4, 9), "codebook": torch.randn(9, 3)},
        "group_norm_silu": x,
        "add_group_norm_silu": x | {"residual": torch.randn(1, 4, 2, 2)},
        "masked_cross_entropy": {"hidden": hidden, **head}
        | {"targets": torch.tensor([0, 6, 1, 2]), "weights": torch.ones(4)},
    }
    return arguments[name]


def cases(**strategies: st.SearchStrategy[Any]) -> Callable[[Test], Test]:
    """Run a test on 30 draws of `case`, a namespace of these; torch is seeded before each."""
    case = st.builds(_case, seed=st.integers(0, 2**16), **strategies)
    return lambda test: _QUICK(given(case=case)(test))


def _case(seed: int, **values: Any) -> SimpleNamespace:
    torch.manual_seed(seed)
    return SimpleNamespace(**values)


def leaf(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, **options, requires_grad=True)


def any_seeds(count: int, device: torch.device | str = "cpu") -> Tensor:
    """(count,) int64 over the whole range."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), device=device)


def assert_same_draws(
    noisy: Tensor, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float
) -> None:
    """Equal candidates or equally good ones; equal scores where the candidates agree.

    Candidates are the argmax of `noisy`. A tolerance of 0 wants the same ones.
    """
    assert got[0].dtype == torch.int64
    assert got[1].dtype == torch.float32
    assert got[0].shape == want[0].shape == got[1].shape
    same = got[0] == want[0]
    if tolerance == 0:
        assert same.all()
    reached = noisy.gather(-1, got[0].unsqueeze(-1)).squeeze(-1)
    best = noisy.gather(-1, want[0].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(reached, best, rtol=tolerance, atol=tolerance)
    score_tolerance = max(tolerance, 1e-5)
    torch.testing.assert_close(
        got[1][same], want[1][same], rtol=score_tolerance, atol=score_tolerance, equal_nan=True
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the error over the norm of `want`."""
    return float((got.double() - want).norm() / want.norm())
