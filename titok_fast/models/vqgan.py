"""MaskGIT-VQGAN: a convolutional 2D tokenizer, 16x down, whose decoder ends two-stage TiTok.

Upstream: modeling/modules/maskgit_vqgan.py. Activations are channels-last, except in a narrow
network on a CPU. Two exact rewrites save work, at each call so that weights stay as published: the
shortcut folds into the second kernel of its block, and nearest upsampling into the 3x3 convolution
after it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast.config import VQGANConfig
from titok_fast.kernels.group_norm_silu import group_norm_silu
from titok_fast.models.quantizer import VectorQuantizer
from titok_fast.models.weights import PretrainedModel

# Below this many input pixels, folding the 3x3 kernel costs more than it saves (measured on CPU at
# 512 channels and 16 x 16). By image, not batch, so that an image does not depend on its batch.
PHASES_FROM_PIXELS = 32 * 32


class NormSiLU(nn.GroupNorm):
    """GroupNorm (32 groups, eps 1e-6), then SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return group_norm_silu(x, self.weight, self.bias, groups=32, eps=self.eps)


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions. Where channels change, the input is *not* added back.

    There the shortcut convolution acts on the block's own result h, giving h + W h. The published
    weights were trained this way (as in google-research/maskgit); W folds into the second kernel.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = NormSiLU(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.norm2 = NormSiLU(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        changes = c_in != c_out
        self.nin_shortcut = nn.Conv2d(c_out, c_out, 1, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H, W)."""
        h = self.norm2(self.conv1(self.norm1(x)))
        if self.nin_shortcut is None:
            return x + self.conv2(h)
        folded = _formatted(fold_shortcut(self.conv2.weight, self.nin_shortcut.weight), h)
        return F.conv2d(h, folded.to(h.dtype), padding=1)


class UpsampleConv(nn.Conv2d):
    """Nearest x2 upsampling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        assert self.bias is not None
        return upsample_conv(x, self.weight, self.bias)


class Level(nn.Module):
    """The blocks of one resolution; `upsample_conv` only in decoder levels above the finest."""

    def __init__(self, c_in: int, c_out: int, blocks: int, *, upsample: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(c_in if j == 0 else c_out, c_out) for j in range(blocks)
        )
        self.upsample_conv = UpsampleConv(c_out) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H, W), twice the size where the level upsamples."""
        for block in self.block:
            x = block(x)
        return x if self.upsample_conv is None else self.upsample_conv(x)


class PixelEncoder(nn.Module):
    """(B, 3, S, S) -> (B, z_channels, G, G), not quantized."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, deepest = config.widths, config.widths[-1]
        self.conv_in = nn.Conv2d(3, config.hidden_channels, 3, padding=1, bias=False)
        entering = (config.hidden_channels, *widths[:-1])
        self.down = nn.ModuleList(
            Level(a, b, config.num_res_blocks) for a, b in zip(entering, widths, strict=True)
        )
        self.mid = nn.ModuleList(
            ResnetBlock(deepest, deepest) for _ in range(config.num_res_blocks)
        )
        self.norm_out = NormSiLU(deepest)
        self.conv_out = nn.Conv2d(deepest, config.z_channels, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] -> (B, z_channels, G, G)."""
        x = self.conv_in(_laid_out(pixels, self.conv_in))
        for i, level in enumerate(self.down):
            x = level(x)
            if i + 1 < len(self.down):
                x = F.avg_pool2d(x, 2)
        for block in self.mid:
            x = block(x)
        return self.conv_out(self.norm_out(x))


class PixelDecoder(nn.Module):
    """(B, z_channels, G, G) -> (B, 3, S, S), not clamped. Levels run from the coarsest to 0."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, deepest = config.widths, config.widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, deepest, 3, padding=1)
        self.mid = nn.ModuleList(
            ResnetBlock(deepest, deepest) for _ in range(config.num_res_blocks)
        )
        entering = (*widths[1:], deepest)
        self.up = nn.ModuleList(
            Level(a, b, config.num_res_blocks, upsample=i > 0)
            for i, (a, b) in enumerate(zip(entering, widths, strict=True))
        )
        self.norm_out = NormSiLU(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, z_channels, G, G) -> (B, 3, S, S)."""
        if codes.device.type == "cpu" and codes.shape[0] > 1 and not torch.is_grad_enabled():
            # one image's activations fit the cache: 16 % faster, and a fraction of the memory
            return torch.cat([self._decode(one) for one in codes.split(1)])
        return self._decode(codes)

    def compile(self, **options: Any) -> None:
        """Compile in place, for the shapes that `forward` runs: on a CPU one image at a time."""
        self._decode = torch.compile(self._decode, **options)  # type: ignore[method-assign]

    def _decode(self, codes: Tensor) -> Tensor:
        x = self.conv_in(_laid_out(codes, self.conv_in))
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x))


class MaskGitVQGAN(PretrainedModel):
    """The published tokenizer `maskgit-vqgan-imagenet-f16-256`: image <-> 256 codes.

    Upstream: PretrainedTokenizer. Stage 1 takes its proxy codes from here.
    """

    config_class = VQGANConfig

    def __init__(self, config: VQGANConfig | None = None) -> None:
        super().__init__()
        self.config = config or VQGANConfig()
        self.encoder = PixelEncoder(self.config)
        self.decoder = PixelDecoder(self.config)
        self.quantize = VectorQuantizer(self.config.codebook_size, self.config.z_channels)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] -> (B, G*G) int64 codes, row-major."""
        f = self.config.downsampling
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(
                f"MaskGitVQGAN wants images (B, 3, H, W), sides multiples of {f}; "
                f"got {tuple(x.shape)}"
            )
        z = self.encoder(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, G*G, C)
        return self.quantize.nearest(z.reshape(-1, z.shape[-1])).view(z.shape[:2])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(B, G*G) or (B, h, w) codes -> (B, 3, S, S) clamped to [0, 1].

        Raises:
            ValueError: flat codes that form no square, or a code outside the codebook.
        """
        return self.decode_unclamped(codes).clamp(0.0, 1.0)

    def decode_unclamped(self, codes: Tensor) -> Tensor:
        """As `decode`, without the clamp."""
        N, side = self.config.codebook_size, round(codes.shape[-1] ** 0.5)
        if codes.ndim == 2 and side * side == codes.shape[1]:
            codes = codes.view(-1, side, side)
        if codes.ndim != 3:
            raise ValueError(
                f"MaskGitVQGAN wants codes (B, G*G) or (B, h, w); got {tuple(codes.shape)}"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < N:
            raise ValueError(
                f"MaskGitVQGAN codes lie in 0..{N - 1}; got {int(codes.min())}..{int(codes.max())}"
            )
        rows = self.quantize.get_codebook_entry(codes.reshape(-1))
        grid = rows.view(*codes.shape, self.config.z_channels).permute(0, 3, 1, 2)
        return self.decoder(grid.to(self.decoder.conv_in.weight.dtype))

    decode_tokens = decode


def _laid_out(x: Tensor, first: nn.Conv2d) -> Tensor:
    """X in the memory format that is fastest for a network with the first layer `first`.

    PyTorch's CPU GroupNorm takes one group at a time in channels-last memory: with fewer than four
    channels in each it is up to 20 times slower there (128 x 32 x 32 x 32 in bfloat16, backward).
    """
    narrow = x.is_cpu and first.out_channels < 128
    return x.contiguous() if narrow else _channels_last(x)


def _formatted(x: Tensor, like: Tensor) -> Tensor:
    """Channels-last `x` in the format of `like`, which a convolution by `x` would not keep."""
    return x if like.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest x2 upsampling, then a 3x3 convolution: (B, C, H, W) -> (B, O, 2H, 2W).

    Of an output pixel's 9 weights some meet the same input pixel: adding those weights first
    leaves a 2x2 convolution for each of the four output phases, 4/9 of the multiplications.
    Keeps the memory format of x.
    """
    if not uses_phases(x):
        return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    kernels = _formatted(fold_phases(weight.to(x.dtype)), x)
    return _formatted(interleave_phases(F.conv2d(x, kernels, bias.repeat(4), padding=1)), x)


def uses_phases(x: Tensor) -> bool:
    """Whether upsampling (B, C, H, W) uses phases, see PHASES_FROM_PIXELS."""
    return x.shape[2] * x.shape[3] >= PHASES_FROM_PIXELS


def fold_shortcut(kernel: Tensor, shortcut: Tensor) -> Tensor:
    """W2 and W to (I + W) W2: (O, C, 3, 3) and (O, O, 1, 1) -> (O, C, 3, 3), channels-last."""
    wide = kernel.float()
    folded = wide + torch.einsum("om,mihw->oihw", shortcut.float()[:, :, 0, 0], wide)
    return _channels_last(folded.to(kernel.dtype))


def fold_phases(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (4 * O, C, 2, 2), the kernels of the four phases, channels-last."""
    O, C = weight.shape[:2]
    fold = _phase_fold(weight.device, weight.dtype)
    kernels = (weight.reshape(O * C, 9) @ fold).view(O, C, 4, 2, 2)
    return _channels_last(kernels.permute(2, 0, 1, 3, 4).reshape(4 * O, C, 2, 2))


def interleave_phases(windows: Tensor) -> Tensor:
    """Output (B, 4O, H + 1, W + 1) of the phase kernels -> (B, O, 2H, 2W), channels-last.

    Phase (a, b) takes the windows that start at (a, b).
    """
    B, O, H, W = windows.shape[0], windows.shape[1] // 4, windows.shape[2] - 1, windows.shape[3] - 1
    windows = windows.permute(0, 2, 3, 1)
    out = windows.new_empty(B, H, 2, W, 2, O)
    for i in range(4):
        a, b = divmod(i, 2)
        out[:, :, a, :, b] = windows[:, a : a + H, b : b + W, i * O : (i + 1) * O]
    return out.view(B, 2 * H, 2 * W, O).permute(0, 3, 1, 2)


def _phase_fold(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(9, 16): a 3x3 kernel to the 2x2 kernels of the four output phases.

    Along a side, the even output pixel sees [a, b + c], the odd one [a + b, c].
    """
    side = torch.tensor(
        [[[1, 0], [0, 1], [0, 1]], [[1, 0], [1, 0], [0, 1]]], device=device, dtype=dtype
    )  # (phase, tap of 3, tap of 2)
    return torch.einsum("pka,qlb->klpqab", side, side).reshape(9, 16)
