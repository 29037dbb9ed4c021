"""The discriminator of decoder fine-tuning: a convolutional network that scores image patches.

Upstream: modeling/modules/discriminator.py, whose parameter names it keeps. Float32 throughout.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast.settings import require


class Blur(nn.Module):
    """Halve the sides with a fixed 4 x 4 binomial kernel, against aliasing."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = taps[:, None] * taps / 64.0
        self.register_buffer("kernel", kernel[None, None])  # persistent: part of published files

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))."""
        C, H, W = x.shape[1:]
        if H % 2 or W % 2:
            x = F.pad(x, (0, W % 2, 0, H % 2))  # an odd side is padded by 1 before and 2 after
        return F.conv2d(x, self.kernel.expand(C, -1, -1, -1), stride=2, padding=1, groups=C)


class Discriminator(nn.Module):
    """Images to a grid of logits: high where a patch looks real.

    The defaults are the published network, 1,909,889 parameters: 256 px are halved three times to
    32 and max-pooled to 16 x 16 logits. Features smaller than the pooled side are not pooled
    (upstream would copy pixels to fill the grid): below 128 px the grid has side S/8, so 32 px give
    4 x 4 logits.

    Args:
        hidden_channels: width of the first stage, doubled by each after it; a multiple of 32.
        num_stages: halvings before the pool, at least 1.
        pooled_side: largest side of the grid of logits, at least 1.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, hidden_channels: int = 128, num_stages: int = 3, pooled_side: int = 16
    ) -> None:
        super().__init__()
        require(
            hidden_channels >= 32 and hidden_channels % 32 == 0,
            "Discriminator",
            "hidden_channels to be a multiple of 32 (norm groups)",
            hidden_channels,
        )
        sizes = num_stages, pooled_side
        require(min(sizes) >= 1, "Discriminator", "num_stages and pooled_side of at least 1", sizes)
        self.pooled_side = pooled_side
        leaky = nn.LeakyReLU(0.1)
        widths = [hidden_channels, *(hidden_channels * 2**s for s in range(num_stages))]
        self.block_in = nn.Sequential(nn.Conv2d(3, hidden_channels, 5, padding=2), leaky)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1), Blur(), nn.GroupNorm(32, o), leaky)
            for i, o in pairwise(widths)
        )
        last = widths[-1]
        self.to_logits = nn.Sequential(
            nn.Conv2d(last, last, 1), leaky, nn.Conv2d(last, 1, 5, padding=2)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Score (B, 3, H, W) float32 images, real ones in [0, 1]: (B, 1, h, w) float32 logits.

        h is the smaller of `pooled_side` and H / 2**num_stages.

        Raises:
            ValueError: images of another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Discriminator wants images (B, 3, H, W); got {tuple(images.shape)}")
        x = self.block_in(images)
        for block in self.blocks:
            x = block(x)
        side = (min(self.pooled_side, x.shape[-2]), min(self.pooled_side, x.shape[-1]))
        return self.to_logits(F.adaptive_max_pool2d(x, side))
