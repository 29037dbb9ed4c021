"""nearest_code against brute force in float64; indices are judged by the distance they reach."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from calls import DEVICE, DTYPES, cases
from hypothesis import strategies as st
from torch import Tensor

from titok_fast.kernels.nearest_code import (
    MAX_CHANNELS,
    MAX_CODES,
    METRICS,
    nearest_code,
    nearest_code_ref,
    search_codes,
)


def distances(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    z, codebook = z.double(), codebook.double()
    if metric == "cosine":
        z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    return (z[:, None] - codebook[None]).square().sum(-1)


def assert_nearest(ids: Tensor, z: Tensor, codebook: Tensor, metric: str) -> None:
    """Each index is in range and as near as float32 arithmetic can tell."""
    assert ids.dtype == torch.int64
    assert ids.shape == z.shape[:1]
    if not len(z):
        return
    assert ids.min() >= 0
    assert ids.max() < len(codebook)
    d = distances(z, codebook, metric)
    reached = d.gather(1, ids[:, None]).squeeze(1)
    rows, codes = z.double(), codebook.double()
    if metric == "cosine":
        rows, codes = F.normalize(rows, dim=-1), F.normalize(codes, dim=-1)
    # |f|^2 + |e|^2 - 2 f.e rounds at the size of its terms, more often with more channels
    size = rows.square().sum(1) + codes.square().sum(1).max()
    bound = 2.0**-23 * (4 + z.shape[1] ** 0.5) * size
    assert (reached - d.amin(1) <= bound).all()


@cases(
    N=st.integers(0, 70),
    K=st.one_of(st.integers(1, 5), st.integers(1, 300)),
    C=st.one_of(st.sampled_from((1, 12, 16, 64)), st.integers(1, 70)),
    dtype=st.sampled_from(DTYPES),
    metric=st.sampled_from(METRICS),
)
def test_kernel_finds_the_nearest(device: torch.device, case: SimpleNamespace) -> None:
    z = torch.randn(case.N, case.C).to(device, case.dtype)
    codebook = torch.randn(case.K, case.C).to(device)
    assert_nearest(nearest_code(z, codebook, metric=case.metric), z, codebook, case.metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("N", "K", "C"), [(33, 4096, 12), (7, 8192, 64), (5, 70, 256), (0, 3, 2)])
def test_reference_finds_the_nearest(N: int, K: int, C: int, metric: str) -> None:
    z, codebook = torch.randn(N, C), torch.randn(K, C)
    assert_nearest(nearest_code(z, codebook, metric=metric), z, codebook, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("C", [12, 16, 64, MAX_CHANNELS])
def test_kernel_agrees_with_reference(device: torch.device, C: int, metric: str) -> None:
    z, codebook = torch.randn(20, C, device=device), torch.randn(300, C, device=device)
    got = nearest_code(z, codebook, metric=metric)
    assert (got == nearest_code_ref(z, codebook, metric)).all()


def test_largest_codebook() -> None:
    """Not interpreted: 4096 tiles take half a minute."""
    device = DEVICE
    codebook = torch.randn(MAX_CODES, 3, device=device)
    want = torch.tensor([MAX_CODES - 1, 0, MAX_CODES // 2], device=device)
    z = torch.cat([codebook[want], torch.randn(3, 3, device=device)])
    ids = nearest_code(z, codebook)
    assert_nearest(ids, z, codebook, "euclidean")
    assert (ids[:3] == want).all()


# 700 codes: eight programs share eleven tiles, so some see two; 2100 rows: large tiles
@pytest.mark.parametrize(("N", "K"), [(20, 700), (2100, 9), (1, 2), (17, 64), (16, 65)])
@pytest.mark.parametrize("path", [nearest_code, nearest_code_ref])
def test_lowest_id_wins(device: torch.device, N: int, K: int, path: Callable[..., Tensor]) -> None:
    """Small integers make every float32 operation exact, so equal distances are equal."""
    codebook = torch.randint(-1, 2, (K, 3), device=device).float()
    z = torch.randint(-2, 3, (N, 3), device=device).float()
    want = distances(z, codebook, "euclidean").argmin(1)
    assert (path(z, codebook) == want).all()


def test_all_codes_equal(device: torch.device) -> None:
    z, codebook = torch.randn(9, 5, device=device), torch.ones(700, 5, device=device)
    for metric in METRICS:
        assert (nearest_code(z, codebook, metric=metric) == 0).all()


@pytest.mark.parametrize("path", [nearest_code, nearest_code_ref])
def test_rounding_decides_as_published(device: torch.device, path: Callable[..., Tensor]) -> None:
    """Codes whose distances |f|^2 + |e|^2 - 2 f.e round to the same number tie."""
    # the exact distances are 1000^2 and (1000 - 2**-16)^2; their difference, 0.03, is lost
    z = torch.tensor([[1000.0]], device=device)
    codebook = torch.tensor([[0.0], [2.0**-16]], device=device)
    assert distances(z, codebook, "euclidean").argmin() == 1
    assert path(z, codebook) == 0


def test_negative_distances_keep_their_order(device: torch.device) -> None:
    """Rounding makes distances of near-equal rows negative; the packed keys must sort these too.

    The kernel's own distances come from searches in which all other codes are far away.
    """
    base = torch.randn(1, 64, device=device)
    z = base + 1e-4 * torch.randn(5, 64, device=device)
    codebook = base + 1e-4 * torch.randn(40, 64, device=device)
    lone = [codebook + 100 * (torch.arange(40, device=device) != k)[:, None] for k in range(40)]
    bits = torch.cat([search_codes(z, e, False, packed=True) for e in lone], dim=1) >> 32
    dist = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int32).view(torch.float32)
    assert len(dist[dist < 0].unique()) > 1
    assert (dist.abs() < 1e-3).all()
    got = nearest_code(z, codebook)
    assert (dist.gather(1, got[:, None]).squeeze(1) == dist.amin(1)).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e30, 1e-40, 0.0])
def test_extreme_values_stay_in_range(device: torch.device, value: float, metric: str) -> None:
    z, codebook = torch.randn(5, 7, device=device), torch.randn(130, 7, device=device)
    clean = nearest_code(z, codebook, metric=metric)
    z[2] = value
    ids = nearest_code(z, codebook, metric=metric)
    assert ((ids >= 0) & (ids < 130)).all()
    others = [0, 1, 3, 4]
    assert (ids[others] == clean[others]).all()
    if value == 0.0:
        assert_nearest(ids, z, codebook, metric)


def test_nan_in_a_code_never_wins(device: torch.device) -> None:
    z, codebook = torch.randn(5, 7, device=device), torch.randn(130, 7, device=device)
    want = nearest_code(z, codebook[1:]) + 1
    codebook[0] = float("nan")
    assert (nearest_code(z, codebook) == want).all()


def test_strides(device: torch.device) -> None:
    z = torch.randn(12, 30, device=device)
    codebook = torch.randn(12, 200, device=device)[:, ::2]
    want = nearest_code(z.T.contiguous(), codebook.T.contiguous())
    assert (nearest_code(z.T, codebook.T) == want).all()
    assert (nearest_code_ref(z.T, codebook.T) == want).all()


def test_chunks_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    z, codebook = torch.randn(100, 12), torch.randn(40, 12)
    want = nearest_code_ref(z, codebook)
    chunks = nearest_code_ref.__globals__["_CHUNK_ELEMENTS"]
    monkeypatch.setitem(chunks, "cpu", 17 * 40)
    assert (nearest_code_ref(z, codebook) == want).all()


@pytest.mark.parametrize("C", [1, 12, 64, 100, 128, 129, 256])
def test_reference_rounds_as_published(C: int) -> None:
    codebook = torch.randn(500, C)
    rivals = [codebook * (1 + k * 1e-7) for k in range(4)]  # they differ in the last bits alone
    codebook = torch.cat(rivals)[torch.randperm(2000)]
    z = codebook[torch.randint(2000, (700,))] + 0.1 * torch.randn(700, C)
    squares = z.square().sum(1, keepdim=True) + codebook.square().sum(1)
    want = (squares - 2 * z @ codebook.T).argmin(1)
    assert (nearest_code_ref(z, codebook) == want).all()


def test_autocast_is_ignored() -> None:
    z, codebook = torch.randn(500, 12), torch.randn(4096, 12)
    want = nearest_code(z, codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert (nearest_code(z, codebook) == want).all()


@pytest.mark.gpu
def test_more_than_2_31_elements(device: torch.device) -> None:
    z = torch.zeros(2**31 // 12 + 5, 12, dtype=torch.bfloat16, device=device)
    z[-3:] = 1
    codebook = torch.stack([torch.zeros(12), torch.ones(12)]).to(device)
    ids = nearest_code(z, codebook)
    assert ids[-3:].tolist() == [1, 1, 1]
    assert int(ids.sum()) == 3
