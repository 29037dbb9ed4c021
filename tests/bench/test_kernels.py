"""The kernel benchmark: rivals that do the same work, judges that notice, rows, exit status."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bench_scripts import script_apart, scripts

CPU = torch.device("cpu")
# under another name: `kernels` is taken by other projects
bench = script_apart("kernels")
# the very modules that the script uses: a second copy would have classes of its own
cases, ops, timing = (sys.modules[f"lib.kernels.{name}"] for name in ("cases", "ops", "timing"))
Spec, Rival, Case = cases.Spec, cases.Rival, cases.Case


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models beside the published ones; pixel codes cut down."""
    monkeypatch.setitem(cases.MODELS, "tiny", cases.Model(6, 40, 5, 16, "cosine"))
    monkeypatch.setitem(cases.MODELS, "flat", cases.Model(6, 40, 5, 16, "euclidean"))
    monkeypatch.setattr(ops, "PIXEL_CODES", 24)
    monkeypatch.setattr(ops, "PIXEL_CHANNELS", 8)


def small_specs() -> list[Any]:
    f32, bf16 = torch.float32, torch.bfloat16
    specs = [Spec("remask", "tiny", 3, f32)]
    for model in ("tiny", "flat"):
        specs.append(Spec("nearest_code", model, 3, f32))
        specs.append(Spec("nearest_code_stats", model, 3, f32, True))
    for dtype in (f32, bf16):
        specs += [Spec(op, "tiny", 3, dtype) for op in ("guided_sample", "lm_head_sample")]
        specs.append(Spec("masked_cross_entropy", "tiny", 3, dtype, True))
        specs.append(Spec("soft_codes", "tiny", 2, dtype))
        specs += [Spec("group_norm_silu", "64x4", 2, dtype, way) for way in (False, True)]
    return specs


def spoilt(out: Any) -> Any:
    """The result with its first number moved: an id to its neighbour, a value by a tenth."""
    if not isinstance(out, torch.Tensor):
        return (spoilt(out[0]), *out[1:])
    out = out.detach().clone()
    if out.is_floating_point():
        return out * 1.1
    last = out.select(0, len(out) - 1)
    last.copy_(torch.where(last == 0, 1, last - 1))
    return out


@pytest.mark.parametrize("spec", small_specs(), ids=str)
def test_rivals_do_the_same_work_and_judges_notice(spec: Any) -> None:
    case = ops.BUILDERS[spec.op](spec, CPU)
    assert {"ours", "reference", "upstream"} <= set(case.rivals)
    for rival in case.rivals.values():
        rival.check()
        rival.call()
    assert case.bytes_min > 0
    assert case.flops > 0
    out = case.rivals["ours"].call()
    case.judge(out)
    with pytest.raises(AssertionError):
        case.judge(spoilt(out))


def test_judge_of_scores() -> None:
    case = ops.BUILDERS["guided_sample"](Spec("guided_sample", "tiny", 3, torch.float32), CPU)
    ids, scores = case.rivals["ours"].call()
    with pytest.raises(AssertionError, match="a score is wrong"):
        case.judge((ids, scores * 1.01))


def test_every_kernel_is_in_the_plan() -> None:
    (offline,) = scripts("offline")
    assert set(ops.BUILDERS) == set(offline.kernel_modules()) - {"philox"}
    for on_cuda in (False, True):
        for quick in (False, True):
            assert {spec.op for spec in bench.plan(on_cuda, quick)} == set(ops.BUILDERS)
    assert {spec.batch for spec in bench.plan(True, False)} == {1, 8, 128}


def fake_case(*, ours: str = "right", other: str = "right") -> Any:
    """A case of no work."""

    def rival(kind: str) -> Any:
        def check() -> None:
            if kind == "wrong":
                raise AssertionError("off by 3")
            if kind == "broken":
                raise RuntimeError("no such instruction")

        return Rival(lambda: torch.zeros(2), check)

    rivals = {"ours": rival(ours), "reference": rival("right"), "upstream": rival(other)}
    return Case(rivals, lambda out: None, 1e3, 1e6, absent={"liger-kernel": "not installed"})


@pytest.fixture
def quick_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Run the script on one fake case: exit status, rows by implementation."""

    def run(case: Any) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(bench, "plan", lambda *a: [Spec("remask", "tiny", 1, torch.float32)])
        monkeypatch.setitem(ops.BUILDERS, "remask", lambda spec, device: case)
        peak = {"source": "measured", "gbps": 10.0, "tflops": {"float32": 1.0}}
        monkeypatch.setattr(bench, "peaks", lambda device: peak)
        monkeypatch.setitem(timing.FLUSH_BYTES, "cpu", 64)
        monkeypatch.setattr(bench, "QUICK_BUDGET_S", 0.001)
        path = tmp_path / "out.json"
        status = bench.main(["--quick", "--device", "cpu", "--json", str(path)])
        record = json.loads(path.read_text())
        assert record["benchmark"] == "kernels"
        assert record["environment"]["torch"] == torch.__version__
        return status, {row["by"]: row for row in record["cases"]}

    return run


def test_a_right_case(quick_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = quick_run(fake_case())
    assert status == 0
    for name in ("ours", "reference", "upstream"):
        assert rows[name]["checked"] is True
        assert rows[name]["status"] == "ok"
        assert rows[name]["seconds"]["repeats"] >= timing.MIN_ROUNDS
    assert rows["liger-kernel"]["status"] == "not installed"
    assert rows["compiled"]["status"] == "not measured"
    assert "seconds" not in rows["compiled"]
    assert "not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "status"), [("wrong", "wrong: off by 3"), ("broken", "failed: RuntimeError")]
)
def test_what_fails_is_not_timed(
    quick_run: Callable[..., Any], kind: str, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_status, rows = quick_run(fake_case(ours=kind))
    assert exit_status == 1
    assert rows["ours"]["status"] == status
    assert rows["upstream"]["status"] == "not measured: ours failed"
    assert not any("seconds" in row or row["checked"] for row in rows.values())
    assert "NOT RIGHT: remask" in capsys.readouterr().out

    exit_status, rows = quick_run(fake_case(other=kind))
    assert exit_status == 0
    assert rows["upstream"]["status"] == status
    assert "seconds" not in rows["upstream"]
    assert rows["ours"]["x_upstream"] is None
    assert "seconds" in rows["reference"]


def test_rates() -> None:
    def rows(seconds: float) -> list[dict[str, Any]]:
        shared = {"dtype": "float32", "bytes_min": 4e6, "flops": 3e9, "op": "remask"}
        shared |= {"model": "L-32", "batch": 8, "work": "forward"}
        made = [
            shared | {"by": by, "seconds": {"median": median}}
            for by, median in (("ours", seconds), ("upstream", 1e-3))
        ]
        made.append({"by": "liger-kernel"})
        bench.add_rates(made, {"gbps": 8.0, "tflops": {"float32": 2.0}})
        return made

    ours = rows(2e-3)[0]
    assert ours["gbps"] == pytest.approx(2.0)
    # arithmetic, 1.5 ms, is the floor: the bytes take 0.5 ms
    assert ours["share_of_peak"] == pytest.approx(0.75)
    assert ours["x_upstream"] == pytest.approx(0.5)
    slow = ["remask L-32 B=8 float32 forward: 0.50x"]
    assert bench.slower_than_upstream(rows(2e-3)) == slow
    assert bench.slower_than_upstream(rows(1.02e-3)) == []


def test_rounds_are_shuffled_and_warm_up_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.FLUSH_BYTES, "cpu", 8)
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds, on_host = timing.time_shuffled(calls, 20, CPU)
    rounds = [tuple(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert len(rounds) == 21
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 20, "b": 20, "c": 20}
    assert on_host == {}


def test_time_between_device_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 5.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    device_s, host_s = timing._device_time(lambda: log.append("call"))
    assert log == ["record", "call", "record", "wait"]
    assert device_s == 5e-3
    assert 0 <= host_s < 1


def test_peaks_of_a_known_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    peak = timing.peaks(torch.device("cuda"))
    assert peak["source"] == "data sheet"
    assert peak["gbps"] == 4800.0
    assert set(timing.DATA_SHEETS.values()) <= set(timing.DEVICES)


@pytest.mark.slow
def test_compiled_reference() -> None:
    case = ops.BUILDERS["soft_codes"](Spec("soft_codes", "tiny", 2, torch.float32), CPU)
    case.compiled().check()
    broken = replace(case, judge=lambda out: pytest.fail("judged"))
    with pytest.raises(pytest.fail.Exception, match="judged"):
        broken.compiled().check()
