"""How far a kernel may be from the float64 truth, by dtype, and why.

Every bound is a number of roundings of the result's dtype, not a number that happened to pass:

float32: a kernel adds in another order than the reference; with n terms the error grows like
    sqrt(n) roundings, and callers pass n.
bfloat16, float16: sums are float32 inside, so what shows is the rounding of inputs to a product
    (one of them computed) and that of the result, which counts two: Triton's interpreter cuts
    float32 to bfloat16 where a GPU rounds.
"""

import torch
from torch import Tensor

# unit roundoff: half the distance between 1 and the next number
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROUNDINGS = {torch.float32: 8, torch.bfloat16: 3, torch.float16: 3}


def assert_near(got: Tensor, want: Tensor, *, terms: int = 1, scale: float = 1.0) -> None:
    """Assert |got - want| <= roundings * (|want| + scale), NaN and infinities equal.

    Each result adds up `terms` numbers; `scale` is their typical size times the square root of
    their number: what remains of the error when they cancel.
    """
    bound = ROUNDINGS[got.dtype] * ROUNDOFF[got.dtype]
    if got.dtype == torch.float32:
        bound *= terms**0.5
    torch.testing.assert_close(
        got.double(), want.double(), rtol=bound, atol=bound * scale, equal_nan=True
    )
