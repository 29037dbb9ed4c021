"""Latents to codes: vector quantizer and VAE bottleneck, always in float32.

Upstream: modeling/quantizer/quantizer.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast.kernels.nearest_code import find_codes
from titok_fast.kernels.nearest_code_stats import nearest_code_stats


class VectorQuantizer(nn.Module):
    """Codebook of N rows with C channels; also MaskGIT-VQGAN's, without normalisation.

    The table stays float32 when the model is cast: in bfloat16 near ties would pick other ids.
    """

    def __init__(
        self, N: int, C: int, *, use_l2_norm: bool = False, commitment_cost: float = 0.25
    ) -> None:
        super().__init__()
        self.use_l2_norm, self.commitment_cost = use_l2_norm, commitment_cost
        self.embedding = nn.Embedding(N, C)
        nn.init.uniform_(self.embedding.weight, -1.0 / N, 1.0 / N)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VectorQuantizer":
        def keep_float32(t: Tensor) -> Tensor:
            moved = fn(t)
            if t.dtype == torch.float32 and moved.dtype in (torch.float16, torch.bfloat16):
                return t.to(moved.device)
            return moved

        super()._apply(keep_float32, recurse)
        return self

    @property
    def metric(self) -> str:
        """Name of the distance in the kernels."""
        return "cosine" if self.use_l2_norm else "euclidean"

    def nearest(self, rows: Tensor) -> Tensor:
        """(M, C) latents, any float dtype -> (M,) int64 ids of the nearest codes.

        A NaN gets some id; a training loss computed from the same latents is NaN too.
        """
        return find_codes(rows.float(), self.embedding.weight, self.metric, ids_only=False)

    def get_codebook_entry(self, ids: Tensor) -> Tensor:
        """(M,) ids -> (M, C) float32 codes, of unit length where the option is on."""
        codes = F.embedding(ids, self.embedding.weight)
        return F.normalize(codes, dim=-1) if self.use_l2_norm else codes

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize (B, C, H, W) latents of any float dtype, with a straight-through gradient.

        Returns:
            (B, C, H, W) float32 codes, and a dictionary: `min_encoding_indices` (B, H, W) int64,
            and the scalars `quantizer_loss` = `commitment_loss` + `codebook_loss`.
        """
        found = nearest_code_stats(
            z.float().permute(0, 2, 3, 1),  # (B, H, W, C)
            self.embedding.weight,
            metric=self.metric,
            beta=self.commitment_cost,
        )
        return found.quantized.permute(0, 3, 1, 2).contiguous(), {
            "quantizer_loss": found.commitment_loss + found.codebook_loss,
            "commitment_loss": found.commitment_loss,
            "codebook_loss": found.codebook_loss,
            "min_encoding_indices": found.ids,
        }


class DiagonalGaussian:
    """VAE bottleneck: a Gaussian per latent channel. Upstream: DiagonalGaussianDistribution."""

    def __init__(self, parameters: Tensor) -> None:
        """Split (B, 2C, 1, K) into mean (first C) and log-variance, clamped to [-30, 20]."""
        self.mean, logvar = parameters.float().chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)

    def sample(self) -> Tensor:
        """(B, C, 1, K) float32 draw. The noise is drawn on the device (upstream: on the CPU)."""
        # not randn_like: that fills in the order of the strides, and upstream's draw is contiguous
        return self.mean + self.std * torch.randn(self.mean.shape, device=self.mean.device)

    def mode(self) -> Tensor:
        """(B, C, 1, K) float32 mean."""
        return self.mean

    def kl(self) -> Tensor:
        """(B, K) divergence from the unit Gaussian, summed over channels."""
        return 0.5 * (self.mean**2 + self.var - 1.0 - self.logvar).sum(dim=[1, 2])
