"""What one network sees of one set of pictures, gathered batch by batch on all ranks."""

import warnings

import torch
from torch import Tensor

from titok_fast.distributed import gather_rows, sum_over_ranks
from titok_fast.evaluation.networks import INCEPTION, FeatureNetwork
from titok_fast.evaluation.statistics import SPLITS, ClassScore, FeatureSums, frechet_distance

Figures = dict[str, float]


class Measurement:
    """Sums, scores and, where asked for, features of a set of pictures.

    Args:
        network: that looks.
        total: n, number of pictures in the set, of all ranks together.
        keep: number of pictures whose features are kept, evenly spaced in the set; 0 keeps none.
        halves: also keep apart the sums of two random halves, for `floor`.
    """

    def __init__(
        self, network: FeatureNetwork, total: int, *, keep: int = 0, halves: bool = False
    ) -> None:
        self.network, self.total = network, total
        dim, device = network.dim, network.device
        self.sums = FeatureSums(dim, device)
        logits = network.num_logits
        self.score = ClassScore(total, logits, device) if logits else None
        # guessed right, with a class known
        self.guesses = torch.zeros(2, dtype=torch.float64, device=device)
        self._step = -(-total // keep) if keep else 0
        self._kept: list[Tensor] = []
        self._first_kept = 0
        self._halves = (FeatureSums(dim, device), FeatureSums(dim, device)) if halves else None
        if halves:  # the same two on every rank and in every run
            order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
            self._side = torch.empty(total, dtype=torch.int64)
            self._side[order] = torch.arange(total) * 2 // max(total, 1)

    def update(self, images: Tensor, first: int, labels: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            images: (B, H, W, 3) uint8.
            first: index of the first of them in the set; those of one rank come in order.
            labels: (B,) int64 classes, if known.
        """
        features, logits = self.network(images)
        index = torch.arange(first, first + len(images))
        self.sums.update(features)
        if self._halves is not None:
            for side, sums in enumerate(self._halves):
                sums.update(features[(self._side[index] == side).to(features.device)])
        if self._step:
            if not self._kept:
                self._first_kept = -(-first // self._step)
            self._kept.append(features[(index % self._step == 0).to(features.device)].float())
        if logits is not None and self.score is not None:
            self.score.update(logits, first)
        if logits is not None and labels is not None and self.network.labelled:
            right = (logits.argmax(dim=1) == labels.to(logits.device)).sum()
            self.guesses += torch.stack([right, torch.full_like(right, len(labels))])

    def merge_ranks(self) -> None:
        """Bring the parts of all ranks together; call it once, after the last batch."""
        for sums in (self.sums, *(self._halves or ())):
            sums.merge_ranks()
        if self.score is not None:
            self.score.merge_ranks()
        sum_over_ranks(self.guesses)
        if self._step:
            mine = self._kept or [torch.empty(0, self.network.dim, device=self.network.device)]
            kept = -(-self.total // self._step)
            self._kept = [gather_rows(torch.cat(mine), self._first_kept, kept)]

    def features(self) -> Tensor:
        """(m, d) float32: the features kept, in order."""
        return torch.cat(self._kept)

    def label_share(self) -> float | None:
        """Share of pictures that the network puts into their class; None if that is not known."""
        right, seen = self.guesses.tolist()
        return right / seen if seen else None

    def floor(self) -> float:
        """Frechet distance of the two halves: what n / 2 more pictures of the same kind would get.

        It is above 0 because samples are finite, and about twice that of n against n pictures.
        """
        assert self._halves is not None  # the constructor was told
        a, b = self._halves
        return frechet_distance(a.gaussian(), b.gaussian())


def named(figure: str, network: FeatureNetwork) -> str:
    """Key of a figure: `fid[inception]`. A figure of one network says nothing about another's."""
    return f"{figure}[{network.name}]"


def scores(measured: Measurement) -> Figures:
    """`is` over one split and `is10` over ten, under the network's name."""
    if measured.score is None:
        return {}
    return {
        named("is", measured.network): measured.score.one_split(),
        named("is10", measured.network): measured.score.ten_splits(),
    }


def plain_name(figures: Figures, network: FeatureNetwork, name: str) -> Figures:
    """Add the literature's name ("rFID", "gFID") for the one network that may bear it."""
    if network.name == INCEPTION:
        figures[name] = figures[named("fid", network)]
    return figures


def warn_if_sorted(labels: Tensor) -> None:
    """Warn when pictures lie in the order of their classes, which ruins the score in ten splits.

    Args:
        labels: (n,) classes in file order.
    """
    classes = len(labels.unique())
    for part in labels.tensor_split(SPLITS):
        # random and interleaved orders show at least 63 % of what a tenth has room for
        if len(part.unique()) < min(classes, len(part)) / 2:
            warnings.warn(
                f"the pictures seem sorted by class: a tenth of them shows {len(part.unique())} of "
                f"{classes} classes. The class score in ten splits (is10) is far too low then; "
                "the Frechet distance does not depend on the order",
                stacklevel=2,
            )
            return
