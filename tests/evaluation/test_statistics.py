"""Frechet distance, class score, precision and recall: against libraries and by hand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from titok_fast.evaluation.statistics import (
    ClassScore,
    FeatureSums,
    Gaussian,
    frechet_distance,
    precision_recall,
)


def features(n: int, d: int, seed: int, spread: float = 1.0) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=drawn, dtype=torch.float64)
    return spread * torch.randn(n, d, generator=drawn, dtype=torch.float64) @ mixing + seed


def gaussian(rows: Tensor, batch: int = 7) -> Gaussian:
    sums = FeatureSums(rows.shape[1])
    for part in rows.split(batch):
        sums.update(part)
    return sums.gaussian()


def test_sums_over_batches_give_numpys_mean_and_covariance() -> None:
    rows = features(101, 12, seed=3)
    got = gaussian(rows)
    assert got.count == 101
    np.testing.assert_allclose(got.mean, rows.mean(0), rtol=1e-13)
    np.testing.assert_allclose(got.covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-10)
    rows = features(4000, 3, seed=1).float() + 1000  # float32 is summed in float64
    got = gaussian(rows, batch=64)
    wanted = np.cov(rows.double().numpy(), rowvar=False)
    np.testing.assert_allclose(got.covariance, wanted, rtol=1e-7)


def test_sums_want_two_images_and_finite_features() -> None:
    with pytest.raises(ValueError, match="at least 2 images; got 1"):
        gaussian(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="NaN or Inf"):
        gaussian(torch.tensor([[1.0], [float("nan")]]))


def test_frechet_distance_agrees_with_torch_fidelity_and_scipy() -> None:
    library = pytest.importorskip("torch_fidelity.metric_fid")
    scipy = pytest.importorskip("scipy.linalg")
    a, b = features(300, 24, seed=0), features(250, 24, seed=1, spread=1.3)
    ours = frechet_distance(gaussian(a), gaussian(b))

    statistics = [library.fid_features_to_statistics(rows) for rows in (a, b)]
    theirs = library.fid_statistics_to_metric(*statistics, verbose=False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)

    (mean_a, cov_a), (mean_b, cov_b) = ((s["mu"], s["sigma"]) for s in statistics)
    root = scipy.sqrtm(cov_a @ cov_b).real
    plain = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    assert ours == pytest.approx(plain, rel=1e-9)


def test_frechet_distance_of_known_gaussians() -> None:
    # commuting covariances: the distance is that of the standard deviations
    a = Gaussian(torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0])).double())
    b = Gaussian(torch.tensor([1.0, 0, 2]).double(), torch.diag(torch.tensor([4.0, 1, 0])).double())
    assert frechet_distance(a, b) == pytest.approx((1 + 4) + (1 + 1 + 9))


def test_frechet_distance_of_singular_covariances() -> None:
    """Fewer images than features: scipy's root of such a product is not to be trusted."""
    rows = features(10, 40, seed=2)
    same = gaussian(rows)
    assert frechet_distance(same, same) == pytest.approx(0.0, abs=1e-4 * float(rows.var()))
    shifted = gaussian(rows + 3.0)
    assert frechet_distance(same, shifted) == pytest.approx(40 * 9.0, rel=1e-4)


def test_frechet_distance_refuses_two_networks() -> None:
    with pytest.raises(ValueError, match="one network; got 3 and 4"):
        frechet_distance(gaussian(features(9, 3, 0)), gaussian(features(9, 4, 0)))


def direct_score(logits: Tensor) -> float:
    p = logits.double().softmax(1)
    return float((p * (p.log() - p.mean(0).log())).sum(1).mean().exp())


def score(logits: Tensor, batch: int = 11) -> ClassScore:
    made = ClassScore(len(logits), logits.shape[1])
    for first in range(0, len(logits), batch):
        made.update(logits[first : first + batch], first)
    return made


@pytest.mark.parametrize("n", [100, 107, 10])
def test_class_score_is_the_formula_and_splits_are_tenths_in_file_order(n: int) -> None:
    logits = 3 * torch.randn(n, 17)
    assert score(logits).one_split() == pytest.approx(direct_score(logits), rel=1e-12)
    parts = [logits[s * n // 10 : (s + 1) * n // 10] for s in range(10)]
    wanted = np.mean([direct_score(part) for part in parts])
    assert score(logits).ten_splits() == pytest.approx(wanted, rel=1e-12)


def test_class_score_agrees_with_torch_fidelity() -> None:
    library = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * torch.randn(200, 9)
    theirs = library.isc_features_to_metric(logits, splits=10, shuffle=False)
    assert score(logits).ten_splits() == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_class_score_at_its_ends() -> None:
    sure = 1e4 * torch.eye(10).repeat(10, 1)  # every class, without a doubt: log 0 must not appear
    assert score(sure).one_split() == pytest.approx(10.0)
    assert score(sure).ten_splits() == pytest.approx(10.0)
    assert score(torch.ones(50, 10)).one_split() == pytest.approx(1.0)
    assert math.isfinite(score(torch.randn(4, 5)).ten_splits())  # fewer images than splits


def brute_force(points: Tensor, centres: Tensor, k: int) -> float:
    inside = 0
    for point in points.double():
        for i, centre in enumerate(centres.double()):
            others = [float((centre - c).norm()) for j, c in enumerate(centres.double()) if j != i]
            if float((point - centre).norm()) <= sorted(others)[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_against_brute_force(k: int) -> None:
    generated, real = torch.randn(40, 2) * 0.8 + 0.7, torch.randn(33, 2)
    got = precision_recall(generated, real, k=k, rows=7)
    wanted = brute_force(generated, real, k), brute_force(real, generated, k)
    assert got == pytest.approx(wanted)
    assert 0 < got[0] < 1
    assert 0 < got[1] < 1


def test_precision_and_recall_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    # all near the first cluster: precise, but half of the real ones are out of reach
    generated = torch.tensor([[0.1], [0.6], [1.1], [1.6]])
    assert precision_recall(generated, real, k=1) == (1.0, 0.5)
    far = generated + 100
    assert precision_recall(far, real, k=1) == (0.0, 0.0)
    assert precision_recall(real, real, k=3) == (1.0, 1.0)


def test_precision_and_recall_refuse_small_sets() -> None:
    with pytest.raises(ValueError, match="over 3 rows"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match=r"\(9, 3\) and \(9, 2\)"):
        precision_recall(torch.zeros(9, 3), torch.zeros(9, 2))
