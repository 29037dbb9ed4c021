"""Codes to proxy-code logits or pixels: (B, C, 1, K) -> (B, 1024, G, G) or (B, 3, S, S).

Upstream: TiTokDecoder. For 512 px, never released by upstream, a token covers 32 pixels but a
MaskGIT-VQGAN code covers 16: there the legacy head predicts the 2 x 2 codes under each token, by
the same 1x1 convolutions with four times the logits. The paper's 512 px throughput (0.40 of 256 px)
agrees with such a 16 x 16 ViT before a 512 px pixel decoder, not with a ViT over 32 x 32 tokens.
"""

import torch
from torch import Tensor, nn

from titok_fast.config import TokenizerConfig
from titok_fast.models.blocks import PreNormBlock


class TiTokDecoder(nn.Module):
    """ViT over [class, mask tokens, latents]; the rows of the mask tokens become the image.

    In the 2D variant each latent is added to the mask token of its position.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        D, layers, heads = config.decoder_size
        self.config, self.num_patches = config, config.decoder_grid**2
        scale, p = D**-0.5, config.vit_dec_patch_size
        self.decoder_embed = nn.Linear(config.token_size, D)
        self.class_embedding = nn.Parameter(scale * torch.randn(1, D))
        self.positional_embedding = nn.Parameter(scale * torch.randn(self.num_patches + 1, D))
        self.mask_token = nn.Parameter(scale * torch.randn(1, 1, D))
        self.latent_token_positional_embedding = nn.Parameter(
            scale * torch.randn(config.num_latent_tokens, D)
        )
        self.ln_pre = nn.LayerNorm(D)
        self.transformer = nn.Sequential(*(PreNormBlock(D, heads, 4 * D) for _ in range(layers)))
        self.ln_post = nn.LayerNorm(D)
        if config.is_legacy:  # upstream's 1x1 convolutions, here on rows
            logits = config.pixel.codebook_size * config.proxy_block**2
            self.ffn = nn.Sequential(nn.Linear(D, 2 * D), nn.Tanh(), nn.Linear(2 * D, logits))
        else:
            self.ffn = nn.Sequential(nn.Linear(D, 3 * p * p))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, z_quantized: Tensor) -> Tensor:
        """(B, C, 1, K) codes -> (B, 1024, G, G) proxy-code logits (legacy), or (B, 3, S, S) pixels.

        Pixels are not clamped. Codes of another shape are a ValueError.
        """
        K, C = self.config.num_latent_tokens, self.config.token_size
        if z_quantized.ndim != 4 or z_quantized.shape[1:] != (C, 1, K):
            raise ValueError(
                f"TiTok decoder wants codes (B, {C}, 1, {K}); got {tuple(z_quantized.shape)}"
            )
        B = z_quantized.shape[0]
        x = self.decoder_embed(z_quantized.squeeze(2).transpose(1, 2))  # (B, K, D)
        x = x + self.latent_token_positional_embedding.to(x.dtype)
        first = torch.cat([self.class_embedding, self.mask_token[0].expand(self.num_patches, -1)])
        first = (first + self.positional_embedding).to(x.dtype)  # (1+P, D), the same for all images
        if self.config.is_2d:
            x = torch.cat([first[:1].expand(B, -1, -1), first[1:] + x], dim=1)  # (B, 1+K, D)
        else:
            x = torch.cat([first.expand(B, -1, -1), x], dim=1)  # (B, 1+P+K, D)

        x = self.transformer(self.ln_pre(x))
        x = self.ffn(self.ln_post(x[:, 1 : 1 + self.num_patches]))  # (B, P, channels)
        if self.config.is_legacy:
            return unfold_tokens(x, self.config.decoder_grid, self.config.proxy_block)
        x = unfold_tokens(x, self.config.decoder_grid, self.config.vit_dec_patch_size)
        return self.conv_out(x)


def unfold_tokens(x: Tensor, grid: int, p: int) -> Tensor:
    """(B, grid*grid, p*p*c) -> (B, c, grid*p, grid*p): each token becomes a p x p square.

    Within a token the c channels of a pixel are adjacent; pixel_shuffle expects another order.
    """
    B, _, channels = x.shape
    x = x.view(B, grid, grid, p, p, channels // (p * p)).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, channels // (p * p), grid * p, grid * p)
