"""TiTok: image -> K tokens -> image, composed of the other files. Upstream: modeling/titok.py."""

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from titok_fast.config import TokenizerConfig
from titok_fast.kernels.soft_codes import soft_codes
from titok_fast.models.blocks import set_attention
from titok_fast.models.decoder import TiTokDecoder
from titok_fast.models.encoder import TiTokEncoder
from titok_fast.models.quantizer import DiagonalGaussian, VectorQuantizer
from titok_fast.models.vqgan import PixelDecoder
from titok_fast.models.weights import PretrainedModel

Config = TokenizerConfig | Mapping[str, Any] | DictConfig  # the last two in the official form


class TiTok(PretrainedModel):
    """The tokenizer, all published variants. `attention` names a back end of attention.py."""

    config_class = TokenizerConfig

    def __init__(self, config: Config, *, attention: str | None = None) -> None:
        super().__init__()
        self.config: TokenizerConfig = self._as_config(config)
        cfg, D = self.config, self.config.encoder_size[0]
        self.encoder = TiTokEncoder(cfg)
        self.decoder = TiTokDecoder(cfg)
        self.latent_tokens = nn.Parameter(D**-0.5 * torch.randn(cfg.num_latent_tokens, D))
        self.apply(_init_weights)
        if cfg.quantize_mode == "vq":
            self.quantize = VectorQuantizer(
                cfg.codebook_size,
                cfg.token_size,
                use_l2_norm=cfg.use_l2_norm,
                commitment_cost=cfg.commitment_cost,
            )
        if cfg.finetune_decoder:  # stage 2: everything before the codes is frozen
            self.latent_tokens.requires_grad_(False)
            self.encoder.requires_grad_(False)
            self.quantize.requires_grad_(False)
            self.pixel_quantize = VectorQuantizer(cfg.pixel.codebook_size, cfg.pixel.z_channels)
            self.pixel_decoder = PixelDecoder(cfg.pixel)
        set_attention(self, attention)

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights (codebooks are always float32)."""
        return self.latent_tokens.dtype

    def encode(self, x: Tensor) -> tuple[Tensor, Any]:
        """Images to codes.

        Args:
            x: (B, 3, S, S) in [0, 1], S = crop_size.

        Returns:
            VQ: (B, C, 1, K) float32 codes and a dictionary with `min_encoding_indices` (B, 1, K)
            int64 and the quantizer's losses (0 in a stage-2 model, whose encoder is frozen).
            VAE: a (B, C, 1, K) float32 draw and the DiagonalGaussian it came from.

        Raises:
            ValueError: images of another shape.
        """
        if not self.config.finetune_decoder:
            return self._encode(x)
        with torch.no_grad():
            z, result = self._encode(x)
        return z, {k: v * 0 if k.endswith("loss") else v for k, v in result.items()}

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        z = self.encoder(x.to(self.dtype), self.latent_tokens)
        if self.config.quantize_mode == "vae":
            posterior = DiagonalGaussian(z)
            return posterior.sample(), posterior
        return self.quantize(z)

    def decode(self, z_quantized: Tensor) -> Tensor:
        """(B, C, 1, K) codes of any float dtype -> (B, 3, S, S) pixels, not clamped.

        In the weights' dtype. A stage-1 model (legacy head, no pixel decoder) returns proxy-code
        logits (B, 1024, G, G).
        """
        x = self.decoder(z_quantized.to(self.dtype))
        if not self.config.finetune_decoder:
            return x
        return self.pixel_decoder(expected_codes(x, self.pixel_quantize.embedding.weight))

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """As `decode`, from (B, K) or (B, 1, K) integer ids; for a VAE from a (B, C, 1, K) latent.

        Raises:
            ValueError: another number of tokens, or an id outside the codebook.
        """
        return self.decode(self.codes(tokens))

    def codes(self, tokens: Tensor) -> Tensor:
        """The (B, C, 1, K) input of the decoder for the tokens of `decode_tokens`, checked."""
        cfg = self.config
        if cfg.quantize_mode == "vae":
            return tokens
        ids = tokens.squeeze(1) if tokens.ndim == 3 else tokens
        if ids.ndim != 2 or ids.shape[1] != cfg.num_latent_tokens or ids.is_floating_point():
            raise ValueError(
                f"this TiTok wants integer ids (B, {cfg.num_latent_tokens}); "
                f"got {tuple(tokens.shape)} {tokens.dtype}"
            )
        if ids.numel() and not torch.compiler.is_compiling():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= cfg.codebook_size:
                raise ValueError(
                    f"token ids lie in 0..{cfg.codebook_size - 1}; got {low}..{high} "
                    f"({cfg.codebook_size} is the mask: was sampling finished?)"
                )
        return self.lookup(ids.long())

    def lookup(self, ids: Tensor) -> Tensor:
        """(B, K) valid int64 ids -> (B, C, 1, K) float32 codes. No check, so no host wait."""
        codes = self.quantize.get_codebook_entry(ids.reshape(-1))
        return codes.view(*ids.shape, self.config.token_size).transpose(1, 2).unsqueeze(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """Reconstruct: `decode` of `encode`, with the second value of `encode`."""
        z_quantized, result = self.encode(x)
        return self.decode(z_quantized), result


def expected_codes(logits: Tensor, codebook: Tensor) -> Tensor:
    """(B, N, H, W) logits and (N, C) codes -> (B, C, H, W) expected codes, not their argmax."""
    B, N, H, W = logits.shape
    rows = logits.permute(0, 2, 3, 1).reshape(B * H * W, N)
    return soft_codes(rows, codebook).view(B, H, W, codebook.shape[1]).permute(0, 3, 1, 2)


def _init_weights(module: nn.Module) -> None:
    """Upstream's: truncated normal 0.02, zero biases; fused qkv as Xavier (torch's attention)."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    qkv = getattr(module, "qkv", None)
    if isinstance(qkv, nn.Linear):  # after its children, which apply() visits first
        nn.init.xavier_uniform_(qkv.weight)
