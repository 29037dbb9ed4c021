"""Losses of the tokenizer stages: proxy codes, and pixels with a discriminator. Always float32.

Upstream: modeling/modules/losses.py (ReconstructionLoss_Stage1, _Stage2, _Single_Stage); the
adaptive weight is Taming's, arXiv:2012.09841 equation 7. The generator's loss is in masking.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from titok_fast.distributed import rank_mean
from titok_fast.models.perceptual import perceptual
from titok_fast.models.quantizer import DiagonalGaussian
from titok_fast.training.discriminator import Discriminator
from titok_fast.training.recipe.sections import LossConfig

Logs = dict[str, Tensor]
_LARGEST_ADAPTIVE_WEIGHT = 1e4


def proxy_code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Stage 1: cross-entropy of the decoder's logits with MaskGIT-VQGAN's codes.

    Args:
        logits: (B, N, G, G), any float dtype.
        codes: (B, G*G) int64 in [0, N), row-major.

    Returns:
        Float32 scalar, the mean over all B * G * G codes.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.ndim != 4 or codes.shape != (logits.shape[0], logits.shape[2] * logits.shape[3]):
        got = f"{tuple(logits.shape)} and {tuple(codes.shape)}"
        raise ValueError(f"proxy_code_loss wants logits (B, N, G, G), codes (B, G*G); got {got}")
    with torch.autocast(logits.device.type, enabled=False):
        # the decoder's logits are channels last in memory, so only the conversion to float32 copies
        rows = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]).float()
        return F.cross_entropy(rows, codes.reshape(-1))


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Scalar loss of a discriminator from its logits, any shapes."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


class ReconstructionLoss(nn.Module):
    """Stage 2, single stage, MaskGIT-VQGAN and Taming's recipe: pixels, features, discriminator.

    total = w_r * reconstruction / exp(logvar) + w_p * perceptual + w_q * quantizer (or w_kl * KL)
    + factor * w_d * lambda * (-mean D(reconstruction)); the factor is 0 before discriminator_start,
    lambda is 1 unless adaptive, exp(logvar) is 1 for VQ. Holds the discriminator (published names)
    and LeCam's moving averages; the frozen perceptual network is not part of its state_dict. LeCam
    and the adaptive weight use means over ranks, so the result does not depend on the number of
    ranks; upstream's ranks each use their own means.

    Raises:
        ValueError, FileNotFoundError, ImportError: see `perceptual` and `Discriminator`.
    """

    ema_real_logits_mean: Tensor
    ema_fake_logits_mean: Tensor

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        name = config.perceptual_loss if config.perceptual_weight > 0 else "none"
        self.perceptual = perceptual(name, config.perceptual_weights_file)
        self.discriminator = Discriminator(
            config.discriminator_channels, pooled_side=config.discriminator_pool
        )
        if config.lecam_regularization_weight > 0:
            self.register_buffer("ema_real_logits_mean", torch.zeros(1))
            self.register_buffer("ema_fake_logits_mean", torch.zeros(1))
        self.register_state_dict_post_hook(_drop_perceptual)
        self.register_load_state_dict_post_hook(_ignore_missing_perceptual)

    def discriminator_acts(self, step: int) -> bool:
        """Whether the discriminator scores images and learns at this update, counted from 0."""
        return step >= self.config.discriminator_start

    def _factor(self, step: int) -> float:
        return self.config.discriminator_factor if self.discriminator_acts(step) else 0.0

    def generator_loss(
        self,
        images: Tensor,
        reconstructions: Tensor,
        step: int,
        bottleneck: Mapping[str, Tensor] | DiagonalGaussian,
        last_layer: Tensor | None = None,
    ) -> tuple[Tensor, Logs]:
        """Loss of the tokenizer.

        Args:
            images: (B, 3, S, S) in [0, 1].
            reconstructions: the same shape, not clamped.
            step: update, counted from 0.
            bottleneck: second value of `TiTok.encode`: the quantizer's losses, or the Gaussian.
            last_layer: weight of the last layer, for the adaptive weight only, which is 1 without
                gradients (evaluation).

        Returns:
            Float32 scalar; detached scalars under upstream's names, weights included.

        Raises:
            ValueError: shapes differ, or `last_layer` is missing where it is needed.
        """
        cfg = self.config
        _check_pair(images, reconstructions)
        with torch.autocast(images.device.type, enabled=False):
            x, y = images.float(), reconstructions.float()
            distance = F.l1_loss if cfg.reconstruction_loss == "l1" else F.mse_loss
            reconstruction = distance(x, y) * cfg.reconstruction_weight
            if isinstance(bottleneck, DiagonalGaussian):
                variance = torch.full_like(reconstruction, cfg.logvar_init).exp()
                reconstruction = reconstruction / variance
                kl = cfg.kl_weight * (bottleneck.kl().sum() / len(x))
                regular, logs = kl, {"kl_loss": kl}
            else:
                regular = cfg.quantizer_weight * bottleneck["quantizer_loss"].float()
                logs = {"quantizer_loss": regular} | {
                    k: bottleneck[k] for k in ("commitment_loss", "codebook_loss")
                }
            features = cfg.perceptual_weight * self.perceptual(x, y)
            gan, weight, factor = self._gan_term(y, step, reconstruction + features, last_layer)
            total = reconstruction + features + regular + weight * factor * gan
        logs |= {
            "total_loss": total,
            "reconstruction_loss": reconstruction,
            "perceptual_loss": features,
            "gan_loss": gan,
            "weighted_gan_loss": weight * factor * gan,
            "discriminator_factor": torch.full_like(gan, factor),
            "d_weight": weight,
        }
        return total, {name: value.detach() for name, value in logs.items()}

    def discriminator_loss(
        self, images: Tensor, reconstructions: Tensor, step: int
    ) -> tuple[Tensor, Logs]:
        """Loss of the discriminator: hinge plus LeCam, whose averages move in training mode.

        Args:
            images: (B, 3, S, S) in [0, 1].
            reconstructions: of `generator_loss`; no gradient goes to them.
            step: update, counted from 0. Before discriminator_start the hinge counts 0.

        Returns:
            Float32 scalar; detached scalars under upstream's names.

        Raises:
            ValueError: shapes differ.
        """
        cfg = self.config
        _check_pair(images, reconstructions)
        with torch.autocast(images.device.type, enabled=False):
            # two calls, as published: one call on both would double the peak memory
            real = self.discriminator(images.detach().float())
            fake = self.discriminator(reconstructions.detach().float())
            loss = self._factor(step) * hinge_loss(real, fake)
            lecam = torch.zeros_like(loss)
            if cfg.lecam_regularization_weight > 0:
                lecam = self._lecam(real.mean(), fake.mean()) * cfg.lecam_regularization_weight
            loss = loss + lecam
        logs = {
            "discriminator_loss": loss,
            "logits_real": real.mean(),
            "logits_fake": fake.mean(),
            "lecam_loss": lecam,
        }
        return loss, {name: value.detach() for name, value in logs.items()}

    def _gan_term(
        self, y: Tensor, step: int, plain: Tensor, last_layer: Tensor | None
    ) -> tuple[Tensor, Tensor, float]:
        """(-mean D(y), its weight, its factor); 0 before the discriminator acts."""
        cfg = self.config
        factor = self._factor(step)
        gan, weight = y.new_zeros(()), y.new_full((), cfg.discriminator_weight)
        if factor == 0 or cfg.discriminator_weight == 0:
            return gan, weight, factor
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        gan = -functional_call(self.discriminator, frozen, (y,)).mean()
        if cfg.adaptive_discriminator_weight and torch.is_grad_enabled():
            if last_layer is None:
                raise ValueError(
                    "losses.adaptive_discriminator_weight needs last_layer: the weight of the last "
                    "layer before the pixels"
                )
            weight = weight * self._adaptive(plain, gan, last_layer)
        return gan, weight, factor

    def _adaptive(self, plain: Tensor, gan: Tensor, last_layer: Tensor) -> Tensor:
        """Ratio of the two gradients' norms at the last layer, itself without gradient."""
        (g_plain,) = torch.autograd.grad(plain, last_layer, retain_graph=True)
        (g_gan,) = torch.autograd.grad(gan, last_layer, retain_graph=True)
        g_plain, g_gan = rank_mean(g_plain), rank_mean(g_gan)
        ratio = g_plain.float().norm() / (g_gan.float().norm() + 1e-4)
        return ratio.clamp(0.0, _LARGEST_ADAPTIVE_WEIGHT)

    def _lecam(self, real: Tensor, fake: Tensor) -> Tensor:
        """LeCam on batch means, with the averages of before this batch; then moves them."""
        real, fake = rank_mean(real), rank_mean(fake)
        ema_real, ema_fake = self.ema_real_logits_mean, self.ema_fake_logits_mean
        loss = F.relu(real - ema_fake).square().mean() + F.relu(ema_real - fake).square().mean()
        if self.training:
            self.ema_real_logits_mean = self._moved(ema_real, real)
            self.ema_fake_logits_mean = self._moved(ema_fake, fake)
        return loss

    def _moved(self, ema: Tensor, mean: Tensor) -> Tensor:
        decay = self.config.lecam_ema_decay
        moved = ema * decay + mean.detach() * (1 - decay)
        # the loop skips the update of a NaN, but a NaN in this average would stay
        return torch.where(moved.isfinite(), moved, ema)


def _check_pair(images: Tensor, reconstructions: Tensor) -> None:
    if images.shape != reconstructions.shape or images.ndim != 4:
        got = f"{tuple(images.shape)} and {tuple(reconstructions.shape)}"
        raise ValueError(f"the losses want images and reconstructions (B, 3, S, S); got {got}")


def _drop_perceptual(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [k for k in state if k.startswith(f"{prefix}perceptual.")]:
        del state[key]


def _ignore_missing_perceptual(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [k for k in keys.missing_keys if "perceptual." not in k]
