"""Generation figures: by hand-made networks; halves, labels, order, references."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from titok_fast.evaluation.generation import Reference, evaluate_generation, measure_pictures
from titok_fast.evaluation.measure import Measurement, warn_if_sorted
from titok_fast.evaluation.networks import FeatureNetwork
from titok_fast.evaluation.pictures import ArrayPictures
from titok_fast.evaluation.statistics import FeatureSums, frechet_distance, precision_recall

RNG = np.random.default_rng(2)


class Means(FeatureNetwork):
    """Mean colours as features; the brightest colour is the class."""

    def __init__(self, name: str, *, labelled: bool = False) -> None:
        super().__init__(name, 3, 3, labelled=labelled)
        self.weight = nn.Parameter(torch.zeros(()))

    def _measure(self, images: Tensor) -> tuple[Tensor, Tensor]:
        means = images.double().mean(dim=(2, 3)) / 16
        return means, means


def pictures(n: int, seed: int, shift: int = 0) -> ArrayPictures:
    drawn = np.random.default_rng(seed)
    colours = drawn.integers(0, 200, (n, 1, 1, 3))
    images = (colours + drawn.integers(0, 56 - shift, (n, 4, 4, 3)) + shift).astype(np.uint8)
    return ArrayPictures(images, images.mean((1, 2)).argmax(1))


def features(of: ArrayPictures) -> Tensor:
    return torch.from_numpy(of.images.mean((1, 2)) / 16)


SAMPLES, REAL = pictures(60, 0, shift=20), pictures(80, 1)


def test_figures_by_hand() -> None:
    network = Means("fashion-classifier", labelled=True)
    figures = evaluate_generation(
        SAMPLES, Reference(REAL), [network], batch_size=7, floor=True, neighbours=True
    )
    sums = FeatureSums(3), FeatureSums(3)
    for one, of in zip(sums, (SAMPLES, REAL), strict=True):
        one.update(features(of))
    wanted = frechet_distance(sums[0].gaussian(), sums[1].gaussian())
    assert figures["fid[fashion-classifier]"] == pytest.approx(wanted, rel=1e-9)
    found = [figures[f"{part}[fashion-classifier]"] for part in ("precision", "recall")]
    assert found == pytest.approx(precision_recall(features(SAMPLES), features(REAL)))
    assert figures["label_agreement[fashion-classifier]"] == 1.0
    assert figures["images"] == 60
    assert figures["is[fashion-classifier]"] >= 1
    assert 0 < figures["floor[fashion-classifier]"] < figures["fid[fashion-classifier]"]
    assert not {"gFID", "rFID"} & figures.keys()


def test_only_inception_gives_gfid() -> None:
    figures = evaluate_generation(SAMPLES, Reference(REAL), [Means("inception"), Means("other")])
    assert figures["gFID"] == figures["fid[inception]"] == figures["fid[other]"]
    assert "label_agreement[inception]" not in figures


def test_label_agreement_counts() -> None:
    assert SAMPLES.labels is not None
    labels = SAMPLES.labels.copy()
    labels[:15] = (labels[:15] + 1) % 3
    wrong = ArrayPictures(SAMPLES.images, labels)
    figures = evaluate_generation(
        wrong, Reference(REAL), [Means("c", labelled=True)], neighbours=False
    )
    assert figures["label_agreement[c]"] == 0.75
    assert "precision[c]" not in figures


def test_statistics_go_before_pictures() -> None:
    sums = FeatureSums(3)
    sums.update(features(SAMPLES))
    reference = Reference(REAL, sums.gaussian(), "inception")
    figures = evaluate_generation(SAMPLES, reference, [Means("inception"), Means("other")])
    assert figures["gFID"] == pytest.approx(0.0, abs=1e-9)
    assert figures["fid[other]"] > 0.1  # statistics of one network are not used for another
    assert "precision[inception]" in figures
    alone = Reference(None, sums.gaussian(), "inception")
    figures = evaluate_generation(SAMPLES, alone, [Means("inception")])
    named = {f"{name}[inception]" for name in ("fid", "is", "is10")}
    assert figures.keys() == {"images", "gFID", *named}


def test_refusals() -> None:
    sums = FeatureSums(3)
    sums.update(features(REAL))
    alone = Reference(None, sums.gaussian(), "inception")
    with pytest.raises(ValueError, match="at least one"):
        evaluate_generation(SAMPLES, Reference(REAL), [])
    with pytest.raises(ValueError, match=r"statistics of inception and no images.*other"):
        evaluate_generation(SAMPLES, alone, [Means("inception"), Means("other")])
    with pytest.raises(ValueError, match="floor wants real images"):
        evaluate_generation(SAMPLES, alone, [Means("inception")], floor=True)


def test_halves_are_disjoint_and_whole() -> None:
    one = Measurement(Means("m"), 81, halves=True)
    images = torch.from_numpy(pictures(81, 3).images)
    for first in range(0, 81, 10):
        one.update(images[first : first + 10], first)
    a, b = one._halves
    assert {int(a.count), int(b.count)} == {40, 41}
    torch.testing.assert_close(a.outer + b.outer, one.sums.outer)
    assert one.floor() == frechet_distance(a.gaussian(), b.gaussian())
    again = Measurement(Means("m"), 81, halves=True)
    again.update(images, 0)
    assert again.floor() == pytest.approx(one.floor())


@pytest.mark.parametrize(("keep", "step"), [(81, 1), (41, 2), (40, 3), (10, 9), (1, 81)])
def test_kept_features_are_evenly_spaced(keep: int, step: int) -> None:
    of = pictures(81, 4)
    (measured,) = measure_pictures(of, [Means("m")], keep=keep, batch_size=7)
    torch.testing.assert_close(measured.features().double(), features(of)[::step])
    assert len(measured.features()) <= keep


def test_sorted_classes_are_warned_of() -> None:
    labels = torch.arange(1000) % 50
    with pytest.warns(UserWarning, match="5 of 50 classes"):
        warn_if_sorted(labels.sort().values)
    network = Means("m")
    order = np.arange(60) // 6
    with pytest.warns(UserWarning, match="sorted by class"):
        evaluate_generation(ArrayPictures(SAMPLES.images, order), Reference(REAL), [network])


@pytest.mark.filterwarnings("error")
def test_interleaved_and_random_orders_are_not_warned_of() -> None:
    for classes in (10, 100, 1000):
        warn_if_sorted(torch.arange(1000) % classes)
        warn_if_sorted(torch.randint(0, classes, (1000,)))
    # real pictures may lie in any order: their ten splits are not reported
    sorted_real = ArrayPictures(REAL.images, np.arange(80) // 8)
    evaluate_generation(SAMPLES, Reference(sorted_real), [Means("m")])
