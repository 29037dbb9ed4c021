"""Revival of unused codebook rows: CVQ-VAE, arXiv:2307.15139, as upstream's `clustering_vq`.

It is not part of VectorQuantizer, because published files hold its table only.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from titok_fast.distributed import rank_and_world, sum_over_ranks
from titok_fast.kernels.nearest_code import nearest_code, unit_rows
from titok_fast.kernels.nearest_code_stats import count_codes
from titok_fast.models.quantizer import VectorQuantizer


class CodeRevival:
    """Pulls rarely used rows of a codebook to the nearest latent of the batch.

    Each row of the N moves by the rate exp(-10 N p / (1 - 0.99) - 1e-3), where p is the running
    share of its use (decay 0.99, from 0): 0.999 for an unused row, 4.5e-5 for one used a hundredth
    of its fair share. The result is the same on all ranks without gathering latents: per row, the
    ranks agree on the smallest distance, and its rank (the lowest on a tie) sends its latent.
    """

    def __init__(self, N: int, *, decay: float = 0.99, device: torch.device | str = "cpu") -> None:
        self.decay = decay
        self.embed_prob = torch.zeros(N, device=device)

    @torch.no_grad()
    def update(self, quantizer: VectorQuantizer, z: Tensor, ids: Tensor) -> None:
        """Revive in place. Every rank must call it, between its backward and the optimizer's step.

        Upstream revives inside the forward, after the distances: the gradients are the same.

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

        counts = sum_over_ranks(count_codes(ids, N))
        share = counts.float() / counts.sum()
        self.embed_prob.mul_(self.decay).add_(share, alpha=1 - self.decay)

        metric = quantizer.metric
        # the search with both sides swapped: the nearest latent of every code
        anchors = rows[nearest_code(table, rows, metric=metric)]  # (N, C)
        if rank_and_world()[1] > 1:
            distance = (unit_rows(table, metric) - unit_rows(anchors, metric)).square().sum(1)
            anchors = _nearest_over_ranks(distance, anchors)
        rate = torch.exp(-(self.embed_prob * N * 10) / (1 - self.decay) - 1e-3)[:, None]
        table.copy_(table * (1 - rate) + anchors * rate)


def _nearest_over_ranks(distance: Tensor, anchors: Tensor) -> Tensor:
    """(N,) distances and (N, C) anchors of this rank -> the anchors of the nearest rank."""
    least = distance.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    rank, world = rank_and_world()
    owner = torch.full_like(distance, world, dtype=torch.int64)
    owner[distance == least] = rank
    dist.all_reduce(owner, dist.ReduceOp.MIN)
    own = torch.where((owner == rank)[:, None], anchors, torch.zeros_like(anchors))
    return sum_over_ranks(own)  # one rank's rows plus zeros
