"""Mistakes on the command line: one line each, before any weights are read; and what ends a run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.command_line import TOKENIZER, both, names, run
from support.tiny_models import (
    tiny_tokenizer,
)

from titok_fast.cli import main as cli
from titok_fast.models.generator import ImageBert
from titok_fast.models.tokenizer import TiTok


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights into memory fails the test."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded before the arguments were checked")

    monkeypatch.setattr(TiTok, "from_pretrained", load)
    monkeypatch.setattr(ImageBert, "from_pretrained", load)
    monkeypatch.setattr("titok_fast.loading._random", load)


DRAW = "sample --labels=1 --out={out}"
LOCAL = "--tokenizer={weights}/tokenizer --generator={weights}/generator"
MISTAKES = {
    "": "the following arguments are required: COMMAND",
    "paint": "invalid choice: 'paint'",
    "sample --labels=1,x --model=tiny": "wants classes separated by commas",
    f"sample --labels=1,10 --out={{out}} {LOCAL}": "labels lie in 0..9; got 1..10",
    f"sample --labels=-1 --out={{out}} {LOCAL}": "labels lie in 0..9; got -1..-1",
    f"{DRAW} --num=0 {LOCAL}": "wants a whole number of 1 or more; got '0'",
    f"{DRAW} --batch-size=none {LOCAL}": "wants a whole number of 1 or more; got 'none'",
    f"{DRAW} --steps=0 {LOCAL}": "num_sample_steps wants an integer from 1 to 1024; got 0",
    f"{DRAW} --steps=2000 {LOCAL}": "num_sample_steps wants an integer from 1 to 1024",
    f"{DRAW} --guidance=nan {LOCAL}": "guidance_scale wants a finite number",
    **{
        f"{DRAW} --guidance-interval={text} {LOCAL}": f"two numbers such as 0.25,0.75; got {text!r}"
        for text in ("1", "0.1,0.2,0.3", "a,b", "")
    },
    f"{DRAW} --guidance-interval=1,0 {LOCAL}": "guidance_interval wants (low, high) with 0 <= low",
    f"{DRAW} --temperature=-1 {LOCAL}": "randomize_temperature wants at least 0",
    f"{DRAW} --schedule=sine {LOCAL}": "invalid choice: 'sine'",
    f"{DRAW} --dtype=int8 {LOCAL}": "invalid choice: 'int8'",
    f"{DRAW} --attention=fast {LOCAL}": "invalid choice: 'fast'",
    f"{DRAW} --attention=flash {LOCAL}": "'flash' needs the package flash-attn",
    f"{DRAW} --device=gpu {LOCAL}": "--device wants cpu, cuda or cuda:1; got 'gpu'",
    f"{DRAW} --device=cuda:99 {LOCAL}": "--device cuda:99: torch sees",
    f"{DRAW} --model=titok-x": "invalid choice: 'titok-x'",
    f"{DRAW} --generator=x": "name a published model (--model), or weights (--tokenizer)",
    f"{DRAW} --model=tiny": "no tokenizer weights of tiny were published: pass --tokenizer",
    f"{DRAW} --model=tiny --tokenizer={{weights}}/tokenizer": "no generator weights of tiny were",
    f"{DRAW} --model=tiny-vae --random-weights": "a VAE tokenizer has no token ids",
    f"{DRAW} --tokenizer={{weights}}/vae": "a VAE tokenizer has no token ids",
    f"{DRAW} --tokenizer={{weights}}/tokenizer": "drawing wants a generator: pass --generator",
    f"{DRAW} --model=tiny --random-weights --generator=x": "wants --model, and no weights",
    f"{DRAW} --tokenizer=./nowhere": "./nowhere is neither a directory, nor a file",
    f"{DRAW} --tokenizer={{weights}}/tokenizer/model.safetensors": "has no config.json",
    f"{DRAW} --grid={{out}}/sheet.jpg {LOCAL}": "--grid wants a name ending in .png",
    f"sample --labels=1 --out={{photos}}/coffee.jpg {LOCAL}": "exists: '{photos}/coffee.jpg'",
    f"{DRAW} --num=2 --count=3 {LOCAL}": "--num is per label and --count in all: pass one",
    f"{DRAW} --npz={{out}}.zip {LOCAL}": "--npz wants a name ending in .npz",
    f"sample --npz={{out}}.npz --count=21 {LOCAL}": "a multiple of the 10 classes, such as 30; got",
    f"sample --npz={{out}}.npz --grid={{out}}.png {LOCAL}": "--grid beside --npz wants --out",
    f"{DRAW} --patience=nan {LOCAL}": "wants a number of seconds above 0; got 'nan'",
    "reconstruct {photos}/none --tokenizer={weights}/tokenizer": "no file or folder",
    "reconstruct {weights} --tokenizer={weights}/tokenizer": "files; got none in",
    "reconstruct {photos} --tokenizer={weights}/stage1": "predicts proxy codes, not pixels",
    "tokenize {photos} --out={out}/a.txt --tokenizer={weights}/tokenizer": ".npz or .json",
    "tokenize {photos} --out={out}/a.npz --tokenizer={weights}/vae": "has no token ids",
    "detokenize {out}/a.npz --tokenizer={weights}/tokenizer": "wants --out DIR, --grid FILE",
    "detokenize {out}/a.npz --out={out} --tokenizer={weights}/tokenizer": "no file of ids",
    "info --dtype=int8": "invalid choice: 'int8'",
    "info titok-l-33": "unknown preset 'titok-l-33'",
}


@pytest.mark.usefixtures("tiny", "no_loading")
@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_one_line_before_any_loading(
    line: str, tmp_path: Path, weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"out": tmp_path / "out", "weights": weights, "photos": photos}
    assert cli.main(line.format(**places).split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("titok-fast: error: ")
    assert captured.err.count("\n") == 1
    assert MISTAKES[line].format(**places) in captured.err
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ids": [[0] * 8], "files": ["a"]}, "KeyError: 'codebook_size'"),
        ([1], "the top level is a list"),
        ({"ids": [[0] * 7], "files": ["a"], "codebook_size": 64}, "holds 7 of 64 codes"),
        ({"ids": [[0] * 8], "files": ["a"], "codebook_size": 65}, "holds 8 of 65 codes"),
        ({"ids": [[64] * 8], "files": ["a"], "codebook_size": 64}, "in 0..63, its codebook; got"),
        ({"ids": [[-1] * 8], "files": ["a"], "codebook_size": 64}, "got -1..-1"),
        ({"ids": [[0.5] * 8], "files": ["a"], "codebook_size": 64}, "wants integer ids (n, K)"),
        ({"ids": [[0] * 8], "files": ["a", "b"], "codebook_size": 64}, "and 2 names"),
        ({"ids": [[0] * 8, [0]], "files": ["a", "b"], "codebook_size": 64}, "ValueError"),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_ids_that_do_not_fit(
    tmp_path: Path, weights: Path, content: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ids.json"
    file.write_text(json.dumps(content))
    out, tokenizer = f"--out={tmp_path / 'out'}", f"--tokenizer={weights / 'tokenizer'}"
    assert run("detokenize", file, out, tokenizer) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == ["ids.json"]


def test_npz_with_pickle(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "ids.npz", f"--out={tmp_path / 'out'}"
    ids = np.zeros((1, 8), np.int16)
    np.savez(file, ids=ids, files=np.array([Path("a")], dtype=object), codebook_size=64)
    assert run("detokenize", file, out, f"--tokenizer={weights / 'tokenizer'}") == 2
    assert "allow_pickle=False" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:100])
    assert run("detokenize", file, out, f"--tokenizer={weights / 'tokenizer'}") == 2
    assert "BadZipFile" in capsys.readouterr().err


def test_weights_that_do_not_fit_take_one_line(
    tmp_path: Path, weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = replace(TOKENIZER, vit_enc_model_size=(64, 4, 2))
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(larger.to_official()))
    assert run("reconstruct", photos, f"--tokenizer={tmp_path}") == 2
    err = capsys.readouterr().err
    assert "24 tensors do not fit this model" in err
    assert "; and 21 more" in err
    assert err.count("\n") == 1


def test_unreadable_picture_is_named(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    assert run("reconstruct", tmp_path, f"--tokenizer={weights / 'tokenizer'}") == 2
    assert "torn.jpg as an image" in capsys.readouterr().err


STAY = "images written so far stay; run the same command again to draw the rest"


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (KeyboardInterrupt(), 130, f"interrupted; 3 of 4 images are missing in OUT; {STAY}"),
        (MemoryError("try batch_size=4"), 2, "error: try batch_size=4"),
        (PermissionError(13, "denied", "x"), 2, "error: [Errno 13] denied: 'x'"),
    ],
)
def test_what_ends_a_run_ends_it_cleanly(
    raised: BaseException,
    status: int,
    message: str,
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = Image.Image.save
    written: list[object] = []

    def save(self: Image.Image, *arguments: Any, **options: Any) -> None:
        whole(self, *arguments, **options)
        written.append(arguments)
        if len(written) == 2:  # the second picture is on disk, but not yet under its name
            raise raised

    monkeypatch.setattr(Image.Image, "save", save)
    arguments = ["--labels=1", "--num=4", "--batch-size=1", f"--out={tmp_path}"]
    assert run("sample", *arguments, *both(weights)) == status
    said = message.replace("OUT", str(tmp_path))
    assert capsys.readouterr().err == f"titok-fast: {said}\n"
    assert names(tmp_path) == ["000000_1.png", "manifest.json"]
