"""Features and scores of one set of images by one network, batch by batch on all ranks."""

import warnings

import torch
from torch import Tensor

from titok_fast.distributed import gather_rows, my_share, sum_over_ranks
from titok_fast.evaluation.networks import INCEPTION, FeatureNetwork
from titok_fast.evaluation.statistics import (
    SPLITS,
    ClassScore,
    FeatureSums,
    Gaussian,
    frechet_distance,
)

Figures = dict[str, float]


class Measurement:
    """Sums, scores and, on request, features of a set of images.

    Args:
        network: of the features.
        total: n, number of images in the set, of all ranks together.
        keep: number of images whose features are stored, evenly spaced in the set; 0 stores none.
        halves: also sum two random halves apart, for `floor`.
    """

    def __init__(
        self, network: FeatureNetwork, total: int, *, keep: int = 0, halves: bool = False
    ) -> None:
        self.network, self.total = network, total
        dim, device = network.dim, network.device
        self.sums = FeatureSums(dim, device)
        logits = network.num_logits
        self.score = ClassScore(total, logits, device) if logits else None
        # images classified correctly, images whose class is known
        self.guesses = torch.zeros(2, dtype=torch.float64, device=device)
        self._step = -(-total // keep) if keep else 0
        self._kept = [torch.empty(0, dim, device=device)]
        self._halves = [FeatureSums(dim, device) for _ in range(2 if halves else 0)]
        if halves:  # the same two on every rank and in every run
            order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
            self._side = torch.empty(total, dtype=torch.int64)
            self._side[order] = torch.arange(total) * 2 // max(total, 1)

    def update(self, images: Tensor, first: int, labels: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            images: (B, H, W, 3) uint8.
            first: index of the first of them in the set; a rank adds its `my_share` in order.
            labels: (B,) int64 classes, if known.
        """
        features, logits = self.network(images)
        index = torch.arange(first, first + len(images))
        self.sums.update(features)
        for side, sums in enumerate(self._halves):
            sums.update(features[(self._side[index] == side).to(features.device)])
        if self._step:
            self._kept.append(features[(index % self._step == 0).to(features.device)].float())
        if logits is not None and self.score is not None:
            self.score.update(logits, first)
        if logits is not None and labels is not None and self.network.labelled:
            right = (logits.argmax(dim=1) == labels.to(logits.device)).sum()
            self.guesses += torch.stack([right, torch.full_like(right, len(labels))])

    def merge_ranks(self) -> None:
        """Combine the parts of all ranks; call it once, after the last batch."""
        for sums in (self.sums, *self._halves):
            sums.merge_ranks()
        if self.score is not None:
            self.score.merge_ranks()
        sum_over_ranks(self.guesses)
        if self._step:
            ends = my_share(self.total).start, self.total
            first, count = (-(-end // self._step) for end in ends)
            self._kept = [gather_rows(torch.cat(self._kept), first, count)]

    def features(self) -> Tensor:
        """(m, d) float32: the features stored, in order."""
        return torch.cat(self._kept)

    def label_share(self) -> float | None:
        """Share of images classified correctly; None where no class is known."""
        right, seen = self.guesses.tolist()
        return right / seen if seen else None

    def figures(self, reference: Gaussian) -> Figures:
        """`fid` against a reference; `is` (one split) and `is10` (ten) where there are logits."""
        found = {"fid": frechet_distance(self.sums.gaussian(), reference)}
        if self.score is not None:
            found |= {"is": self.score.one_split(), "is10": self.score.ten_splits()}
        return found

    def floor(self) -> float:
        """Frechet distance of the two halves, which is the distance of n / 2 perfect images.

        Above 0 because the samples are finite; about twice the distance of n against n images.
        """
        a, b = self._halves
        return frechet_distance(a.gaussian(), b.gaussian())


def labelled(figures: Figures, network: FeatureNetwork, plain: str) -> Figures:
    """Figures under their network's name, `fid[inception]`: networks cannot be compared.

    `plain` is the literature's name of `fid`, added for Inception alone.
    """
    named = {f"{name}[{network.name}]": value for name, value in figures.items()}
    return named | ({plain: figures["fid"]} if network.name == INCEPTION else {})


def warn_if_sorted(labels: Tensor) -> None:
    """Warn when classes (n,) in file order are sorted: the score in ten splits is far too low."""
    classes = len(labels.unique())
    for part in labels.tensor_split(SPLITS):
        # in a random or interleaved order a tenth shows at least 63 % of the classes it could
        if len(part.unique()) < min(classes, len(part)) / 2:
            warnings.warn(
                f"the images seem sorted by class: a tenth of them shows {len(part.unique())} of "
                f"{classes} classes. The class score in ten splits (is10) is far too low then; "
                "the Frechet distance does not depend on the order",
                stacklevel=2,
            )
            return
