"""Two transformers that no library has, as plain classes on our own blocks."""

import torch
from torch import Tensor, nn

from titok_fast.models.blocks import PreNormBlock

CLASSES = 1000


class UViT(nn.Module):
    """U-ViT: time, class and patches as tokens, the second half merging the first (Bao 2023)."""

    def __init__(self, D: int, depth: int, heads: int, side: int, patch: int) -> None:
        super().__init__()
        self.patch, self.grid, self.D = patch, side // patch, D
        self.embed = nn.Conv2d(4, D, patch, stride=patch)
        self.label = nn.Embedding(CLASSES + 1, D)
        self.pos = nn.Parameter(torch.empty(1, 2 + self.grid**2, D))

        def blocks(count: int, skip: bool = False) -> nn.ModuleList:
            return nn.ModuleList(
                PreNormBlock(D, heads, 4 * D, qkv_bias=False, skip=skip) for _ in range(count)
            )

        self.first, self.middle = blocks(depth // 2), blocks(1)
        self.last = blocks(depth // 2, skip=True)
        self.norm, self.out = nn.LayerNorm(D), nn.Linear(D, 4 * patch * patch)

    def forward(self, z: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """(B, 4, side, side), (B,), (B,) -> (B, 4, side, side)."""
        B, half = len(z), self.D // 2
        rates = torch.exp(torch.arange(half, device=z.device) * (-9.21 / half))  # to 1e-4
        angles = times[:, None].float() * rates
        time = torch.cat([angles.cos(), angles.sin()], dim=1).to(z.dtype)
        patches = self.embed(z).flatten(2).transpose(1, 2)
        x = torch.cat([time[:, None], self.label(labels)[:, None], patches], dim=1) + self.pos
        skips = []
        for block in self.first:
            x = block(x)
            skips.append(x)
        x = self.middle[0](x)
        for block in self.last:
            x = block(x, skips.pop())
        x = self.out(self.norm(x))[:, 2:]
        x = x.view(B, self.grid, self.grid, self.patch, self.patch, 4)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, 4, *z.shape[2:])


class ViTDecoder(nn.Module):
    """ViT-VQGAN's decoder: codes to 8 x 8 pixels each."""

    def __init__(self, C: int, D: int, layers: int, heads: int, grid: int) -> None:
        super().__init__()
        self.embed, self.pos = nn.Linear(C, D), nn.Parameter(torch.empty(1, grid * grid, D))
        self.blocks = nn.ModuleList(PreNormBlock(D, heads, 4 * D) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * 8 * 8)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, grid, grid) -> (B, 3, 8 * grid, 8 * grid)."""
        B, _, grid, _ = z.shape
        x = self.embed(z.flatten(2).transpose(1, 2)) + self.pos
        for block in self.blocks:
            x = block(x)
        x = self.out(self.norm(x)).view(B, grid, grid, 8, 8, 3)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, 3, 8 * grid, 8 * grid)
