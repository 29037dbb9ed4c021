"""How much of a codebook is in use, and bringing unused rows back to life.

Neither is part of VectorQuantizer: published files hold its table and nothing else.
Revival: CVQ-VAE, arXiv:2307.15139, in the form of upstream's `clustering_vq`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from titok_fast.kernels.nearest_code import nearest_code, unit_rows
from titok_fast.kernels.nearest_code_stats import count_codes
from titok_fast.quantizer import VectorQuantizer


@dataclass(frozen=True)
class UsageReport:
    """Use of a codebook over the ids seen.

    Attributes:
        tokens: ids seen.
        dead: codes never used.
        usage: share of codes used at least once, 0..1.
        entropy_bits: of the codes' frequencies; log2(N) if all are used alike.
    """

    tokens: int
    dead: int
    usage: float
    entropy_bits: float


class CodeUsage:
    """Counts ids over steps; the report counts those of all ranks.

    Args:
        N: codebook size.
        device: of the ids.
    """

    def __init__(self, N: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(N, dtype=torch.int64, device=device)

    def update(self, ids: Tensor) -> None:
        """Count int64 ids in [0, N) of any shape. No host wait."""
        self.counts += count_codes(ids, len(self.counts))

    def report(self) -> UsageReport:
        """Use since the last reset, summed over ranks: every rank must call it."""
        counts = _summed(self.counts.clone())
        tokens, used = int(counts.sum()), int((counts > 0).sum())
        share = counts[counts > 0].double() / max(tokens, 1)
        return UsageReport(
            tokens=tokens,
            dead=len(counts) - used,
            usage=used / len(counts),
            entropy_bits=abs(float((share * share.log2()).sum())),
        )

    def reset(self) -> None:
        """Forget what was counted."""
        self.counts.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """The counts of this rank, for a checkpoint."""
        return {"counts": self.counts.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of a checkpoint.

        Raises:
            ValueError: it is of another codebook size.
        """
        _restore(self.counts, state, "counts")


class CodeRevival:
    """Pulls rarely used rows of a codebook to the nearest latent of the batch.

    A running share of use p (decay 0.99, from 0) makes each row's rate
    exp(-10 N p / (1 - 0.99) - 1e-3): 0.999 for a dead row, 4.5e-5 for one used a hundredth of its
    fair share. The result is the same on all ranks, and no rank holds the latents of another: per
    row they agree on the smallest distance, and its owner (the lowest on a tie) shares its latent.

    Args:
        N: codebook size.
        decay: of the running share.
        device: of the codebook.
    """

    def __init__(self, N: int, *, decay: float = 0.99, device: torch.device | str = "cpu") -> None:
        self.decay = decay
        self.embed_prob = torch.zeros(N, device=device)

    @torch.no_grad()
    def update(self, quantizer: VectorQuantizer, z: Tensor, ids: Tensor) -> None:
        """Revive, in place. Every rank must call it, between its backward and the optimizer's step.

        Upstream does it inside the forward, after its distances: the gradients are the same.

        Args:
            quantizer: whose table is changed; the one that made `ids` from `z`.
            z: (B, C, H, W) latents as they enter the quantizer, not normalised.
            ids: (B, H, W) int64 codes.

        Raises:
            ValueError: shapes do not fit, or more than 2**18 latents on this rank.
        """
        table = quantizer.embedding.weight
        N, C = table.shape
        if z.ndim != 4 or z.shape[1] != C or ids.numel() * C != z.numel() or not z.numel():
            got = f"{tuple(z.shape)} and {tuple(ids.shape)}"
            raise ValueError(f"CodeRevival wants z (B, {C}, H, W) and ids (B, H, W); got {got}")
        rows = z.detach().float().permute(0, 2, 3, 1).reshape(-1, C)

        counts = _summed(count_codes(ids, N))
        share = counts.float() / counts.sum()
        self.embed_prob.mul_(self.decay).add_(share, alpha=1 - self.decay)

        metric = quantizer.metric
        # the search with both sides swapped: the nearest latent of every code
        anchors = rows[nearest_code(table, rows, metric=metric)]  # (N, C)
        if _world() > 1:
            distance = (unit_rows(table, metric) - unit_rows(anchors, metric)).square().sum(1)
            anchors = _nearest_over_ranks(distance, anchors)
        rate = torch.exp(-(self.embed_prob * N * 10) / (1 - self.decay) - 1e-3)[:, None]
        table.copy_(table * (1 - rate) + anchors * rate)

    def state_dict(self) -> dict[str, Tensor]:
        """The running share of use, equal on all ranks, for a checkpoint."""
        return {"embed_prob": self.embed_prob.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of a checkpoint, also upstream's `embed_prob`.

        Raises:
            ValueError: it is of another codebook size.
        """
        _restore(self.embed_prob, state, "embed_prob")


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _summed(counts: Tensor) -> Tensor:
    if _world() > 1:
        dist.all_reduce(counts)
    return counts


def _nearest_over_ranks(distance: Tensor, anchors: Tensor) -> Tensor:
    """(N,) distances and (N, C) anchors of this rank -> the anchors of the nearest rank."""
    least = distance.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    rank = dist.get_rank()
    owner = torch.full_like(distance, dist.get_world_size(), dtype=torch.int64)
    owner[distance == least] = rank
    dist.all_reduce(owner, dist.ReduceOp.MIN)
    chosen = torch.where((owner == rank)[:, None], anchors, torch.zeros_like(anchors))
    dist.all_reduce(chosen)  # one rank's rows plus zeros
    return chosen


def _restore(into: Tensor, state: Mapping[str, Tensor], name: str) -> None:
    found = state.get(name)
    if found is None or found.shape != into.shape:
        got = "nothing" if found is None else tuple(found.shape)
        raise ValueError(f"the checkpoint wants {name} of shape {tuple(into.shape)}; got {got}")
    into.copy_(found)
