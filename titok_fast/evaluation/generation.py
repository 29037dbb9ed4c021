"""Measure drawn images: gFID, class scores, precision and recall, agreement with labels.

Protocol of openai/guided-diffusion's evaluator ("ADM"): statistics of the whole training set come
from a file, or from images; samples are truncated to bytes, as in the published script.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from titok_fast.distributed import sum_over_ranks
from titok_fast.evaluation.measure import Figures, Measurement, labelled, warn_if_sorted
from titok_fast.evaluation.networks import INCEPTION, FeatureNetwork
from titok_fast.evaluation.pictures import Pictures, batches, open_pictures
from titok_fast.evaluation.statistics import Gaussian, precision_recall, read_statistics
from titok_fast.io.npz import NpzPictures, open_npz

# real images among which neighbours are sought, as many as ADM's reference files hold
NEIGHBOURHOOD = 10_000


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: images, statistics or both.

    Attributes:
        pictures: real ones, or None.
        statistics: of their features, or None; used instead of those of `pictures`.
        network: name of the network that `statistics` are of.
    """

    pictures: Pictures | None = None
    statistics: Gaussian | None = None
    network: str = INCEPTION


def read_reference(location: str, size: int | None = None) -> Reference:
    """What samples are compared with.

    Args:
        location: an .npz file with `mu` and `sigma`, images as `arr_0`, or both, as ADM's; or
            another of `pictures.LOCATIONS`.
        size: as in `open_pictures`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a damaged file, or neither statistics nor images in it.
    """
    found = read_statistics(location) if location.lower().endswith(".npz") else None
    if found is None:
        return Reference(open_pictures(location, size))
    with open_npz(location) as archive:
        has_images = "arr_0.npy" in archive.namelist()
    return Reference(NpzPictures(location) if has_images else None, *found)


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
    """Features of images by some networks. Ranks of a process group share the images.

    Args:
        pictures: in the order of the ten splits.
        networks: of the features.
        keep: number of images whose features are stored, as in Measurement.
        halves: sum two halves apart, as in Measurement.
        check_order: warn when images with known classes lie sorted by class.
        batch_size: images at once.
        progress: called with the number of images done since the last call, on this rank.

    Returns:
        A measurement for each network, of all ranks together.
    """
    total = len(pictures)
    measured = [Measurement(n, total, keep=keep, halves=halves) for n in networks]
    order = torch.zeros(total, dtype=torch.int64)
    seen = 0
    for first, images, labels in batches(pictures, batch_size, progress):
        for one in measured:
            one.update(images, first, labels)
        if labels is not None:
            order[first : first + len(labels)] = labels
            seen += len(labels)
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
    """Measure drawn images against real ones.

    Args:
        samples: drawn images, classes interleaved.
        reference: real images or their statistics.
        networks: feature networks, at least one.
        neighbours: also precision and recall with 3 neighbours, all samples against at most 10,000
            evenly spaced real images; left out without real images.
        floor: also the Frechet distance of two halves of the real images.
        batch_size: images at once.
        progress: called with the number of images done since the last call, on this rank.

    Returns:
        `images`, and for each network `fid[name]`, `is[name]` (one split), `is10[name]` (ten splits
        in file order), `precision[name]`, `recall[name]`, `floor[name]`, and where it knows the
        classes `label_agreement[name]`: the share of samples classified as their label. `gFID`
        for Inception alone.

    Raises:
        ValueError: no network, too few images, a floor without images, or a reference that is
            of another network.
    """
    real = reference.pictures
    compared = reference.network if reference.statistics is not None else None
    unknown = [network.name for network in networks if network.name != compared]
    if not networks:
        raise ValueError("generation is measured by a network: pass at least one")
    if real is None and unknown:
        raise ValueError(
            f"the reference has statistics of {reference.network} and no images: nothing to "
            f"compare {', '.join(unknown)} with"
        )
    if real is None and floor:
        raise ValueError("a floor wants real images; this reference has statistics alone")

    measure = partial(measure_pictures, networks=networks, batch_size=batch_size, progress=progress)
    keep = len(samples) if neighbours and real is not None else 0
    drawn = measure(samples, keep=keep, check_order=True)
    known: list[Measurement] | list[None] = [None] * len(networks)
    if real is not None and (neighbours or floor or unknown):
        known = measure(real, keep=min(NEIGHBOURHOOD, len(real)) if neighbours else 0, halves=floor)
    figures: Figures = {"images": float(len(samples))}
    for network, ours, theirs in zip(networks, drawn, known, strict=True):
        wanted = reference.statistics if network.name == compared else None
        if wanted is None:
            assert theirs is not None  # else refused above
            wanted = theirs.sums.gaussian()
        own = ours.figures(wanted)
        if neighbours and theirs is not None:
            own["precision"], own["recall"] = precision_recall(ours.features(), theirs.features())
        if floor and theirs is not None:
            own["floor"] = theirs.floor()
        share = ours.label_share()
        if share is not None:
            own["label_agreement"] = share
        figures |= labelled(own, network, "gFID")
    return figures
