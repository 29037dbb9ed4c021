"""The benchmark of first calls: two fresh processes for each mode, and the arithmetic on them."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bench_scripts import scripts

from titok_fast import PRESETS
from titok_fast.backends.techniques import check_techniques, resolve_fast

first_call, options = scripts("first_call", "lib.options")

CALLS = ("import_s", "load_s", "compile_s", "first_call_s", "next_call_s")


@pytest.fixture(autouse=True)
def _presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_call, "PRESETS", dict(PRESETS))


def test_fresh_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    words = ["--tiny", "--batch-size", "1", "--steps", "2", "--threads", "1"]
    words += ["--modes", "eager", "--device", "cpu", "--json"]
    assert first_call.main([*words, str(path)]) == 0
    record = json.loads(path.read_text())
    assert set(record) == {"benchmark", "environment", "protocol", "cases"}
    (case,) = record["cases"]
    named = {k: case[k] for k in ("model", "batch", "dtype", "mode", "techniques")}
    assert list(named.values()) == ["tiny", 1, "bfloat16", "eager", []]
    for name in ("cold", "warm"):
        seconds = case[name]
        assert all(seconds[field] > 0 for field in CALLS)
        assert seconds["process_s"] > sum(seconds[field] for field in CALLS)
        assert seconds["extra_s"] == seconds["first_call_s"] - seconds["next_call_s"]
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("|")[4].strip() for line in shown[2:]] == ["cold", "warm", "warm / cold"]


def test_the_second_process_has_the_folder_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], **options: Any) -> Any:
        folder = Path(env["XDG_CACHE_HOME"])
        assert [f.name for f in folder.iterdir()] == (["kept"] if calls else [])
        (folder / "kept").touch()
        calls.append((command, env))
        scale = 4.0 if len(calls) == 1 else 1.0
        seconds = dict(zip(CALLS, (1.0, 2.0, 2.0, 10.0 * scale + 5.0, 5.0), strict=True))
        return subprocess.CompletedProcess(command, 0, f"noise\n{json.dumps(seconds)}\n", "")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    monkeypatch.setattr(first_call.subprocess, "run", run)
    case = first_call.measure(first_call.parse(["--tiny", "--device", "cpu"]), "int8")
    assert case["warm_over_cold"] == {"extra_s": 10 / 40, "start_s": 12 / 42}
    (command, env), (again, same) = calls
    assert (command, env) == (again, same)
    assert "TORCHINDUCTOR_CACHE_DIR" not in env
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    assert Path(env["TRITON_CACHE_DIR"]).parent == Path(env["XDG_CACHE_HOME"])
    assert not Path(env["XDG_CACHE_HOME"]).exists()
    child = first_call.parse(command[2:])  # behind python and the script
    assert (child.child, child.tiny, child.modes) == (True, True, ["int8"])


def test_a_child_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "no compiler")
    monkeypatch.setattr(first_call.subprocess, "run", lambda *given, **options: failed)
    args = first_call.parse(["--device", "cpu"])
    with pytest.raises(RuntimeError, match="process for mode 'int8' ended with:\nno compiler"):
        first_call.measure(args, "int8")


def test_every_mode_of_a_device_fits_it() -> None:
    for device, modes in first_call.MODES.items():
        names = [options.techniques(mode, device, torch.bfloat16) for mode in modes]
        for chosen in names:
            check_techniques(chosen, device, torch.bfloat16)
        assert len(set(names)) == len(names)
        assert {(), resolve_fast(True, device, torch.bfloat16)} < set(names)
