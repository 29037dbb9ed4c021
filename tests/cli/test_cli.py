"""The command line on small saved models and real photographs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from support.command_line import both, names, pixels, run
from support.processors import AVX2, BF16, NO_BF16

from titok_fast.cli import main as cli
from titok_fast.cli.info import info
from titok_fast.io.images import to_tensor, to_uint8
from titok_fast.models.tokenizer import TiTok
from titok_fast.pipeline import TiTokPipeline
from titok_fast.presets import PRESETS


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


def test_info_about_the_processor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for known, dtype, gain, int8 in (
        (BF16, "bfloat16", "2.2", "1.8"),
        (NO_BF16, "float32", "0.36", "2.1"),
        (AVX2, "float32", "0.22", "2"),
    ):
        monkeypatch.setattr("titok_fast.cli.info.measure_processor", lambda known=known: known)
        assert cli.main(["info"]) == 0
        said = capsys.readouterr().out
        assert f"This processor: {known.name}: {', '.join(known.instruction_sets)}" in said
        assert f"Take --dtype {dtype} --fast: bfloat16 has {gain} times the rate of float32" in said
        assert f"--fast int8 has {int8} times" in said
    assert cli.main(["info", "fashion-16"]) == 0
    assert "This processor" not in capsys.readouterr().out


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
