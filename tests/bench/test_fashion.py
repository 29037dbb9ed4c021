"""bench/fashion.py on a few pictures and random weights, and on logs with known times."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.bench_scripts import cells, refused, scripts
from support.records import write_fashion
from support.shipped import MODEL, ship, trained, use

from titok_fast import TiTokPipeline
from titok_fast.data.sources import fashion_mnist
from titok_fast.models.classifier import FashionClassifier

fashion, options, quality_tables, sampling, tables = scripts(
    "fashion", "lib.options", "lib.quality_tables", "sampling", "lib.tables"
)
COUNT, TEST = 20, 36
Measured = tuple[TiTokPipeline, Path, Path, dict[str, Any]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The pipeline that was measured, folders of its weights and of results, and the record."""
    weights = ship(trained(tmp_path_factory.mktemp("runs")), tmp_path_factory.mktemp("w") / "w")
    data, results = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("results")
    write_fashion(data, train=48, test=TEST)
    words = [f"--weights={weights}", f"--classifier={weights / 'classifier'}", f"--data={data}"]
    words += [f"--count={COUNT}", "--batch-size=12", f"--json={results}", f"--plots={results}"]
    assert fashion.main(words) == 0
    (file,) = results.glob("*_fashion.json")
    record = json.loads(file.read_text())
    parts = {part: str(weights / part) for part in ("tokenizer", "generator")}
    pipe = TiTokPipeline.from_pretrained(MODEL, **parts)
    return pipe, weights, results, record | {"data": data}


def test_figures_are_those_of_the_pictures(measured: Measured) -> None:
    pipe, weights, _, record = measured
    figures, test = record["figures"], fashion_mnist("eval", record["data"])
    judge = FashionClassifier.from_pretrained(weights / "classifier")

    def right(pictures: np.ndarray, labels: list[int]) -> float:
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            return float((judge(images).argmax(1) == torch.tensor(labels)).float().mean())

    records = [test.read(i) for i in range(TEST)]
    originals = np.stack([np.array(Image.fromarray(r.values).convert("RGB")) for r in records])
    labels = [int(r.label) for r in records]
    made = pipe.reconstruct([Image.fromarray(o) for o in originals], output="numpy")
    error = ((originals.astype(float) - made) ** 2).mean(axis=(1, 2, 3))
    assert figures["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / error)), rel=1e-6)
    assert figures["accuracy_real"] == pytest.approx(right(originals, labels))
    assert figures["accuracy_reconstructions"] == pytest.approx(right(made, labels))
    turns = [i % 10 for i in range(COUNT)]
    drawn = pipe(turns, output="numpy")
    assert figures["label_agreement"] == pytest.approx(right(drawn, turns))
    assert 0 <= figures["fid_real"] < figures["fid_samples"]
    assert figures["fid_to_originals"] > 0
    assert set(figures["fast_modes"]) == {"fast", "int8"}
    for found in figures["fast_modes"].values():  # other roundings of the same draws
        assert found["fid_samples"] == pytest.approx(figures["fid_samples"], rel=0.2)
        assert found["fid_samples"] != figures["fid_samples"]
        assert 25 < found["psnr_to_float32"] < 80
    protocol = record["protocol"]
    assert (protocol["samples"], protocol["trained"]) == (COUNT, "local files")
    assert protocol["features"] == "fashion-classifier, 128 features, float32"


def test_sheets_show_what_they_say(measured: Measured) -> None:
    pipe, _, results, record = measured
    sheets = {
        name: np.asarray(Image.open(results / file)) for name, file in record["sheets"].items()
    }
    assert sorted(sheets) == ["reconstructions", "samples"]
    assert sheets["samples"].shape == (10 * 66 + 2, 10 * 66 + 2, 3)
    assert sheets["reconstructions"].shape == (6 * 66 + 2, 10 * 66 + 2, 3)

    def cell(name: str, row: int, column: int) -> np.ndarray:
        top, left = 2 + 66 * row, 2 + 66 * column
        return sheets[name][top : top + 64 : 2, left : left + 64 : 2]

    test = fashion_mnist("eval", record["data"])
    for index in (0, 13):  # rows of originals are 0, 2 and 4
        want = np.asarray(Image.fromarray(test.read(index).values).convert("RGB"))
        assert np.array_equal(cell("reconstructions", 2 * (index // 10), index % 10), want)
    drawn = pipe([i // 10 for i in range(100)], output="numpy")
    assert np.array_equal(cell("samples", 3, 4), drawn[34])


def test_quality_stands_beside_the_speed(
    measured: Measured,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    _, weights, results, record = measured
    use(weights, monkeypatch)
    monkeypatch.setattr(options, "matmul_peak", lambda device, dtype: 1e12)
    newest = quality_tables.newest_quality(MODEL, tables.read(results))
    monkeypatch.setattr(sampling, "newest_quality", lambda model: newest)
    found = sampling.quality(MODEL)
    words = ["--models", MODEL, "--batch", "2", "--dtype", "fp32-ieee", "--modes", "eager"]
    file = tmp_path / "r.json"
    assert sampling.main([*words, "--repeats", "1", "--device", "cpu", "--json", str(file)]) == 0
    cases = json.loads(file.read_text())["cases"]
    assert [c["implementation"] for c in cases] == ["reference", "ours"]
    assert all(c["weights"] == "in the package" and c["quality"] == found for c in cases)
    assert "error" not in cases[1]
    figures = record["figures"]
    agreement, distance = figures["label_agreement"], figures["fid_samples"]
    line = f"{MODEL}: label agreement {agreement:.1%}, FID {distance:.3g} beside"
    assert line in capsys.readouterr().out
    assert quality_tables.newest_quality(MODEL, tables.read(results / "none")) is None
    monkeypatch.setattr(sampling, "newest_quality", lambda model: None)
    assert sampling.quality(MODEL) is None
    assert sampling.quality_lines({"cases": [{"model": MODEL, "quality": None}]}) == [
        f"{MODEL}: not measured"
    ]


def test_mistakes_are_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--count=5"], "--count wants at least 10"),
        ([f"--plots={tmp_path / 'none'}"], "--plots: wants an existing folder"),
        ([f"--classifier={tmp_path / 'none'}"], "none is neither a directory"),
    ):
        refused(capsys, fashion, words, message)


def write_log(folder: Path, begin: float, per_update: float, steps: tuple[int, ...]) -> None:
    folder.mkdir()
    lines = [{"step": step, "time": begin + per_update * step, "loss": 1.0} for step in steps]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_minutes_of_each_run_and_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path / "stage1", 5000.0, 3.0, (20, 40, 100))
    write_log(tmp_path / "vqgan", 1000.0, 6.0, (10, 10, 200))
    (tmp_path / "tokens").mkdir()  # no run
    first, second = fashion.times(tmp_path)
    assert (first["run"], first["updates"], first["started"]) == ("vqgan", 200, 1000.0)
    assert (first["minutes"], second["minutes"]) == pytest.approx((20.0, 5.0))
    assert fashion.main(["--times", str(tmp_path), "--json", str(tmp_path / "r.json")]) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["cases"] == [first, second]
    assert record["benchmark"] == "recipe-times"
    assert cells(capsys.readouterr().out) == [
        {"run": "vqgan", "updates": "200", "minutes": "20.0"},
        {"run": "stage1", "updates": "100", "minutes": "5.0"},
        {"run": "all", "updates": "300", "minutes": "25.0"},
    ]


@pytest.mark.parametrize("steps", [(), (7,), (7, 7)])
def test_logs_that_tell_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: tuple[int, ...]
) -> None:
    words = ["--times", str(tmp_path)]
    refused(capsys, fashion, words, "wants folders with a log.jsonl in each")
    write_log(tmp_path / "vqgan", 0.0, 1.0, steps)
    refused(capsys, fashion, words, "holds no two updates")
