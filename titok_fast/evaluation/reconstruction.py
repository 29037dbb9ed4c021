"""Measure reconstructions: PSNR, SSIM, feature distances, codebook usage, classes.

Protocol of the published rFID (upstream: evaluator/evaluator.py): the originals are the evaluated
images themselves, not the training set; reconstructions are clamped and rounded to bytes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from titok_fast.distributed import sum_over_ranks
from titok_fast.evaluation.measure import Figures, Measurement, labelled
from titok_fast.evaluation.networks import FeatureNetwork
from titok_fast.evaluation.pictures import Pictures, batches
from titok_fast.io.images import psnr, to_uint8
from titok_fast.models.code_usage import CodeUsage
from titok_fast.models.packages import package
from titok_fast.models.tokenizer import TiTok
from titok_fast.models.vqgan import MaskGitVQGAN

# (B, 3, S, S) float32 in [0, 1] -> reconstructions, clamped or not, and int64 ids or None
Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor | None]]
_BORDER = 5  # pixels by which SSIM's window reaches beyond its center


def reconstructor(model: TiTok | MaskGitVQGAN) -> Reconstruct:
    """How a model reconstructs images, on its own device. A VAE uses its mean.

    Raises:
        ValueError: a stage-1 tokenizer, which predicts proxy codes.
    """
    if isinstance(model, MaskGitVQGAN):
        return lambda images: _through_vqgan(model, images)
    config = model.config
    if config.is_legacy and not config.finetune_decoder:
        raise ValueError("a stage-1 tokenizer predicts proxy codes, not pixels: nothing to measure")
    return lambda images: _through_titok(model, images)


def _through_vqgan(model: MaskGitVQGAN, images: Tensor) -> tuple[Tensor, Tensor]:
    ids = model.encode(images.to(model.decoder.conv_in.weight))
    return model.decode(ids), ids


def _through_titok(model: TiTok, images: Tensor) -> tuple[Tensor, Tensor | None]:
    codes, result = model.encode(images.to(model.latent_tokens.device))
    if model.config.quantize_mode == "vae":
        return model.decode(result.mode()), None
    return model.decode(codes), result["min_encoding_indices"]


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair: Gaussian window of 11 pixels, sigma 1.5.

    As published (and in scikit-image), over windows inside the image: torchmetrics' own mean
    includes a border of mirrored pixels.

    Args:
        a: (B, H, W, 3) uint8, sides of at least 11.
        b: the same shape.

    Returns:
        (B,) float64, 1 for equal images.

    Raises:
        ValueError: smaller images.
        ImportError: torchmetrics is missing.
    """
    if min(a.shape[1:3]) < 2 * _BORDER + 1:
        raise ValueError(f"SSIM wants sides of at least {2 * _BORDER + 1}; got {a.shape[1:3]}")
    measure = package("torchmetrics.functional.image").structural_similarity_index_measure
    a, b = (x.double().permute(0, 3, 1, 2) for x in (a, b))
    _, maps = measure(a, b, data_range=255.0, reduction="none", return_full_image=True)
    inner: Tensor = maps[..., _BORDER:-_BORDER, _BORDER:-_BORDER]
    return inner.mean(dim=(1, 2, 3))


@torch.no_grad()
def evaluate_reconstruction(
    reconstruct: Reconstruct,
    pictures: Pictures,
    *,
    codebook_size: int | None = None,
    networks: Sequence[FeatureNetwork] = (),
    distances: Sequence[tuple[str, nn.Module]] = (),
    with_ssim: bool = True,
    floor: bool = False,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Figures:
    """Measure reconstructions. Ranks of a process group share the images; all get the figures.

    Args:
        reconstruct: see `reconstructor`.
        pictures: originals, of the tokenizer's size.
        codebook_size: N, to measure codebook usage; None leaves it out.
        networks: feature networks.
        distances: names and modules of perceptual distances, see `models.perceptual`.
        with_ssim: measure SSIM, which needs torchmetrics.
        floor: also the Frechet distance of two halves of the originals.
        batch_size: images at once.
        progress: called with the number of images done since the last call, on this rank.

    Returns:
        Means over images, of all ranks: `images`, `psnr` in dB, `ssim`, `codebook_usage` (0..1),
        `codebook_entropy_bits`; for each distance its own name if that is "lpips", else
        `perceptual[name]`; for each network `fid[name]`, `is[name]`, `is10[name]`, `floor[name]`
        and, where it knows the classes, `accuracy_originals[name]` and
        `accuracy_reconstructions[name]`. `rFID` for Inception alone.

    Raises:
        ValueError: no images, or fewer than two with a network.
        ImportError: a package of the extra `eval` is missing.
    """
    total = len(pictures)
    views = [(Measurement(n, total, halves=floor), Measurement(n, total)) for n in networks]
    usage = CodeUsage(codebook_size) if codebook_size else None
    sums = torch.zeros(3 + len(distances), dtype=torch.float64)  # images, dB, SSIM, distances
    for first, originals, labels in batches(pictures, batch_size, progress):
        images = originals.permute(0, 3, 1, 2).float() / 255
        floats, ids = reconstruct(images)
        made = to_uint8(floats.float().clamp(0, 1).cpu(), rounding="round")
        n = len(originals)
        sums[0] += n
        sums[1] += psnr(originals, made).sum()
        if with_ssim:
            sums[2] += ssim(originals, made).sum()
        for i, (_, distance) in enumerate(distances):
            sums[3 + i] += n * float(distance(images, made.permute(0, 3, 1, 2).float() / 255))
        if usage is not None and ids is not None:
            usage.update(ids.cpu())
        for original_view, made_view in views:
            original_view.update(originals, first, labels)
            made_view.update(made, first, labels)
    count, decibels, similarity, *totals = sum_over_ranks(sums).tolist()
    if not count:
        raise ValueError("there are no images to measure")
    figures = {"images": count, "psnr": decibels / count}
    if with_ssim:
        figures["ssim"] = similarity / count
    for (name, _), value in zip(distances, totals, strict=True):
        figures[name if name == "lpips" else f"perceptual[{name}]"] = value / count
    if usage is not None:
        report = usage.report()
        figures["codebook_usage"] = report.usage
        figures["codebook_entropy_bits"] = report.entropy_bits
    for original_view, made_view in views:
        figures |= _feature_figures(original_view, made_view, floor)
    return figures


def _feature_figures(originals: Measurement, made: Measurement, floor: bool) -> Figures:
    originals.merge_ranks()
    made.merge_ranks()
    figures = made.figures(originals.sums.gaussian())
    if floor:
        figures["floor"] = originals.floor()
    before, after = originals.label_share(), made.label_share()
    if before is not None and after is not None:
        figures["accuracy_originals"] = before
        figures["accuracy_reconstructions"] = after
    return labelled(figures, originals.network, "rFID")
