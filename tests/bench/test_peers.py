"""The peers benchmark: published numbers, sizes, extrapolation, record."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.bench_scripts import add_tiny, recorded, scripts

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
options, peer_systems, peers, report, weights = scripts(
    "lib.options", "lib.peers.systems", "peers", "report", "lib.weights"
)

CPU, META = torch.device("cpu"), torch.device("meta")
SYSTEMS = {s.name: s for s in peer_systems.SYSTEMS}
MEASURED = [name for name, s in SYSTEMS.items() if s.build is not None]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    add_tiny(monkeypatch, options)


def run(path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    return recorded(peers, path, "--tiny", "--ours", "tiny", *words)


def test_the_paper_gives_a_speed_of_each_model_of_ours() -> None:
    for models in peers.OURS.values():
        assert all((model, peers.OUR_STEPS) in report.PAPER_A100 for model in models)


@pytest.mark.parametrize("name", MEASURED)
def test_sizes_are_the_published_ones(name: str) -> None:
    system = SYSTEMS[name]
    peer = weights.build(lambda: system.build(False), META, torch.bfloat16)
    millions = peer.counts()["generator"] / 1e6
    if name.startswith("dit"):  # the library's class has 28 copies of the conditioning tables
        assert 675 < millions < 752
    else:
        assert abs(millions / system.paper_millions - 1) < 0.03
    assert {p.dtype for p in peer.generator.parameters()} == {torch.bfloat16}


def test_interpolation_adds_up() -> None:
    # a step costs 1 + its index: 0 + 1 + ... + 9 and ten ones
    line = {0: 1.0, 5: 6.0, 9: 10.0}
    assert peers.interpolated_sum(line, 10) == pytest.approx(55)
    assert peers.interpolated_sum({125: 0.5}, 250) == pytest.approx(125)
    # flat, then rising: not the mean of the three
    assert peers.interpolated_sum({0: 1.0, 2: 1.0, 4: 3.0}, 5) == pytest.approx(1 + 1 + 1 + 2 + 3)
    for points in ({}, {-1: 1.0}, {10: 1.0}):
        with pytest.raises(ValueError, match=r"wants points in 0\.\.9"):
            peers.interpolated_sum(points, 10)


def test_estimate_of_a_row() -> None:
    times = {"titok-l-32 eager": [1.0] * 3, "step 125": [0.1, 0.3, 0.2], "decode": [5.0] * 3}
    row = peers.estimate(SYSTEMS["dit-xl-2"], times, 1, batch=2)
    assert row["extrapolated"] is True
    assert row["step_ms"]["125"]["median"] == pytest.approx(200)
    assert row["ms_per_step"] == pytest.approx(200)
    assert row["images_per_s"] == pytest.approx(2 / (250 * 0.2 + 5))
    (own,) = row["ours"]
    assert own["images_per_s"]["median"] == 2
    assert own["speed_up"] == pytest.approx(55)
    assert own["paper_ratio"] == pytest.approx(101.6 / 0.6)


@pytest.mark.parametrize(
    ("name", "steps_per_call", "extrapolated", "ms_per_step", "rate"),
    [("maskgit", 8, False, 500, 1 / (4 + 1)), ("maskgit-512", 2, True, 2000, 1 / (12 * 2 + 1))],
)
def test_estimate_from_several_steps_at_once(
    name: str, steps_per_call: int, extrapolated: bool, ms_per_step: float, rate: float
) -> None:
    times = {"step 0": [4.0], "decode": [1.0]}
    row = peers.estimate(SYSTEMS[name], times, steps_per_call, batch=1)
    assert row["extrapolated"] is extrapolated
    assert row["ms_per_step"] == pytest.approx(ms_per_step)
    assert row["images_per_s"] == pytest.approx(rate)


@pytest.mark.parametrize("name", MEASURED)
def test_every_peer_draws_and_decodes(name: str) -> None:
    system = SYSTEMS[name]
    peer = weights.build(lambda: system.build(True), CPU, torch.float32)
    calls = peer.calls(2, system.steps)
    with torch.no_grad():
        for step in calls.steps.values():
            first, again = step(), step()  # a cache that grew would change the second's cost
            assert first.shape == again.shape
            assert first.shape[0] == 2
        pixels = calls.decode()
        pixels = getattr(pixels, "sample", pixels)
    assert pixels.shape[:2] == (2, 3)
    assert pixels.isfinite().all()
    assert set(calls.steps) <= set(range(system.steps))


def test_a_cached_step_attends_to_the_whole_cache() -> None:
    peer = weights.build(lambda: SYSTEMS["taming"].build(True), CPU, torch.float32)
    seen: list[int] = []
    step = type(peer).step

    class Watched(type(peer)):
        def step(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
            seen.append(cache.get_seq_length())
            return step(self, x, cache)

    peer.__class__ = Watched
    calls = peer.calls(1, 256)
    with torch.no_grad():
        for i, call in calls.steps.items():
            call(), call()
            assert seen[-2:] == [i, i]
    assert sorted(calls.steps) == [0, 128, 255]


def test_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    status, record = run(path, "--peers", "taming,maskgit,ldm-8,uvit-l-4-512", "--batch-size", "2")
    assert status == 0
    assert record["benchmark"] == "peers"
    rows = {case["name"]: case for case in record["cases"]}
    assert list(rows) == ["ldm-8", "taming", "maskgit", "uvit-l-4-512"]  # the tables' order
    assert "no speed" in rows["ldm-8"]["not_measured"]
    for name in ("taming", "maskgit", "uvit-l-4-512"):
        row, system = rows[name], SYSTEMS[name]
        assert (row["steps"], row["paper_rate"]) == (system.steps, system.paper_rate)
        assert (row["batch"], row["dtype"]) == (2, "bf16")
        assert set(row["parameters"]) == {"generator", "decoder"}
        assert row["extrapolated"] is (name != "maskgit")
        seconds = (row["ms_per_step"] * row["steps"] + row["decode_ms"]["median"]) / 1000
        assert row["images_per_s"] == pytest.approx(2 / seconds)
        (own,) = row["ours"]
        assert own["images_per_s"]["repeats"] == 2
        assert own["speed_up"] == pytest.approx(own["images_per_s"]["median"] / row["images_per_s"])
        assert own["paper_ratio"] is None  # the paper has no tiny model
    out = capsys.readouterr().out
    for text in ("extrapolated", "whole run", "| not measured: the paper gives no speed"):
        assert text in out


def test_ours_are_compiled_beside_eager_ones(tmp_path: Path) -> None:
    words = ("--peers", "maskgit", "--compile", "products", "--dtype", "fp32-ieee")
    status, record = run(tmp_path / "r.json", *words)
    assert status == 0
    (row,) = record["cases"]
    assert [own["mode"] for own in row["ours"]] == ["eager", "products"]
    assert row["dtype"] == "fp32-ieee"


def test_what_does_not_fit_or_fails_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "available_bytes", lambda device: 1000)
    status, record = run(tmp_path / "a.json", "--peers", "dit-xl-2")
    assert status == 0
    assert "GiB are free" in record["cases"][0]["not_measured"]

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(peers, "available_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(peers, "ours", lambda args, side: {})
    monkeypatch.setattr(peers, "time_interleaved", fail)
    status, record = run(tmp_path / "b.json", "--peers", "dit-xl-2")
    assert status == 1
    assert record["cases"][0]["not_measured"] == "failed: OutOfMemoryError"
