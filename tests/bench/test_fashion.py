"""bench/fashion.py on a few pictures and random weights, and what is made of its record."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.bench_scripts import scripts
from support.records import write_fashion
from support.shipped import MODEL, ship, trained, use

from titok_fast import TiTokPipeline
from titok_fast.data.sources import fashion_mnist
from titok_fast.models.classifier import FashionClassifier

fashion, report_fashion, sampling = scripts("fashion", "report_fashion", "sampling")
COUNT, TEST = 20, 36


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """Folders of weights and results, and the record."""
    weights = ship(trained(tmp_path_factory.mktemp("runs")), tmp_path_factory.mktemp("w") / "w")
    data, results = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("results")
    write_fashion(data, train=48, test=TEST)
    words = [f"--weights={weights}", f"--classifier={weights / 'classifier'}", f"--data={data}"]
    words += [f"--count={COUNT}", "--batch-size=12", f"--json={results}", f"--plots={results}"]
    assert fashion.main(words) == 0
    (file,) = results.glob("*_fashion.json")
    record = json.loads(file.read_text())
    return weights, results, record | {"data": data}


def test_figures_are_those_of_the_pictures(measured: tuple[Path, Path, dict[str, Any]]) -> None:
    weights, _, record = measured
    figures, test = record["figures"], fashion_mnist("eval", record["data"])
    parts = {part: str(weights / part) for part in ("tokenizer", "generator")}
    pipe = TiTokPipeline.from_pretrained(MODEL, **parts)
    judge = FashionClassifier.from_pretrained(weights / "classifier")

    def right(pictures: np.ndarray, labels: list[int]) -> float:
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            return float((judge(images).argmax(1) == torch.tensor(labels)).float().mean())

    records = [test.read(i) for i in range(TEST)]
    originals = np.stack([np.array(Image.fromarray(r.image).convert("RGB")) for r in records])
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


def test_sheets_show_what_they_say(measured: tuple[Path, Path, dict[str, Any]]) -> None:
    weights, results, record = measured
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
        want = np.asarray(Image.fromarray(test.read(index).image).convert("RGB"))
        assert np.array_equal(cell("reconstructions", 2 * (index // 10), index % 10), want)
    parts = {part: str(weights / part) for part in ("tokenizer", "generator")}
    pipe = TiTokPipeline.from_pretrained(MODEL, **parts)
    drawn = pipe([i // 10 for i in range(100)], output="numpy")
    assert np.array_equal(cell("samples", 3, 4), drawn[34])


def test_card_and_table(
    measured: tuple[Path, Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, results, record = measured
    section = report_fashion.fashion_table(record)
    assert "| 20 samples " in section.replace("  ", " ")
    assert f"![samples](bench/results/{record['sheets']['samples']})" in section
    assert f"{record['figures']['fid_real']:.3g}" in section
    card = tmp_path / "card.md"
    card.write_text(report_fashion.CARD.read_text())
    options = [f"--card={card}", f"--results={results}"]
    assert report_fashion.main([*options, "--check"]) == 1
    assert report_fashion.main(options) == 0
    assert report_fashion.figures_table(record) in card.read_text()
    assert "bench/results" not in card.read_text().replace("`", "")  # it is installed elsewhere
    assert report_fashion.main([*options, "--check"]) == 0
    assert report_fashion.main([f"--card={card}", f"--results={tmp_path}"]) == 0
    assert "Not measured yet." in card.read_text()
    with pytest.raises(ValueError, match="the card wants the markers"):
        report_fashion.fill_card("nothing", record)
    assert "differs from the results" in capsys.readouterr().out


def test_the_committed_card_is_that_of_the_committed_results() -> None:
    assert report_fashion.main(["--check"]) == 0


def test_quality_stands_beside_the_speed(
    measured: tuple[Path, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    weights, results, record = measured
    options = scripts("lib.options")[0]
    use(weights, monkeypatch)
    monkeypatch.setattr(options, "matmul_peak", lambda device, dtype: 1e12)
    found = report_fashion.quality(MODEL, results)
    monkeypatch.setattr(sampling, "quality", lambda model: found)
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
    assert report_fashion.quality(MODEL, tmp_path) is None
    assert sampling.quality_lines({"cases": [{"model": MODEL, "quality": None}]}) == [
        f"{MODEL}: not measured"
    ]


def test_mistakes_are_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--count=5"], "--count wants at least 10"),
        ([f"--plots={tmp_path / 'none'}"], "--plots: no folder"),
        ([f"--classifier={tmp_path / 'none'}"], "none is neither a directory"),
    ):
        with pytest.raises(SystemExit) as stop:
            fashion.main(words)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
