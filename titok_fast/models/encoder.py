"""Image to latents: (B, 3, S, S) -> (B, C, 1, K). Upstream: TiTokEncoder."""

import torch
from torch import Tensor, nn

from titok_fast.config import TokenizerConfig
from titok_fast.models.blocks import PreNormBlock


class TiTokEncoder(nn.Module):
    """ViT over [class, patches, latent tokens]; the latent rows of its output are the latents.

    In the 2D variant each latent token is added to its patch, and the patch rows are the latents.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        D, layers, heads = config.encoder_size
        self.config, self.num_patches = config, config.encoder_grid**2
        scale, p = D**-0.5, config.vit_enc_patch_size
        self.patch_embed = nn.Conv2d(3, D, p, stride=p)
        self.class_embedding = nn.Parameter(scale * torch.randn(1, D))
        self.positional_embedding = nn.Parameter(scale * torch.randn(self.num_patches + 1, D))
        self.latent_token_positional_embedding = nn.Parameter(
            scale * torch.randn(config.num_latent_tokens, D)
        )
        self.ln_pre = nn.LayerNorm(D)
        self.transformer = nn.Sequential(*(PreNormBlock(D, heads, 4 * D) for _ in range(layers)))
        self.ln_post = nn.LayerNorm(D)
        channels = config.token_size * (2 if config.quantize_mode == "vae" else 1)
        self.conv_out = nn.Linear(D, channels)  # upstream's 1x1 convolution

    def forward(self, pixel_values: Tensor, latent_tokens: Tensor) -> Tensor:
        """(B, 3, S, S) images in [0, 1] and (K, D) latent tokens -> (B, C, 1, K) latents.

        Not normalised; for a VAE (B, 2C, 1, K) mean and log-variance. Images of another shape are a
        ValueError.
        """
        S, B = self.config.crop_size, pixel_values.shape[0]
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, S, S):
            raise ValueError(
                f"TiTok wants images (B, 3, {S}, {S}); got {tuple(pixel_values.shape)}. "
                f"titok_fast.io.images.to_tensor(images, {S}) resizes and crops"
            )
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)  # (B, P, D)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(B, 1, -1), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)  # (B, 1+P, D)
        latents = (latent_tokens + self.latent_token_positional_embedding).to(x.dtype)
        if self.config.is_2d:
            x = torch.cat([x[:, :1], x[:, 1:] + latents], dim=1)  # (B, 1+K, D)
        else:
            x = torch.cat([x, latents.expand(B, -1, -1)], dim=1)  # (B, 1+P+K, D)

        x = self.transformer(self.ln_pre(x))
        x = self.ln_post(x[:, -self.config.num_latent_tokens :])  # (B, K, D)

        if self.config.is_legacy:
            x = reread_as_channels_first(x)
        return self.conv_out(x).transpose(1, 2).unsqueeze(2)


def reread_as_channels_first(x: Tensor) -> Tensor:
    """(B, K, D) -> (B, K, D), the buffer re-read as (B, D, K), as the first TiTok weights expect.

    Not a transpose: values move between latents. Those weights were trained with it, so it is part
    of the model; single-stage models set `is_legacy=False`.
    """
    B, K, D = x.shape
    return x.reshape(B, D, K).transpose(1, 2)
