"""Prepare networks for inference on a CPU: weights in oneDNN's own layout, kernels folded once.

`pack` replaces the layers of a model in place. The new ones have no parameters: the model cannot be
trained, saved or moved. For float32 and bfloat16; cpu_int8.py has the same layers in 8 bits.
torch.compile with frozen weights reorders the same way, but needs half a minute for each shape, and
measured slower on these networks (waterfall).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast.models.blocks import Attention, Mlp, PostNormBlock, PreNormBlock
from titok_fast.models.vqgan import (
    NormSiLU,
    PixelDecoder,
    ResnetBlock,
    fold_phases,
    fold_shortcut,
    interleave_phases,
    uses_phases,
)
from titok_fast.models.weights import PretrainedModel
from titok_fast.processor.here import processor

_ROWS = 512  # a hint for the choice of layout; every number of rows is right


class Layers(NamedTuple):
    """The layers of one number format."""

    linear: Callable[[nn.Linear], nn.Module]
    mlp: Callable[[Mlp], nn.Module]
    conv: Callable[..., nn.Module]  # weight (O, C, k, k), bias (O,) or None, NormSiLU or None


class PackedLinear(nn.Module):
    """A Linear layer, with exact GELU after it where asked."""

    def __init__(self, layer: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        weight = layer.weight.detach()
        # no buffers: neither state dicts nor casts know this layout
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        self._bias = None if layer.bias is None else layer.bias.detach().clone()
        self.packed_bytes = weight.nbytes
        self._after: tuple[str, list[Any], str] = ("gelu", [], "none") if gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., E), dtype of the weights."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, *self._after)


class PackedMlp(nn.Module):
    """An Mlp whose GELU is applied while the matmul's results are still in registers."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.fc1, self.fc2 = PackedLinear(mlp.fc1, gelu=True), PackedLinear(mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(self.fc1(x))


class PackedConv(nn.Module):
    """A convolution with stride 1 and padding 1, and the NormSiLU before it if there is one."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, norm: NormSiLU | None = None
    ) -> None:
        super().__init__()
        self._weight = weight.detach().contiguous(memory_format=torch.channels_last)
        self._bias = None if bias is None else bias.detach().clone()
        self.packed_bytes = weight.nbytes
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H', W'), channels-last."""
        return F.conv2d(self.norm(x), self._weight, self._bias, padding=1)


class PackedResnetBlock(nn.Module):
    """A ResnetBlock whose shortcut is folded into its second kernel once."""

    def __init__(self, block: ResnetBlock, layers: Layers) -> None:
        super().__init__()
        self.adds_input = block.nin_shortcut is None
        kernel = block.conv2.weight
        if block.nin_shortcut is not None:
            kernel = fold_shortcut(kernel, block.nin_shortcut.weight)
        self.conv1 = layers.conv(block.conv1.weight, norm=block.norm1)
        self.conv2 = layers.conv(kernel, norm=block.norm2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H, W)."""
        h = self.conv2(self.conv1(x))
        return h.add_(x) if self.adds_input else h


class PackedUpsample(nn.Module):
    """Nearest x2 upsampling and its 3x3 convolution; the phase kernels are computed once."""

    def __init__(self, conv: nn.Conv2d, layers: Layers) -> None:
        super().__init__()
        assert conv.bias is not None
        self.phases = layers.conv(fold_phases(conv.weight), conv.bias.repeat(4))
        # for small images: keeping both costs under 1 % of a published model's memory
        self.whole = layers.conv(conv.weight, conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, 2H, 2W)."""
        if uses_phases(x):
            return interleave_phases(self.phases(x))
        return self.whole(F.interpolate(x, scale_factor=2.0))


PACKED_LAYERS = Layers(PackedLinear, PackedMlp, PackedConv)


def packed_layers(dtype: torch.dtype) -> Layers:
    """PACKED_LAYERS; linear layers stay as they are where the processor gains nothing."""
    if processor().packs(dtype):
        return PACKED_LAYERS
    return Layers(_same, _same, PackedConv)


def _same(module: nn.Module) -> nn.Module:
    return module


@torch.no_grad()
def pack(model: nn.Module, layers: Layers) -> None:
    """Replace the layers of all transformer blocks and pixel decoders inside `model`, in place.

    Raises:
        ValueError: the model is not on the CPU, or of another dtype.
    """
    first = next(model.parameters(), None)
    if first is None:
        return
    if first.device.type != "cpu" or first.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            "packed layers want a float32 or bfloat16 model on the CPU; got "
            f"{first.dtype} on {first.device}"
        )
    for module in list(model.modules()):
        part: Any = module  # its layers change their types
        if isinstance(module, Attention):
            part.qkv, part.proj = layers.linear(module.qkv), layers.linear(module.proj)
        elif isinstance(module, PreNormBlock | PostNormBlock):
            part.mlp = layers.mlp(module.mlp)
            if isinstance(module, PreNormBlock) and module.skip_linear is not None:
                part.skip_linear = layers.linear(module.skip_linear)
        elif isinstance(module, PixelDecoder):
            part.mid = nn.ModuleList(PackedResnetBlock(b, layers) for b in part.mid)
            for level in part.up:
                level.block = nn.ModuleList(PackedResnetBlock(b, layers) for b in level.block)
                if level.upsample_conv is not None:
                    level.upsample_conv = PackedUpsample(level.upsample_conv, layers)
        elif isinstance(module, PretrainedModel):
            module.inference_only = True
