"""What the tests of the sampling ops share: seeds, and how draws are compared."""

import torch
from torch import Tensor


def any_seeds(count: int, device: torch.device | str = "cpu") -> Tensor:
    """(count,) int64 over the whole range."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), device=device)


def assert_same_draws(
    noisy: Tensor,
    got: tuple[Tensor, Tensor],
    want: tuple[Tensor, Tensor],
    tolerance: float,
) -> None:
    """Same candidates, or rivals whose noisy logits are that close; scores of the same ones close.

    Args:
        noisy: (..., N) float32, what the candidates are the argmax of. May hold infinities.
        got: candidates (...) and scores (...) of a kernel.
        want: those of the reference.
        tolerance: absolute for values up to 1, relative above. 0 wants the same candidates.
    """
    assert got[0].dtype == torch.int64
    assert got[1].dtype == torch.float32
    assert got[0].shape == want[0].shape == got[1].shape
    same = got[0] == want[0]
    if tolerance == 0:
        assert same.all()
    reached = noisy.gather(-1, got[0].unsqueeze(-1)).squeeze(-1)
    best = noisy.gather(-1, want[0].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(reached, best, rtol=tolerance, atol=tolerance)
    score_tolerance = max(tolerance, 1e-5)
    torch.testing.assert_close(
        got[1][same], want[1][same], rtol=score_tolerance, atol=score_tolerance, equal_nan=True
    )
