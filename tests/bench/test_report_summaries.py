"""What stands before the README's long tables, and that these wait for a click."""

from typing import Any

from support.bench_scripts import scripts
from test_report import case, cells, record

summaries, harness = scripts("lib.report_summaries", "lib.harness")


def rows(count: int) -> str:
    return str(harness.table([{"a": i, "b": f"x{i}"} for i in range(count)], ("a", "b")))


def test_long_tables_are_folded_and_nothing_is_lost() -> None:
    short, long = rows(summaries._LONG), rows(summaries._LONG + 1)
    text = f"before\n\n{short}\n\nbetween\n\n{long}\n\nafter"
    folded = summaries.fold_tables(text)
    count = summaries._LONG + 1
    opened, closed = f"<details>\n<summary>All {count} rows</summary>\n\n", "\n\n</details>"
    assert folded == f"before\n\n{short}\n\nbetween\n\n{opened}{long}{closed}\n\nafter"
    assert summaries.fold_tables(long) == opened + long + closed
    assert summaries.fold_tables("no | table") == "no | table"


def test_sampling_in_a_line_per_model_and_batch() -> None:
    run: dict[str, Any] = record()
    run["cases"] += [case("ours", "bf16", 2.0, mode="int8"), case("ours", "fp32-ieee", 9.0)]
    run["cases"] += [case("ours", "bf16", 3.0, batch=1)]
    eight, one = cells(summaries.sampling_summary(run))
    assert eight == {
        "model": "titok-l-32",
        "batch": "8",
        "upstream": "0.2",
        "upstream, autocast": "0.4",
        "ours, eager": "1 (5.00x, 2.50x)",
        "ours, int8": "2 (10.00x, 5.00x)",
    }
    assert (one["ours, eager"], one["upstream"]) == ("3", "not measured")
    assert one["ours, int8"] == "not measured"


def test_upstream_as_shipped_has_tf32_where_there_is_a_driver() -> None:
    run: dict[str, Any] = record(driver="550")
    assert cells(summaries.sampling_summary(run))[0]["upstream"] == "not measured"
    run["cases"].append(case("upstream", "tf32", 0.8))
    assert cells(summaries.sampling_summary(run))[0]["ours, eager"] == "1 (1.25x, 2.50x)"


def test_kernels_in_a_line_per_op() -> None:
    def of(op: str, by: str, ratio: float | None) -> dict[str, Any]:
        return {"op": op, "by": by, "x_upstream": ratio}

    measured = [of("remask", "ours", r) for r in (0.5, 4.0, 2.0)] + [of("remask", "compiled", 9.0)]
    (row,) = cells(summaries.kernels_summary({"cases": [*measured, of("soft", "ours", None)]}))
    assert row == {
        "op": "remask", "cases": "3", "slowest": "0.50x", "median": "2.00x", "fastest": "4.00x",
    }  # fmt: skip
    assert summaries.kernels_summary({"cases": []}) == ""


def test_peers_beside_our_fastest() -> None:
    ours = [
        {"model": "titok-l-32", "mode": "eager", "speed_up": 2.0, "paper_ratio": 7.0},
        {"model": "titok-b-64", "mode": "fast", "speed_up": 3.0, "paper_ratio": 8.0},
    ]
    system = {"generator": "DiT-XL/2", "side": 256, "steps": 250}
    (row,) = cells(summaries.peers_summary({"cases": [system | {"ours": ours}, system]}))
    assert row["ours"] == "titok-b-64, fast"
    assert (row["times faster"], row["paper's A100"]) == ("3", "8")
    assert summaries.peers_summary({"cases": [system]}) == ""


def test_worst_predictions_of_the_cost_model() -> None:
    def line(error: float, fitted: bool, stage: str = "total") -> dict[str, Any]:
        return {"stage": stage, "error": error, "fitted": fitted}

    lines = [line(-0.12, True), line(0.05, False), line(-0.06, False), line(0.5, False, "encoder")]
    said = summaries.cost_model_summary({"cost_model": {"lines": lines}})
    assert said == "Totals are predicted within 6.0%, those of the fit itself within 12.0%."
    assert "within not measured" in summaries.cost_model_summary({"cost_model": {"lines": []}})
