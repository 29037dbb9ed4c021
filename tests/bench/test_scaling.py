"""The scaling benchmark on small models: axes, record, ranks, plots; and the points it shares."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bench_scripts import BENCH, add_tiny, recorded, refused, scripts

from titok_fast import PRESETS

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
options, plots, scaling, weights, workloads = scripts(
    "lib.options", "lib.plots", "scaling", "lib.weights", "lib.workloads"
)

CPU, Workload = torch.device("cpu"), workloads.Workload
TINY_AXES = {
    "batch": [Workload("tiny", B) for B in (1, 2, 16)],
    "tokens": [Workload("tiny", tokens=K) for K in (4, 8)],
    "steps": [Workload("tiny", steps=T) for T in (1, 3)],
    "threads": [Workload("tiny", threads=1)],
}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    add_tiny(monkeypatch, options)


@pytest.fixture
def small_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "axis_workloads", lambda axis, cores, devices: TINY_AXES[axis])
    monkeypatch.setattr(scaling, "FIT", (Workload("tiny"), Workload("tiny", 2)))


def test_axes_cover_what_is_asked() -> None:
    def axis(name: str, cores: int = 2, devices: int | None = None) -> list[Any]:
        return scaling.axis_workloads(name, cores, devices)

    assert [p.batch for p in axis("batch")] == [1, 2, 4, 8, 16, 32, 64]
    assert [p.tokens for p in axis("tokens")] == [32, 64, 128, 256]
    assert {p.model for p in axis("tokens")} == {"titok-b-64"}
    assert sorted(p.system.tokenizer.crop_size for p in axis("resolution")) == [256] * 2 + [512] * 2
    assert [p.steps for p in axis("steps")] == [1, 2, 4, 8, 16, 32, 64]
    assert [p.threads for p in axis("threads", cores=6)] == [1, 2, 4, 6]
    assert [(p.ranks, p.threads) for p in axis("ranks")] == [(1, 2), (2, 1)]
    assert axis("threads", devices=4) == []
    on_cuda = [(p.ranks, p.threads) for p in axis("ranks", devices=4)]
    assert on_cuda == [(1, None), (2, None), (4, None)]
    with pytest.raises(ValueError, match="axis wants one of batch"):
        axis("width")
    everything = [p for name in scaling.AXES for p in axis(name)]
    assert set(scaling.FIT) <= set(everything)


def test_what_is_left_out_says_why() -> None:
    assert scaling.left_out(Workload(batch=16), 8, 2) == "over --max-batch 8"
    assert scaling.left_out(Workload(batch=8), 8, 2) is None
    assert "more than 1 CPU" in scaling.left_out(Workload(ranks=2, threads=1), 8, 1)
    assert scaling.left_out(Workload(ranks=2, threads=1), 8, 2) is None


def test_a_workload_changes_tokens_and_steps_only() -> None:
    system = Workload("titok-b-64", 3, tokens=256, steps=2).system
    known = PRESETS["titok-b-64"]
    assert (system.tokenizer.num_latent_tokens, system.generator.image_seq_len) == (256, 256)
    assert system.tokenizer.decoder_size == known.tokenizer.decoder_size
    assert system.sampling == known.sampling.updated(num_sample_steps=2)
    assert Workload("titok-b-64").row()["tokens"] == 64


def test_models_without_encoder_draw_like_the_whole_pipeline() -> None:
    pipe = weights.draw_only(PRESETS["tiny"], CPU, torch.bfloat16)
    assert pipe.tokenizer.decoder.mask_token.dtype == torch.bfloat16
    assert pipe.tokenizer.quantize.embedding.weight.dtype == torch.float32
    assert not list(pipe.tokenizer.encoder.parameters())
    again = weights.draw_only(PRESETS["tiny"], CPU, torch.bfloat16)
    pictures = [p([1, 2], output="tensor") for p in (pipe, again)]
    assert pictures[0].shape == (2, 32, 32, 3)
    assert torch.equal(*pictures)
    assert pictures[0].float().std() > 1  # finite weights of a sensible size
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ValueError, match="with a generator"):
        weights.draw_only(PRESETS["titok-ll-32-vae"], CPU, torch.float32)


def test_record(small_axes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--axes", "batch,tokens,steps,threads", "--max-batch", "2", "--plots", str(tmp_path))
    status, record = recorded(scaling, tmp_path / "r.json", *words)
    assert status == 0
    assert record["benchmark"] == "scaling"
    rows = record["cases"]
    assert [row["axis"] for row in rows] == [a for a, ps in TINY_AXES.items() for _ in ps]
    left = rows.pop(2)
    assert (left["batch"], left["not_measured"]) == (16, "over --max-batch 2")
    for row in rows:
        assert len(row["seconds"]) == 2
        assert row["images_per_s"]["repeats"] == 2
        order = ["generator", "vit_decoder", "pixel_decoder", "transfer", "head"]
        assert list(row["stages_s"]) == order
        mean = sum(row["seconds"]) / 2
        parts = sum(row["stages_s"].values()) - row["stages_s"]["head"]
        assert 0.4 * mean < parts <= mean
    assert [row["tokens"] for row in rows[2:4]] == [4, 8]
    assert rows[-1]["threads"] == 1
    lines = record["cost_model"]["lines"]
    assert {line["fitted"] for line in lines} == {True, False}
    assert len(lines) == 5 * (len(rows) - 1)  # not the row of its own thread count
    out = capsys.readouterr().out
    assert "not measured: over --max-batch 2" in out
    svg = ET.fromstring((tmp_path / "r.svg").read_text())
    assert svg.tag.endswith("svg")


def test_the_fast_mode_is_measured_alike(small_axes: None, tmp_path: Path) -> None:
    words = ("--axes", "batch,tokens", "--max-batch", "2", "--compile", "packed,products")
    status, record = recorded(scaling, tmp_path / "r.json", *words)
    assert status == 0
    assert {row["mode"] for row in record["cases"]} == {"packed+products"}
    rows = [row for row in record["cases"] if "seconds" in row]
    assert len(rows) == 4
    for row in rows:  # of workloads on one pipeline each clock takes its own times alone
        stages = sum(row["stages_s"].values()) - row["stages_s"]["head"]
        assert 0.3 * sum(row["seconds"]) / 2 < stages <= sum(row["seconds"]) / 2


def test_too_few_workloads_leave_no_cost_model(small_axes: None, tmp_path: Path) -> None:
    status, record = recorded(scaling, tmp_path / "r.json", "--axes", "steps")
    assert status == 0
    assert "cost_model" not in record


def test_a_failed_workload_is_a_row(
    small_axes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = workloads.draw

    def fails(workload: Any, pipe: Any) -> object:
        if workload.batch == 2:
            raise MemoryError("no room")
        return draw(workload, pipe)

    monkeypatch.setattr(workloads, "draw", fails)
    status, record = recorded(scaling, tmp_path / "r.json", "--axes", "batch")
    assert status == 1
    assert [row.get("error") for row in record["cases"]] == [None, "MemoryError", None]


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with workloads.settings(Workload("tiny", threads=before + 1), "fp32-ieee"):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_ranks_draw_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))  # for the ranks, which import the script anew
    workload = Workload("titok-s-128", steps=1, ranks=2, threads=1)
    row = scaling.measure_ranks(workload, device=CPU, dtype="bf16", repeats=2)
    assert len(row["seconds"]) == 2
    low, high = (2 / s for s in (max(row["seconds"]), min(row["seconds"])))
    assert low <= row["images_per_s"]["median"] <= high


@pytest.mark.slow
def test_a_rank_that_dies_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    workload = Workload("tiny", ranks=2, threads=1)  # a fresh process knows no such preset
    row = scaling.measure_ranks(workload, device=CPU, dtype="bf16", repeats=1)
    assert row["error"] == "ProcessRaisedException"
    assert "seconds" not in row


def test_plots_of_scaling_and_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"device": "CPU", "threads": 2, "torch": "2", "date_utc": "2026-01-02T03:04"}
    speed = {"median": 2.0, "p20": 1.5, "p80": 2.5, "repeats": 3}
    own = {"model": "titok-l-32", "mode": "eager", "speed_up": 12.0, "paper_ratio": None}
    case = {"generator": "DiT-XL/2", "side": 256, "dtype": "bf16", "ours": [own]}
    peers = {"benchmark": "peers", "environment": environment, "cases": [case]}
    found = {"axis": "resolution", "images_per_s": speed, "dtype": "bf16", "peak_bytes": 1 << 30}
    pairs = [Workload(name).row() | found for pair in scaling.PAIRS for name in pair]
    curves = {"benchmark": "scaling", "environment": environment, "cases": pairs}
    files = [tmp_path / "peers.json", tmp_path / "scaling.json"]
    for path, record in zip(files, (peers, curves), strict=True):
        path.write_text(json.dumps(record))
    assert plots.main([*map(str, files), "--out", str(tmp_path)]) == 0
    first = {name: (tmp_path / f"{name}.svg").read_bytes() for name in ("peers", "scaling")}
    for text in first.values():
        ET.fromstring(text)
    plots.main([*map(str, files), "--out", str(tmp_path)])
    assert first == {name: (tmp_path / f"{name}.svg").read_bytes() for name in first}
    speeds = plots.scaling(curves).axes[0]
    assert [list(line.lines[0].get_xdata()) for line in speeds.containers] == [[256, 512]] * 2
    with pytest.raises(ValueError, match="measured workloads; got scaling with 0"):
        plots.scaling(curves | {"cases": []})
    with pytest.raises(ValueError, match="measured systems"):
        plots.peers(peers | {"cases": [{"generator": "x", "not_measured": "y"}]})
    for name, said in (("sampling", "wants a record"), ("waterfall", "measured rows; got")):
        record = {"benchmark": name, "cases": [{"row": "plain", "error": "RuntimeError"}]}
        files[0].write_text(json.dumps(record))
        refused(capsys, plots, [str(files[0])], said)
