"""The command line on small saved models and real photographs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio
from support.tiny_models import (
    rebuilt,
    tiny_generator_config,
    tiny_tokenizer,
    tiny_tokenizer_config,
)

from titok_fast.cli import main as cli
from titok_fast.cli.info import info
from titok_fast.config import SamplingConfig
from titok_fast.io.images import to_tensor, to_uint8
from titok_fast.models.generator import ImageBert
from titok_fast.models.tokenizer import TiTok
from titok_fast.pipeline import TiTokPipeline
from titok_fast.presets import PRESETS, Preset

TOKENIZER, VAE = tiny_tokenizer_config(), tiny_tokenizer_config("vae")
GENERATOR = replace(tiny_generator_config(), condition_num_classes=10)
SAMPLING = SamplingConfig(3, 2.0, "linear", softmax_temperature_annealing=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for kind, name in (("legacy", "tokenizer"), ("vae", "vae"), ("stage1", "stage1")):
        tiny_tokenizer(kind).save_pretrained(folder / name)
    rebuilt(ImageBert(GENERATOR)).save_pretrained(folder / "generator")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    Image.fromarray(data.astronaut()).resize((48, 48)).save(folder / "astronaut.png")
    Image.fromarray(data.coffee()).resize((90, 60)).save(folder / "coffee.jpg")
    Image.fromarray(data.chelsea()).resize((64, 80)).save(folder / "more" / "cat.webp")
    Image.fromarray(data.camera()).resize((32, 32)).save(folder / "more" / "coffee.png")
    return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", Preset(TOKENIZER, GENERATOR, SAMPLING))
    monkeypatch.setitem(PRESETS, "tiny-vae", Preset(VAE))


def both(weights: Path) -> list[str]:
    return [f"--tokenizer={weights / 'tokenizer'}", f"--generator={weights / 'generator'}"]


def run(*arguments: object) -> int:
    return cli.main([*map(str, arguments), "--quiet", "--device=cpu"])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden and temporary files too."""
    return sorted(path.name for path in folder.iterdir())


def test_sample_writes_what_the_pipeline_draws(
    tmp_path: Path, weights: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out, sheet = tmp_path / "a" / "out", tmp_path / "sheet.png"
    arguments = ["--labels=3,1", "--label=7", "--num=2", "--seed=5", "--batch-size=4"]
    places = ["--model=tiny", *both(weights), f"--out={out}", f"--grid={sheet}"]
    assert run("sample", *arguments, *places) == 0
    labels = [3, 3, 1, 1, 7, 7]
    files = [f"{i:06d}_{label}.png" for i, label in enumerate(labels)]
    assert names(out) == [*files, "manifest.json"]

    pipe = TiTokPipeline.from_pretrained(
        "tiny", tokenizer=str(weights / "tokenizer"), generator=str(weights / "generator")
    )
    drawn = pipe(labels, seed=5, output="numpy")
    for name, wanted in zip(files, drawn, strict=True):
        assert np.array_equal(pixels(out / name), wanted)
    assert len({picture.tobytes() for picture in drawn}) == 6
    assert pixels(sheet).shape == (2 * 34 + 2, 3 * 34 + 2, 3)  # six pictures, 2 px between
    captured = capsys.readouterr()
    assert captured.out == f"6 images in {out}\n6 images in {sheet}\n"
    assert captured.err == ""


def test_settings_reach_the_sampler(tmp_path: Path, weights: Path, tiny: None) -> None:
    settings: dict[str, Any] = {
        "num_sample_steps": 4,
        "guidance_scale": 1.5,
        "guidance_interval": (0.5, 1.0),
        "randomize_temperature": 2.0,
        "schedule": "cosine",
        "confidence": "probability",
    }
    given = ["--steps=4", "--guidance=1.5", "--temperature=2", "--schedule=cosine"]
    given += ["--guidance-interval=0.5,1"]
    places = [*both(weights), f"--out={tmp_path}", "--dtype=bfloat16"]
    assert run("sample", "--labels=2", *given, "--confidence=probability", *places) == 0
    pipe = TiTokPipeline.from_pretrained(
        tokenizer=str(weights / "tokenizer"), generator=str(weights / "generator")
    ).to(dtype=torch.bfloat16)
    assert np.array_equal(
        pixels(tmp_path / "000000_2.png"), pipe([2], output="numpy", **settings)[0]
    )


def test_untrained_says_so(tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--model=tiny", "--random-weights", f"--out={tmp_path}"]
    assert cli.main(["sample", "--labels=0", *places]) == 0
    err = capsys.readouterr().err
    assert "random weights, untrained: the images are noise" in err
    assert "1/1" in err  # the progress bar
    assert names(tmp_path) == ["000000_0.png", "manifest.json"]


def test_reconstruct_pairs_and_psnr(
    tmp_path: Path, weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = f"--tokenizer={weights / 'tokenizer'}"
    places = [tokenizer, f"--out={tmp_path}", "--side-by-side", "--batch-size=3"]
    assert run("reconstruct", photos / "more" / "cat.webp", photos, *places) == 0
    stems = ["cat", "astronaut", "coffee", "cat", "coffee"]
    assert names(tmp_path) == [f"{i:06d}_{stem}.png" for i, stem in enumerate(stems)]

    lines = capsys.readouterr().out.splitlines()
    model = TiTok.from_pretrained(weights / "tokenizer")
    paths = [photos / "more" / "cat.webp", *sorted(p for p in photos.rglob("*.*"))]
    made = TiTokPipeline(model).reconstruct([str(p) for p in paths], output="numpy")
    given = to_uint8(to_tensor([str(p) for p in paths], 32), rounding="round").numpy()
    ratios = []
    for i, name in enumerate(names(tmp_path)):
        pair = pixels(tmp_path / name)
        assert np.array_equal(pair[:, :32], given[i])
        assert np.array_equal(pair[:, 32:], made[i])
        ratios.append(peak_signal_noise_ratio(given[i], made[i]))
        assert lines[i] == f"{ratios[i]:7.2f} dB  {paths[i]}"
    assert lines[5] == f"{np.mean(ratios):7.2f} dB  mean PSNR of 5"


def test_weight_file_with_its_preset(
    weights: Path, photos: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    file = weights / "tokenizer" / "model.safetensors"
    for source in (["--model=tiny", f"--tokenizer={file}"], [f"--tokenizer={file.parent}"]):
        assert run("reconstruct", photos, *source) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_reconstruct_without_outputs_only_measures(
    weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(photos)
    assert run("reconstruct", photos, f"--tokenizer={weights / 'vae'}") == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert names(photos) == before


@pytest.mark.parametrize(("suffix", "dtype"), [("npz", "int16"), ("npz", "int32"), ("json", None)])
def test_tokens_round_trip(
    tmp_path: Path, weights: Path, photos: Path, suffix: str, dtype: str | None
) -> None:
    tokenizer, file = f"--tokenizer={weights / 'tokenizer'}", tmp_path / f"ids.{suffix}"
    option = [f"--id-dtype={dtype}"] if dtype == "int32" else []
    assert run("tokenize", photos, f"--out={file}", tokenizer, "--batch-size=3", *option) == 0
    pipe = TiTokPipeline(TiTok.from_pretrained(weights / "tokenizer"))
    paths = sorted(p for p in photos.rglob("*.*"))
    wanted = pipe.tokenize([str(p) for p in paths]).numpy()
    if suffix == "npz":
        with np.load(file) as archive:
            ids, files = archive["ids"], archive["files"].tolist()
        assert ids.dtype == dtype
    else:
        record = json.loads(file.read_text())
        ids, files = np.array(record["ids"]), record["files"]
    assert np.array_equal(ids, wanted)
    assert files == [path.as_posix() for path in paths]

    out = tmp_path / "out"
    assert run("detokenize", file, f"--out={out}", tokenizer, "--batch-size=3") == 0
    stems = ["astronaut", "coffee", "cat", "coffee"]
    assert names(out) == [f"{i:06d}_{stem}.png" for i, stem in enumerate(stems)]
    back = pipe.detokenize(torch.from_numpy(wanted), output="numpy")
    for name, picture in zip(names(out), back, strict=True):
        assert np.array_equal(pixels(out / name), picture)


def test_outputs_are_not_replaced_unasked(
    tmp_path: Path, weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, out = f"--tokenizer={weights / 'tokenizer'}", tmp_path / "000002_cat.png"
    out.write_bytes(b"precious")
    assert run("reconstruct", photos, tokenizer, f"--out={tmp_path}") == 2
    message = f"the output exists already: {out}; pass --force to overwrite"
    assert capsys.readouterr().err == f"titok-fast: error: {message}\n"
    assert names(tmp_path) == ["000002_cat.png"]  # nothing was begun
    assert out.read_bytes() == b"precious"
    assert run("reconstruct", photos, tokenizer, f"--out={tmp_path}", "--force") == 0
    assert pixels(out).shape == (32, 32, 3)

    ids = tmp_path / "ids.json"
    assert run("tokenize", photos, tokenizer, f"--out={ids}") == 0
    assert run("tokenize", photos, tokenizer, f"--out={ids}") == 2
    assert run("tokenize", photos, tokenizer, f"--out={ids}", "--force") == 0


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


@pytest.mark.parametrize("command", ["", *cli._COMMANDS])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: titok-fast")


def test_info_tables(tiny: None) -> None:
    lines = info([], dtype="bfloat16", batch=32).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[3 : 3 + len(PRESETS)]}
    assert list(rows) == list(PRESETS)
    weights = f"{(2 * (641_054_735 + 177_202_432) + 2 * (49_152 + 262_144)) / 2**20:,.0f}"
    assert rows["titok-l-32"][:7] == ["32", "641.1", "177.2", weights, "183.2", "371.6", "544.0"]
    assert rows["titok-l-32"][8] == "574"  # 312 TFLOP/s over 544.0 GFLOP
    assert rows["titok-ll-32-vae"][2] == rows["titok-ll-32-vae"][6] == "-"
    details = info(["titok-s-128"], dtype="tf32", batch=1)
    assert "generator 294,990,848 parameters, 76.09 GFLOP a pass, 128 passes in 64 steps" in details
    assert "tokenizer 83,674,639 parameters: latent_tokens 65,536, encoder 25,818,636" in details
    with pytest.raises(ValueError, match="batch wants at least 1; got 0"):
        info([], dtype="tf32", batch=0)


def test_installed_command() -> None:
    script = Path(sys.executable).with_name("titok-fast")
    for command in ([script], [sys.executable, "-m", "titok_fast"]):
        done = subprocess.run([*command, "info"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "titok-l-32" in done.stdout
        assert done.stderr == ""
    wrong = subprocess.run([script, "info", "nothing"], capture_output=True, text=True, timeout=120)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("titok-fast: error: unknown preset 'nothing'")
