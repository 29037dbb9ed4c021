"""How good drawn pictures are: gFID, class scores, precision and recall, agreement with labels.

Protocol of openai/guided-diffusion's evaluator ("ADM"): statistics of the whole training set come
from a file, or from pictures; samples are truncated to bytes, as the published script does it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from titok_fast.distributed import sum_over_ranks
from titok_fast.evaluation.measure import (
    Figures,
    Measurement,
    named,
    plain_name,
    scores,
    warn_if_sorted,
)
from titok_fast.evaluation.networks import INCEPTION, FeatureNetwork
from titok_fast.evaluation.pictures import Pictures, batches
from titok_fast.evaluation.statistics import Gaussian, frechet_distance, precision_recall

# real pictures among which neighbours are sought, as many as ADM's reference files hold
NEIGHBOURHOOD = 10_000


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: at least one of the two.

    Attributes:
        pictures: real ones, or None.
        statistics: of their features, or None; they go before those of `pictures`.
        network: name of the network that `statistics` are of.
    """

    pictures: Pictures | None = None
    statistics: Gaussian | None = None
    network: str = INCEPTION


@torch.no_grad()
def measure_pictures(
    pictures: Pictures,
    networks: Sequence[FeatureNetwork],
    *,
    keep: int = 0,
    halves: bool = False,
    check_order: bool = False,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> list[Measurement]:
    """Let networks look at pictures. Ranks of a process group share them; all get the result.

    Args:
        pictures: in the order that splits are taken in.
        networks: that look.
        keep: number of pictures whose features are kept, as in Measurement.
        halves: keep two halves apart, as in Measurement.
        check_order: warn when pictures with known classes lie sorted by class.
        batch_size: pictures at once.
        progress: called with the number of pictures done since the last call, on this rank.

    Returns:
        A measurement for each network, of all ranks together.
    """
    total = len(pictures)
    measured = [Measurement(n, total, keep=keep, halves=halves) for n in networks]
    order = torch.zeros(total, dtype=torch.int64)
    seen = 0
    for first, images, labels in batches(pictures, batch_size):
        for one in measured:
            one.update(images, first, labels)
        if labels is not None:
            order[first : first + len(labels)] = labels
            seen += len(labels)
        if progress is not None:
            progress(len(images))
    for one in measured:
        one.merge_ranks()
    if check_order and int(sum_over_ranks(torch.tensor(seen))) == total:
        warn_if_sorted(sum_over_ranks(order))
    return measured


def evaluate_generation(
    samples: Pictures,
    reference: Reference,
    networks: Sequence[FeatureNetwork],
    *,
    neighbours: bool = True,
    floor: bool = False,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Figures:
    """Measure drawn pictures against real ones.

    Args:
        samples: drawn pictures, classes interleaved.
        reference: real pictures or their statistics.
        networks: feature networks, at least one.
        neighbours: also precision and recall with 3 neighbours, all samples against at most 10,000
            evenly spaced real pictures; left out without real pictures.
        floor: also the Frechet distance of two halves of the real pictures.
        batch_size: pictures at once.
        progress: called with the number of pictures done since the last call, on this rank.

    Returns:
        `images`, and for each network `fid[name]`, `is[name]` (one split), `is10[name]` (ten splits
        in file order), `precision[name]`, `recall[name]`, `floor[name]`, and where it knows the
        classes `label_agreement[name]`: the share of samples put into the class they were asked
        for. `gFID` for Inception alone.

    Raises:
        ValueError: no network, too few pictures, a floor without pictures, or a reference that is
            of another network.
    """
    real = reference.pictures
    _check(networks, reference, floor)
    keep = len(samples) if neighbours and real is not None else 0
    common = {"batch_size": batch_size, "progress": progress}
    drawn = measure_pictures(samples, networks, keep=keep, check_order=True, **common)  # type: ignore[arg-type]
    known: list[Measurement] | list[None] = [None] * len(networks)
    if real is not None and (neighbours or floor or _unknown(networks, reference)):
        keep = min(NEIGHBOURHOOD, len(real)) if neighbours else 0
        known = measure_pictures(real, networks, keep=keep, halves=floor, **common)  # type: ignore[arg-type]
    figures: Figures = {"images": float(len(samples))}
    for network, ours, theirs in zip(networks, drawn, known, strict=True):
        given = reference.statistics if reference.network == network.name else None
        if given is None:
            assert theirs is not None  # _check refused that
            given = theirs.sums.gaussian()
        own = {named("fid", network): frechet_distance(ours.sums.gaussian(), given), **scores(ours)}
        if neighbours and theirs is not None:
            precision, recall = precision_recall(ours.features(), theirs.features())
            own |= {named("precision", network): precision, named("recall", network): recall}
        if floor and theirs is not None:
            own[named("floor", network)] = theirs.floor()
        share = ours.label_share()
        if share is not None:
            own[named("label_agreement", network)] = share
        figures.update(plain_name(own, network, "gFID"))
    return figures


def _unknown(networks: Sequence[FeatureNetwork], reference: Reference) -> list[str]:
    """Networks that the reference has no statistics of."""
    known = reference.network if reference.statistics is not None else None
    return [network.name for network in networks if network.name != known]


def _check(networks: Sequence[FeatureNetwork], reference: Reference, floor: bool) -> None:
    if not networks:
        raise ValueError("generation is measured by a network: pass at least one")
    unknown = _unknown(networks, reference)
    if reference.pictures is None and unknown:
        raise ValueError(
            f"the reference has statistics of {reference.network} and no pictures: nothing to "
            f"compare {', '.join(unknown)} with"
        )
    if reference.pictures is None and floor:
        raise ValueError("a floor wants real pictures; this reference has statistics alone")
