"""The benchmark harness: order of calls, arithmetic, restored switches, atomic files."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.bench_scripts import script_apart

ROOT = Path(__file__).resolve().parents[2]
harness = script_apart("lib.harness")


class Clock:
    """Stands in for `time`: only `spend` moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def spend(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds

        return call


def test_environment_is_complete_and_holds_nothing_private() -> None:
    record = harness.environment("cpu")
    text = json.dumps(record, allow_nan=False)
    keys = "date_utc commit dirty device cpu instruction_sets threads python torch triton numpy"
    assert set(record) == set(keys.split())
    assert record["torch"] == torch.__version__
    assert record["date_utc"].endswith("+00:00")
    assert str(ROOT) not in text
    assert str(Path.home()) not in text


def test_environment_of_a_gpu_reads_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="Some GPU", total_memory=80, uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    answers = {"nvidia-smi": "550.1, 700.00 W"}
    monkeypatch.setattr(harness, "command_output", lambda *command: answers.get(command[0]))
    record = harness.environment("cuda")
    read = record["device"], record["driver"], record["power_limit"]
    assert read == ("Some GPU", "550.1", "700.00 W")
    assert "1234" not in json.dumps(record)
    assert record["commit"] is None
    assert record["dirty"] is None
    answers.clear()
    assert harness.environment("cuda")["driver"] is None


def git(folder: Path, *words: str) -> str:
    user = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", *user, *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_dirty_sees_changes_but_not_result_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "lib").mkdir()
    (tmp_path / "model.py").write_text("x = 1")
    (tmp_path / "bench" / "results" / "old.json").write_text("{}")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "bench" / "lib" / "harness.py"))
    (tmp_path / "bench" / "results" / "new.json").write_text("{}")
    record = harness.environment("cpu")
    assert record["commit"] == git(tmp_path, "rev-parse", "HEAD").strip()
    assert record["dirty"] is False
    (tmp_path / "new_module.py").write_text("y = 2")
    assert harness.environment("cpu")["dirty"] is True


def test_rounds_rotate_and_warmup_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(), []
    monkeypatch.setattr(harness, "time", clock)

    def candidate(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            # the first call of each is slow and must not be among the results
            clock.now += 100 if calls.count(name) == 1 else seconds

        return call

    candidates = {name: candidate(name, s) for name, s in [("a", 1.0), ("b", 2.0), ("c", 4.0)]}
    times = harness.time_interleaved(candidates, repeats=4, warmup=1, device="cpu")
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc" + "bca"
    assert times == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [4.0] * 4}


def test_a_failing_candidate_is_heard_and_collection_is_back_on() -> None:
    import gc

    def fail() -> None:
        assert not gc.isenabled()
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        harness.time_interleaved({"a": fail}, repeats=1, warmup=0, device="cpu")
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("names", "repeats", "warmup"), [([], 1, 0), (["a"], 0, 0), (["a"], 1, -1)]
)
def test_protocol_is_checked(names: list[str], repeats: int, warmup: int) -> None:
    candidates = dict.fromkeys(names, lambda: None)
    with pytest.raises(ValueError, match="time_interleaved wants"):
        harness.time_interleaved(candidates, repeats=repeats, warmup=warmup, device="cpu")


def test_timed_waits_for_the_device_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pending = Clock(), [7.0]

    def wait(device: object) -> None:
        clock.now += sum(pending)
        pending.clear()

    monkeypatch.setattr(harness, "time", clock)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    # 7 s queued earlier are not this call's; the 3 s that it queues are
    assert harness.timed(lambda: pending.append(3.0), "cuda") == 3.0


def test_summary_of_known_numbers() -> None:
    got = harness.summary([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert got == {"median": 3.5, "p20": 2.0, "p80": 5.0, "repeats": 6}
    assert harness.summary([2.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0, "repeats": 1}
    with pytest.raises(ValueError, match="summary wants"):
        harness.summary([])


def test_matmul_rate_counts_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(harness, "time", clock)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: clock.spend(1e-6 * a.shape[0])())
    # time grows with n, work with n^3: the largest size is the best, 2 n^3 / (1e-6 n)
    assert harness.matmul_peak("cpu", torch.float32) == pytest.approx(2 * 2048**2 * 1e6)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no way to reset it")
def test_peak_memory_sees_what_was_freed_again() -> None:
    size = 200 << 20

    def touch() -> None:
        torch.ones(size, dtype=torch.uint8)

    idle, high, idle_again = (
        harness.peak_memory(fn, "cpu") for fn in (lambda: None, touch, lambda: None)
    )
    assert high - idle > 0.9 * size
    assert high - idle_again > 0.9 * size  # one call's peak is not carried into the next


def test_peak_memory_says_when_it_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    monkeypatch.setattr(harness, "resident", {"VmHWM": 300, "VmRSS": 200}.__getitem__)
    assert harness.peak_memory(lambda: ran.append(1), "cpu") is None
    assert ran == []


def switches() -> tuple[Any, ...]:
    cuda = torch.backends.cuda.matmul.allow_tf32
    return torch.get_float32_matmul_precision(), cuda, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("name", "dtype", "wanted"),
    [
        ("fp32-ieee", torch.float32, ("highest", False, False)),
        ("tf32", torch.float32, ("high", True, True)),
        ("bf16", torch.bfloat16, ("highest", False, False)),
    ],
)
@pytest.mark.parametrize("start", ["highest", "high"])
def test_precision_sets_and_restores(name: str, dtype: Any, wanted: Any, start: str) -> None:
    default = switches()
    torch.set_float32_matmul_precision(start)
    before = switches()
    try:
        with harness.precision(name) as got:
            assert got == dtype
            assert switches() == wanted
        assert switches() == before
        with pytest.raises(ZeroDivisionError), harness.precision(name):
            _ = 1 / 0
        assert switches() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert switches() == default


def test_precision_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="'fp8'"), harness.precision("fp8"):
        pass


def test_write_json_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "results" / "run.json"
    harness.write_json(path, {"a": [1.5, None]})
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
    for bad, error in [({"a": float("nan")}, ValueError), ({"a": object()}, TypeError)]:
        with pytest.raises(error):
            harness.write_json(path, bad)
    assert json.loads(path.read_text()) == {"a": [1.5, None]}
    assert os.listdir(path.parent) == ["run.json"]


def test_table_aligns_and_names_what_is_missing() -> None:
    rows = [{"model": "l-32", "rate": 1234.56}, {"model": "a|b", "rate": 0.123456}, {"rate": None}]
    assert harness.table(rows, ["model", "rate"]).splitlines() == [
        "| model        | rate         |",
        "| ------------ | ------------ |",
        "| l-32         | 1,235        |",
        "| a\\|b         | 0.123        |",
        "| not measured | not measured |",
    ]
    assert harness.table([], ["n"]) == "| n |\n| - |"
