"""Statistics of features: Frechet distance, class score, precision and recall.

Sums are float64 and added up over batches and ranks, so only precision and recall need all features
at once. Sources: arXiv:1706.08500 (Frechet distance), 1606.03498 (Inception
Score), 1904.06991 (precision, recall); details as in openai/guided-diffusion's evaluator ("ADM").
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from titok_fast.distributed import sum_over_ranks
from titok_fast.io.files import write_atomic
from titok_fast.io.npz import open_npz, read_array

ADM_NETWORK = "inception"  # network of the statistics where a file does not name one
SPLITS = 10  # ADM's protocol
NEIGHBOURS = 3  # ADM's k


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features, all that a Frechet distance needs.

    Attributes:
        mean: (d,) float64.
        covariance: (d, d) float64, normalised by n - 1.
        count: n, or 0 where a file does not say.
    """

    mean: Tensor
    covariance: Tensor
    count: int = 0


def read_statistics(path: str | Path) -> tuple[Gaussian, str] | None:
    """`mu` and `sigma` of a .npz file, and the name of the network they are of.

    Returns:
        None for a file without `mu`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, no archive, or arrays of shapes that do not fit.
    """
    with open_npz(path) as archive:
        names = archive.namelist()
        if "mu.npy" not in names:
            return None
        try:
            mean, covariance = read_array(archive, "mu"), read_array(archive, "sigma")
            network = read_array(archive, "network") if "network.npy" in names else ADM_NETWORK
            count = int(read_array(archive, "count")) if "count.npy" in names else 0
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} does not hold readable statistics: {error}") from error
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        got = f"{mean.shape} and {covariance.shape}"
        raise ValueError(f"{path} wants mu (d,) and sigma (d, d); got {got}")
    tensors = [torch.from_numpy(x.astype(np.float64)) for x in (mean, covariance)]
    return Gaussian(tensors[0], tensors[1], count), str(network)


def write_statistics(path: str | Path, statistics: Gaussian, network: str) -> None:
    """Write `mu` and `sigma` as in ADM's files, with the network's name, atomically.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written.
    """
    if Path(path).suffix.lower() != ".npz":
        raise ValueError(f"statistics want a file name ending in .npz; got {path}")
    arrays = {
        "mu": statistics.mean.numpy(),
        "sigma": statistics.covariance.numpy(),
        "network": np.array(network),
        "count": np.int64(statistics.count),
    }
    write_atomic(path, lambda part: np.savez(part, **arrays))  # type: ignore[arg-type]


class _Sums:
    """Tensors that are summed over batches, then over ranks."""

    def merge_ranks(self) -> None:
        """Sum over ranks; every rank gets the result."""
        for sums in vars(self).values():
            if isinstance(sums, Tensor):
                sum_over_ranks(sums)


class FeatureSums(_Sums):
    """Sums from which the mean and the covariance of `dim` features follow."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add (B, d) features."""
        x = features.to(self.total)
        self.count += len(x)
        self.total += x.sum(dim=0)
        self.outer.addmm_(x.T, x)

    def gaussian(self) -> Gaussian:
        """Mean and covariance of what was added.

        Raises:
            ValueError: fewer than two rows, or features that are not finite.
        """
        n = int(self.count)
        if n < 2:
            raise ValueError(f"statistics want at least 2 images; got {n}")
        mean = self.total / n
        covariance = (self.outer - n * torch.outer(mean, mean)) / (n - 1)
        if not bool(torch.isfinite(covariance).all()):
            raise ValueError("the features hold NaN or Inf: check the network's weights")
        return Gaussian(mean.cpu(), covariance.cpu(), n)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians; 0 where they are equal.

    A B has the eigenvalues of A^1/2 B A^1/2, so the trace of its square root is the sum of their
    square roots. That matrix is symmetric, with negative eigenvalues only by rounding: a singular
    covariance needs neither an eps on the diagonal, as with scipy's sqrtm, nor a limit on imaginary
    parts.

    Raises:
        ValueError: another number of features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"the Frechet distance wants features of one network; got {len(a.mean)} and "
            f"{len(b.mean)} of them"
        )
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    eigenvalues = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0)
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * eigenvalues.sqrt().sum())


class ClassScore(_Sums):
    """The Inception Score of any classifier: exp of the mean KL from the mean prediction.

    `total` is the number of images in the whole evaluation, which ten-split scores divide into
    tenths in file order.
    """

    def __init__(self, total: int, classes: int, device: torch.device | str = "cpu") -> None:
        self.total = total
        self.count = torch.zeros(SPLITS, dtype=torch.float64, device=device)
        self.probability = torch.zeros(SPLITS, classes, dtype=torch.float64, device=device)
        self.negentropy = torch.zeros(SPLITS, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, first: int) -> None:
        """Add (B, classes) logits of the images `first`, `first` + 1, ... in file order."""
        log_p = logits.to(self.probability).log_softmax(dim=1)
        index = torch.arange(first, first + len(logits), device=log_p.device)
        # splits begin at floor(s * total / 10)
        split = ((index + 1) * SPLITS - 1) // self.total
        self.count.index_add_(0, split, torch.ones_like(log_p[:, 0]))
        self.probability.index_add_(0, split, log_p.exp())
        self.negentropy.index_add_(0, split, (log_p.exp() * log_p).sum(dim=1))

    def one_split(self) -> float:
        """Over all images, as in the published reconstruction evaluation."""
        return float(
            _score(self.count.sum(0), self.probability.sum(0), self.negentropy.sum(0)).exp()
        )

    def ten_splits(self) -> float:
        """Mean over ten runs of images in file order, as ADM's. Not comparable to `one_split`."""
        present = self.count > 0
        scores = _score(self.count, self.probability, self.negentropy).exp()
        return float(scores[present].mean())


def _score(count: Tensor, probability: Tensor, negentropy: Tensor) -> Tensor:
    """Mean KL divergence: (...), (..., classes), (...) -> (...). Empty splits give NaN."""
    mean = probability / count.unsqueeze(-1)
    return negentropy / count - torch.xlogy(mean, mean).sum(dim=-1)


def precision_recall(
    generated: Tensor, real: Tensor, *, k: int = NEIGHBOURS, rows: int = 1024
) -> tuple[float, float]:
    """Share of generated features in the real manifold, and of real ones in the generated.

    A set's manifold is the union of balls round its members, each out to the member's k-th nearest
    neighbour in the set.

    Args:
        generated: (n, d).
        real: (m, d), on the same device.
        k: neighbours.
        rows: rows of the distance matrix at once; it is n or m columns wide, in float64.

    Returns:
        Precision and recall, each in [0, 1].

    Raises:
        ValueError: a set with k or fewer members, or features of two networks.
    """
    if min(len(generated), len(real)) <= k or generated.shape[1:] != real.shape[1:]:
        got = f"{tuple(generated.shape)} and {tuple(real.shape)}"
        raise ValueError(f"precision and recall want over {k} rows (n, d) on each side; got {got}")
    # float64: neighbours are told apart by differences of large squares
    generated, real = generated.double(), real.double()
    precision = _inside(generated, real, _radii(real, k, rows), rows)
    return precision, _inside(real, generated, _radii(generated, k, rows), rows)


def _radii(points: Tensor, k: int, rows: int) -> Tensor:
    """(n, d) -> (n,) distance to the k-th nearest other point."""
    parts = [torch.cdist(part, points).kthvalue(k + 1).values for part in points.split(rows)]
    return torch.cat(parts)


def _inside(points: Tensor, centres: Tensor, radii: Tensor, rows: int) -> float:
    parts = [(torch.cdist(p, centres) <= radii).any(dim=1) for p in points.split(rows)]
    return float(torch.cat(parts).double().mean())
