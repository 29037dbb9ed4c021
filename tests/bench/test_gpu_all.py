"""The single command for a GPU machine, with a pretended GPU: which steps run, and what is left."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.bench_scripts import BENCH, refused, scripts

(gpu_all,) = scripts("gpu_all")

STATUSES: dict[str, int] = {}
ENVIRONMENT = {"device": "NVIDIA H200", "date_utc": "2026-01-02T03:04:05", "commit": "c" * 40}
JUNIT = (
    "<testsuites><testsuite>"
    '<testcase classname="tests.a" name="x"/>'
    '<testcase classname="tests.a" name="y"><failure message="m"/></testcase>'
    '<testcase classname="tests.a" name="z"><skipped/></testcase>'
    "</testsuite></testsuites>"
)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Pretend a GPU: steps do not run but end as STATUSES says; gives their command lines."""
    lines: list[list[str]] = []

    def run(line: list[str], cwd: Path) -> SimpleNamespace:
        lines.append(line)
        for argument in line:
            if argument.startswith("--junitxml="):
                Path(argument.partition("=")[2]).write_text(JUNIT)
        return SimpleNamespace(returncode=STATUSES.get(Path(line[1]).stem, 0))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_all, "environment", lambda device: dict(ENVIRONMENT))
    monkeypatch.setattr(subprocess, "run", run)
    STATUSES.clear()
    return lines


def test_gpu_all_runs_every_step(on_gpu: list[list[str]], tmp_path: Path) -> None:
    checkout = tmp_path / "1d-tokenizer"
    (checkout / "modeling").mkdir(parents=True)
    (checkout / "modeling" / "titok.py").touch()
    line = ["--results", str(tmp_path), "--upstream", str(checkout)]
    assert gpu_all.main(line) == 0
    assert on_gpu[0][1:6] == ["-m", "pytest", "-q", "-m", "not slow"]
    steps = ["kernels", "sampling", "reconstruction", "training", "report"]
    assert [line[1] for line in on_gpu[1:]] == [f"bench/{step}.py" for step in steps]
    for step in steps:
        assert (BENCH / f"{step}.py").is_file()
    assert on_gpu[1][2:] == ["--json", str(tmp_path)]
    beside = ["--json", str(tmp_path), "--upstream", str(checkout.resolve())]
    assert all(line[2:] == beside for line in on_gpu[2:5])
    assert on_gpu[5][2:] == []
    (path,) = tmp_path.glob("*.json")
    assert path.name == "nvidia-h200_2026-01-02_cccccccccc_gpu-tests.json"
    record = json.loads(path.read_text())
    assert (record["passed"], record["skipped"]) == (1, 1)
    assert record["failed"] == ["tests.a::y"]


def test_gpu_all_stops_when_tests_are_red(on_gpu: list[list[str]], tmp_path: Path) -> None:
    STATUSES["-m"] = 1
    assert gpu_all.main(["--results", str(tmp_path)]) == 1
    assert len(on_gpu) == 1
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["exit_status"] == 1


def test_gpu_all_goes_on_after_a_benchmark_failed(
    on_gpu: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    STATUSES["kernels"] = 1
    line = ["--quick", "--results", str(tmp_path), "--only", "kernels", "sampling", "training"]
    assert gpu_all.main(line) == 1
    assert [Path(call[1]).stem for call in on_gpu] == ["kernels", "sampling", "training"]
    assert on_gpu[0][-1] == "--quick"
    assert "titok-l-32" in on_gpu[1]
    training, *_ = scripts("training")
    assert training.parse(on_gpu[2][2:]).stages == ["stage1", "generator"]
    assert "failed: kernels" in capsys.readouterr().out


def test_gpu_all_wants_the_checkout_that_it_is_told_of(
    on_gpu: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, gpu_all, ["--upstream", str(tmp_path / "nowhere")], "modeling/titok.py")
    assert on_gpu == []


def test_gpu_all_wants_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_all.main([]) == 2
    assert "wants a CUDA device" in capsys.readouterr().err
