"""How much of a codebook is in use, counted over batches and ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from titok_fast.distributed import sum_over_ranks
from titok_fast.kernels.nearest_code_stats import count_codes


@dataclass(frozen=True)
class UsageReport:
    """Usage of a codebook over the counted ids."""

    tokens: int  # ids counted
    dead: int  # codes never used
    usage: float  # share of codes used at least once, 0..1
    entropy_bits: float  # of the codes' frequencies; log2(N) if all are used alike


class CodeUsage:
    """Counts ids of N codes over steps; the report sums over ranks."""

    def __init__(self, N: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(N, dtype=torch.int64, device=device)

    def update(self, ids: Tensor) -> None:
        """Count int64 ids in [0, N) of any shape. No host wait."""
        self.counts += count_codes(ids, len(self.counts))

    def report(self) -> UsageReport:
        """Usage since the last reset, summed over ranks: every rank must call it."""
        counts = sum_over_ranks(self.counts.clone())
        tokens, used = int(counts.sum()), int((counts > 0).sum())
        share = counts[counts > 0].double() / max(tokens, 1)
        return UsageReport(
            tokens=tokens,
            dead=len(counts) - used,
            usage=used / len(counts),
            entropy_bits=abs(float((share * share.log2()).sum())),
        )

    def reset(self) -> None:
        """Set the counts to zero."""
        self.counts.zero_()
