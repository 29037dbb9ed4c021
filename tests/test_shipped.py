"""The small model of the package: its preset, its command, and that its weights get installed."""

import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.processes import ROOT, python
from support.shipped import MODEL, ship, trained, use

from titok_fast import PRESETS, TiTokPipeline, preset
from titok_fast.cli import main as cli
from titok_fast.io.files import read_tensors
from titok_fast.presets import SHIPPED
from titok_fast.training.recipe.recipe import read_recipe

NAMES = "0 T-shirt/top, 1 Trouser, 2 Pullover, 3 Dress, 4 Coat, 5 Sandal, 6 Shirt, 7 Sneaker, 8 Bag"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted random weights, without a classifier, as the package holds them."""
    made = trained(tmp_path_factory.mktemp("runs"))
    del made["classifier"]
    return ship(made, tmp_path_factory.mktemp("weights") / MODEL)


@pytest.fixture
def shipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use(folder, monkeypatch)
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_preset_is_what_the_recipes_train() -> None:
    known = preset(MODEL)
    stage2 = read_recipe(ROOT / "titok_fast/recipes/fashion/stage2.yaml")
    generator = read_recipe(ROOT / "titok_fast/recipes/fashion/generator.yaml")
    assert known.tokenizer == stage2.tokenizer
    assert known.generator == generator.generator
    assert len(known.classes) == generator.generator.condition_num_classes == 10
    assert known.folder == SHIPPED / MODEL
    assert SHIPPED == ROOT / "titok_fast" / "weights"


def test_loading_by_name(shipped: Path) -> None:
    pipe = TiTokPipeline.from_pretrained(MODEL)
    assert pipe.classes[7] == "Sneaker"
    assert pipe.sampling == PRESETS[MODEL].sampling
    assert torch.equal(
        pipe.tokenizer.latent_tokens,
        read_tensors(shipped / "tokenizer/model.safetensors")["latent_tokens"].float(),
    )
    pictures = pipe([7, 0], seed=1, output="tensor")
    assert pictures.shape == (2, 32, 32, 3)
    for labels in ([3, 10], [-1]):
        with pytest.raises(
            ValueError, match=rf"labels lie in 0\.\.9 \({NAMES}, .*got .*{labels[-1]}"
        ):
            pipe(labels)


def test_sampling_one_class_and_all_in_turn(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", f"--model={MODEL}", "--quiet", "--device=cpu", "--steps=2"]
    assert cli.main([*command, "--label=7", "--num=3", f"--out={tmp_path / 'one'}"]) == 0
    assert sorted(p.name for p in (tmp_path / "one").glob("*.png")) == [
        f"{i:06d}_7.png" for i in range(3)
    ]
    sheet = tmp_path / "sheet.png"
    places = [f"--out={tmp_path / 'all'}", f"--grid={sheet}"]
    assert cli.main([*command, "--num=12", *places]) == 0
    made = sorted((tmp_path / "all").glob("*.png"))
    assert [p.name for p in made] == [f"{i:06d}_{i % 10}.png" for i in range(12)]
    assert pixels(sheet).shape == (2 * 34 + 2, 10 * 34 + 2, 3)  # a column for each class
    drawn = TiTokPipeline.from_pretrained(MODEL)(
        [i % 10 for i in range(12)], output="numpy", num_sample_steps=2
    )
    assert np.array_equal(np.stack([pixels(p) for p in made]), drawn)
    assert cli.main([*command, f"--out={tmp_path / 'each'}"]) == 0
    assert len(list((tmp_path / "each").glob("*.png"))) == 10
    capsys.readouterr()
    assert cli.main([*command, "--label=10", f"--out={tmp_path / 'none'}"]) == 2
    assert f"({NAMES}, 9 Ankle boot); got 10..10" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_other_commands(shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(
        tmp_path / "a.png"
    )
    common = [f"--model={MODEL}", "--quiet", "--device=cpu"]
    ids = tmp_path / "ids.npz"
    assert cli.main(["tokenize", str(tmp_path / "a.png"), f"--out={ids}", *common]) == 0
    assert cli.main(["detokenize", str(ids), f"--out={tmp_path / 'back'}", *common]) == 0
    assert cli.main(["reconstruct", str(tmp_path / "a.png"), *common]) == 0
    assert cli.main(["info", MODEL]) == 0
    assert f"classes: {NAMES}, 9 Ankle boot" in capsys.readouterr().out


def test_absent_weights_are_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, MODEL, replace(PRESETS[MODEL], folder=tmp_path / "gone"))
    assert cli.main(["sample", f"--model={MODEL}", f"--out={tmp_path / 'out'}"]) == 2
    assert f"{tmp_path / 'gone' / 'tokenizer'} is neither a directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


DRAW = """
import socket, sys
def refuse(*args, **options): raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import titok_fast
assert titok_fast.__file__.startswith(sys.argv[1]), titok_fast.__file__
from titok_fast.cli.main import main
sys.exit(main(["sample", "--model=fashion-16", "--num=10", "--out=out", "--quiet", "--device=cpu"]))
"""


@pytest.fixture(scope="module")
def checkout(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that packaging reads, with random weights in place of the real ones."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    skip = shutil.ignore_patterns("__pycache__", MODEL)
    for name in ("titok_fast", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    shutil.copytree(folder, copy / "titok_fast" / "weights" / MODEL)
    return copy


def test_a_wheel_has_the_weights_and_draws_with_no_network(checkout: Path, tmp_path: Path) -> None:
    quiet = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q"]
    target = tmp_path / "installed"
    done = python("-m", "pip", "install", *quiet, "--target", str(target), str(checkout))
    assert done.returncode == 0, done.stderr
    offline = {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}
    done = python("-c", DRAW, str(target), cwd=tmp_path, **offline)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == [
        f"{i:06d}_{i}.png" for i in range(10)
    ]
    assert (target / "titok_fast" / "recipes" / "fashion" / "stage1.yaml").is_file()
    assert (target / "titok_fast" / "weights" / "README.md").is_file()


def test_a_source_archive_has_the_weights(folder: Path, checkout: Path, tmp_path: Path) -> None:
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    done = python("-c", build, cwd=checkout)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    weights = {f"{p.parent.name}/{p.name}" for p in folder.rglob("*") if p.is_file()}
    assert len(weights) == 4  # config.json and model.safetensors of two parts
    assert {f"titok_fast/weights/{MODEL}/{name}" for name in weights} <= names
    assert {"titok_fast/weights/README.md", "kernels/nearest_code.py"} <= names
    assert {"titok_fast/recipes/fashion/base.yaml", "titok_fast/backends/cpu_int8_ops.cpp"} <= names


def test_the_weights_of_this_checkout() -> None:
    total = sum(p.stat().st_size for p in SHIPPED.rglob("*") if p.is_file())
    assert total <= 12e6
    pipe = TiTokPipeline.from_pretrained(MODEL)
    pictures = pipe(list(range(10)), output="tensor").float()
    assert pictures.std() > 40  # clothes are bright on black
    border = torch.cat([pictures[:, :2].flatten(), pictures[:, -2:].flatten()])
    assert border.mean() < 10  # the data's two black rows on each side
