"""Reconstruction figures: PSNR and SSIM, features, codes, and what a perfect tokenizer gets."""

import math

import numpy as np
import pytest
import torch
from support.tiny_models import TINY_VQGAN, rebuilt, tiny_tokenizer
from torch import Tensor, nn

from titok_fast import MaskGitVQGAN
from titok_fast.evaluation.networks import FashionFeatures, FeatureNetwork
from titok_fast.evaluation.pictures import ArrayPictures
from titok_fast.evaluation.reconstruction import evaluate_reconstruction, psnr, reconstructor, ssim
from titok_fast.evaluation.statistics import FeatureSums, frechet_distance
from titok_fast.io.images import to_uint8
from titok_fast.models.classifier import FashionClassifier

pytest.importorskip("torchmetrics", reason="extra eval")

RNG = np.random.default_rng(1)
PICTURES = ArrayPictures(RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8), np.arange(12) % 10)
PIXELS = torch.from_numpy(PICTURES.images)


def noisy(images: Tensor) -> tuple[Tensor, Tensor]:
    """A bad tokenizer: deterministic noise on the pictures, and ids 0..5."""
    drawn = torch.Generator().manual_seed(int(images.sum()))
    return images + 0.1 * torch.randn(images.shape, generator=drawn), torch.arange(6).repeat(2)


class Means(FeatureNetwork):
    """Features one can compute by hand, under the name that may be called FID."""

    def __init__(self, name: str = "inception") -> None:
        super().__init__(name, 3, 3, labelled=False)
        self.weight = nn.Parameter(torch.zeros(()))

    def _measure(self, images: Tensor) -> tuple[Tensor, Tensor]:
        means = images.double().mean(dim=(2, 3))
        return means, means


def test_psnr_by_hand() -> None:
    a = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    b = a.clone()
    b[1, 0, 0, 0] = 255  # one of 48 values is wrong by all there is
    assert psnr(a, b).tolist() == [math.inf, pytest.approx(10 * math.log10(48))]
    b[1] = 16
    assert float(psnr(a, b)[1]) == pytest.approx(20 * math.log10(255 / 16))


def test_ssim_against_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    made = to_uint8(noisy(PIXELS.permute(0, 3, 1, 2) / 255)[0], rounding="round")
    ours = ssim(PIXELS, made)
    for i in range(3):
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        pair = PIXELS[i].numpy(), made[i].numpy()
        theirs = metrics.structural_similarity(*pair, channel_axis=-1, data_range=255, **window)
        assert float(ours[i]) == pytest.approx(theirs, abs=1e-10)
    assert ssim(PIXELS[:1], PIXELS[:1]).tolist() == [pytest.approx(1.0)]


def test_ssim_wants_room_for_its_window() -> None:
    with pytest.raises(ValueError, match="at least 11"):
        ssim(PIXELS[:, :10], PIXELS[:, :10])


def test_figures_of_a_perfect_tokenizer() -> None:
    network = FashionFeatures(FashionClassifier().eval())
    figures = evaluate_reconstruction(
        lambda images: (images, None), PICTURES, networks=[network], batch_size=5
    )
    assert figures["images"] == 12
    assert figures["psnr"] == math.inf
    assert figures["ssim"] == pytest.approx(1.0)
    assert figures["fid[fashion-classifier]"] == pytest.approx(0.0, abs=1e-6)
    before, after = (
        figures[f"accuracy_{part}[fashion-classifier]"] for part in ("originals", "reconstructions")
    )
    assert before == after
    assert "rFID" not in figures
    assert "codebook_usage" not in figures


def test_figures_by_hand() -> None:
    figures = evaluate_reconstruction(
        noisy, PICTURES, codebook_size=8, networks=[Means()], batch_size=12, floor=True
    )
    made = to_uint8(noisy(PIXELS.permute(0, 3, 1, 2).float() / 255)[0], rounding="round")
    assert figures["psnr"] == pytest.approx(float(psnr(PIXELS, made).mean()))
    assert figures["ssim"] == pytest.approx(float(ssim(PIXELS, made).mean()))
    assert figures["codebook_usage"] == 6 / 8
    assert figures["codebook_entropy_bits"] == pytest.approx(math.log2(6))
    sums = FeatureSums(3), FeatureSums(3)
    for one, pixels in zip(sums, (PIXELS, made), strict=True):
        one.update(pixels.double().mean(dim=(1, 2)))
    wanted = frechet_distance(sums[0].gaussian(), sums[1].gaussian())
    assert figures["fid[inception]"] == pytest.approx(wanted, rel=1e-9)
    assert figures["rFID"] == figures["fid[inception]"]
    assert {"is[inception]", "is10[inception]", "floor[inception]"} <= figures.keys()


def test_reconstructions_are_rounded_not_truncated() -> None:
    almost = evaluate_reconstruction(lambda x: (x - 0.4 / 255, None), PICTURES, with_ssim=False)
    assert almost["psnr"] == math.inf
    assert "ssim" not in almost


def test_perceptual_distances_keep_their_names() -> None:
    class Difference(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x - y).abs().mean()

    named = [("lpips", Difference()), ("efficientnet_lite0", Difference())]
    shift = 10 / 255
    figures = evaluate_reconstruction(
        lambda x: (x * 0.5 + shift, None), PICTURES, distances=named, batch_size=5
    )
    made = to_uint8(PIXELS.permute(0, 3, 1, 2) / 255 * 0.5 + shift, rounding="round")
    wanted = float((made.double() - PIXELS).abs().mean() / 255)
    assert figures["lpips"] == pytest.approx(wanted, rel=1e-5)
    assert figures["perceptual[efficientnet_lite0]"] == figures["lpips"]


@pytest.mark.parametrize("kind", ["legacy", "vq", "vae"])
def test_reconstructor_of_tokenizers(kind: str) -> None:
    model, images = tiny_tokenizer(kind), PIXELS.permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        made, ids = reconstructor(model)(images)
        again, _ = reconstructor(model)(images)
    assert made.shape == images.shape
    assert torch.equal(made, again)  # of a VAE the mean, not a draw
    if kind == "vae":
        assert ids is None
    else:
        assert ids is not None
        torch.testing.assert_close(model.decode_tokens(ids), made, rtol=1e-4, atol=1e-4)


def test_reconstructor_of_the_vqgan() -> None:
    model: MaskGitVQGAN = rebuilt(MaskGitVQGAN(TINY_VQGAN))
    images = PIXELS.permute(0, 3, 1, 2) / 255
    made, ids = reconstructor(model)(images)
    assert made.shape == images.shape
    assert ids is not None
    assert torch.equal(model.decode(ids), made)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="stage-1"):
        reconstructor(tiny_tokenizer("stage1"))
    empty = ArrayPictures.__new__(ArrayPictures)
    empty.images, empty.labels = PICTURES.images[:0], None
    with pytest.raises(ValueError, match="no images"):
        evaluate_reconstruction(noisy, empty)
    one = ArrayPictures(PICTURES.images[:1])
    with pytest.raises(ValueError, match="at least 2 images; got 1"):
        evaluate_reconstruction(lambda x: (x, None), one, networks=[Means()])
