"""bench/recipe_times.py on logs with known times."""

import json
from pathlib import Path

import pytest
from support.bench_scripts import scripts
from test_report import cells

(recipe_times,) = scripts("recipe_times")


def write_log(folder: Path, begin: float, per_update: float, steps: tuple[int, ...]) -> None:
    folder.mkdir()
    lines = [{"step": step, "time": begin + per_update * step, "loss": 1.0} for step in steps]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_minutes_of_each_run_and_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path / "stage1", 5000.0, 3.0, (20, 40, 100))
    write_log(tmp_path / "vqgan", 1000.0, 6.0, (10, 10, 200))
    (tmp_path / "tokens").mkdir()  # no run
    first, second = recipe_times.times_of(tmp_path)
    assert (first["run"], first["updates"], first["started"]) == ("vqgan", 200, 1000.0)
    assert (first["minutes"], second["minutes"]) == pytest.approx((20.0, 5.0))
    assert recipe_times.main([str(tmp_path), "--json", str(tmp_path / "r.json")]) == 0
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
    with pytest.raises(SystemExit):
        recipe_times.main([str(tmp_path)])
    assert "wants folders with a log.jsonl in each" in capsys.readouterr().err
    write_log(tmp_path / "vqgan", 0.0, 1.0, steps)
    with pytest.raises(ValueError, match="holds no two updates"):
        recipe_times.times_of(tmp_path)
