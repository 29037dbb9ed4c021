"""A small classifier of 32 x 32 clothes: the feature space in which the small model is measured.

It replaces Inception where its weights are not available; results then carry the name below.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast.io.files import fetch, read_tensors
from titok_fast.models.weights import check_tensors, write_model

NAME = "fashion-classifier"
CLASSES = 10
SIDE = 32
_WIDTHS = (32, 64, 96)
_MEAN, _SPREAD = 0.22, 0.33  # of the training images, black border included


def _stage(c_in: int, c_out: int, kernel: int) -> nn.Sequential:
    """Convolution, GroupNorm, SiLU, half the side.

    Not BatchNorm: its running means do not follow a moving average of the weights, and its batch
    means would differ with the number of ranks.
    """
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(8, c_out), nn.SiLU(), nn.MaxPool2d(2))


class FashionClassifier(nn.Module):
    """Classifies ten kinds of clothes in grey images; 0.27 million parameters."""

    dim = 128

    def __init__(self) -> None:
        super().__init__()
        a, b, c = _WIDTHS
        self.body = nn.Sequential(_stage(1, a, 5), _stage(a, b, 3), _stage(b, c, 3))
        # not pooled over positions: they tell shirts from coats
        self.mix = nn.Sequential(nn.Flatten(), nn.Linear(c * (SIDE // 8) ** 2, self.dim), nn.SiLU())
        self.head = nn.Linear(self.dim, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """The features for FID: (B, 3, 32, 32) in [0, 1] -> (B, 128), the input of the last layer.

        Images of another shape are a ValueError.
        """
        if x.ndim != 4 or x.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(
                f"{NAME} wants images (B, 3, {SIDE}, {SIDE}) in [0, 1]; got {tuple(x.shape)}"
            )
        grey = x.to(self.head.weight.dtype).mean(dim=1, keepdim=True)
        return self.mix(self.body((grey - _MEAN) / _SPREAD))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) in [0, 1] -> (B, 10) logits."""
        return self.head(self.features(x))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (float32), each atomically.

        Raises:
            OSError: the directory cannot be written; files already there stay as they were.
        """
        config = {"model_type": NAME, "classes": CLASSES, "image_size": SIDE, "widths": _WIDTHS}
        write_model(directory, self.state_dict(), config)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: str | torch.device = "cpu"
    ) -> "FashionClassifier":
        """Load weights of `save_pretrained`, in eval mode and float32; sources as in `fetch`.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: a damaged file, or weights of another model.
        """
        weights, config_file = fetch(source)
        if config_file is not None:
            try:
                kind = json.loads(config_file.read_text(encoding="utf-8"))["model_type"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{config_file} does not describe a {NAME}: {error}") from error
            if kind != NAME:
                raise ValueError(f"{config_file} describes a {kind}; wanted a {NAME}")
        model, tensors = cls(), read_tensors(weights)
        check_tensors(tensors, model.state_dict(), weights)
        model.load_state_dict(tensors)
        return model.eval().to(device)


def classifier_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in float32: (B, 10) logits of any dtype, (B,) int64 labels -> scalar."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
