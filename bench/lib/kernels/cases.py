"""One measurement of a kernel: which op at which shape, its implementations, and their judge.

A judge compares a result with float64 arithmetic and raises AssertionError with the size of the
error. Ids are judged by the distance or the logit that they reach, since two close ones may swap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], Any]
Judge = Callable[[Any], None]


@dataclass(frozen=True)
class Model:
    """Tokens K, codes N of C channels, generator width D; D = 0 for a tokenizer alone."""

    K: int
    N: int
    C: int
    D: int
    metric: str


MODELS = {
    "L-32": Model(32, 4096, 12, 768, "cosine"),
    "B-64": Model(64, 4096, 12, 768, "cosine"),
    "S-128": Model(128, 4096, 12, 1024, "cosine"),
    "SL-256": Model(256, 8192, 64, 0, "euclidean"),
}


@dataclass(frozen=True)
class Spec:
    """Which op at which shape.

    `model` is a key of MODELS, or for the pixel decoder "channels x side", such as "256x64".
    `dtype` is that of logits, hidden states or activations; with `training` gradients are part of
    the work.
    """

    op: str
    model: str
    batch: int
    dtype: torch.dtype
    training: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.model} B={self.batch} {dtype} {self.work}"

    @property
    def work(self) -> str:
        """Name of what is timed."""
        return "forward+backward" if self.training else "forward"


@dataclass(frozen=True)
class Rival:
    """One implementation: the call that is timed, and a check that raises AssertionError."""

    call: Call
    check: Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A spec with its tensors; `absent` says why a library is missing.

    `judge` is that of the reference. `bytes_min` counts every input and output once, `flops` are
    those of the definition.
    """

    rivals: dict[str, Rival]
    judge: Judge
    bytes_min: float
    flops: float
    absent: dict[str, str] = field(default_factory=dict)

    def compiled(self) -> Rival:
        """The reference through torch.compile, for these shapes alone."""
        call = torch.compile(self.rivals["reference"].call, dynamic=False)
        return Rival(call, lambda: self.judge(call()))


def make_case(judge: Judge, *, bytes_min: float, flops: float, **calls: Call | Rival | str) -> Case:
    """A case whose implementations share a judge; a string for a call says why it is absent."""

    def judged(call: Call) -> Rival:
        return Rival(call, lambda: judge(call()))

    rivals = {
        name: call if isinstance(call, Rival) else judged(call)
        for name, call in calls.items()
        if not isinstance(call, str)
    }
    absent = {name: reason for name, reason in calls.items() if isinstance(reason, str)}
    return Case(rivals, judge, bytes_min, flops, absent)


def gradients(fn: Callable[..., Any], leaves: Sequence[Tensor]) -> Call:
    """A call that returns the gradients of the sum of all losses and squared outputs."""

    def run() -> tuple[Tensor, ...]:
        out = fn(*leaves)
        parts = [out] if isinstance(out, Tensor) else [x for x in out if x.requires_grad]
        # a scalar is a loss; for the rest, random cotangents would be one more tensor to read
        terms = [x if x.ndim == 0 else x.float().square().sum() for x in parts]
        return torch.autograd.grad(terms, [x for x in leaves if x.requires_grad])

    return run


def judge_near(
    got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype, terms: int
) -> None:
    """Bound the norm of the error over that of the float64 truth, in roundings of `dtype`.

    `terms` is the length of the longest sum behind an output.
    """
    # a plain float32 sum of n terms drifts by up to 1.2 sqrt(n) roundings (upstream's loss over
    # channels-first logits does); halves are summed in float32 and show their own roundings only
    roundings = 2 * terms**0.5 if dtype == torch.float32 else 2.0
    bound = roundings * torch.finfo(dtype).eps
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert x.shape == y.shape, f"output {i} is {tuple(x.shape)}, should be {tuple(y.shape)}"
        error = float((x.double() - y).norm() / y.norm())
        assert error <= bound, f"output {i}: relative error {error:.2g}, allowed {bound:.2g}"


def judge_ids(ids: Tensor, z: Tensor, codebook: Tensor, metric: str) -> None:
    """Each id (R,) is as near to its row of z (R, C) as float32 distances can tell."""
    f, e = z.detach().double(), codebook.detach().double()
    if metric == "cosine":
        f, e = F.normalize(f, dim=-1), F.normalize(e, dim=-1)
    e_sq, bound = e.square().sum(1), 2.0**-23 * (4 + z.shape[1] ** 0.5)
    for rows, own in zip(f.split(1024), ids.split(1024), strict=True):  # no (R, N) matrix
        distance = e_sq - 2 * rows @ e.T  # without the constant |f|^2
        excess = distance.gather(1, own[:, None]).squeeze(1) - distance.amin(1)
        worst = float((excess / (rows.square().sum(1) + e_sq.max())).max())
        assert worst <= bound, f"a code is {worst:.2g} too far, allowed {bound:.2g}"


def judge_samples(
    got: tuple[Tensor, Tensor], l: Tensor, noise: Tensor | None, dtype: torch.dtype
) -> None:
    """Candidates reach the best noisy logit, and scores are their logits.

    `l` are guided logits, `noise` is added to them (None: greedy); both float64. The logits were
    computed in `dtype`.
    """
    candidates, scores = got
    noisy = l if noise is None else l + noise
    allowed = 4 * torch.finfo(dtype).eps * float(noisy.abs().max())
    lost = noisy.amax(-1) - noisy.gather(-1, candidates[..., None]).squeeze(-1)
    wrong = (scores.double() - l.gather(-1, candidates[..., None]).squeeze(-1)).abs()
    for what, error in (("a noisy logit falls short", lost), ("a score is wrong", wrong)):
        worst = float(error.max())
        assert worst <= allowed, f"{what} by {worst:.2g}, allowed {allowed:.2g}"
