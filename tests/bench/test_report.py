"""Tables from result files: what is chosen, what is computed, what stands where."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.bench_scripts import cells, refused, scripts

report, summaries, tables, harness = scripts("report", "lib.summaries", "lib.tables", "lib.harness")


def marked(*names: str) -> str:
    return "\n".join(f"<!-- results:{n} -->\nold\n<!-- /results:{n} -->" for n in names)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Documents with all markers: the headline, a page of docs, the card; and a results folder."""
    first, card = "headline", "fashion-card"
    rest = [name for name in report.SECTIONS if name not in (first, card)]
    pages = {"README.md": [first], "docs/results/all.md": rest, str(report.CARD): [card]}
    for page, names in pages.items():
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text(f"before\n{marked(*names)}\nafter\n")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    return tmp_path


def case(implementation: str, dtype: str, rate: float, **more: Any) -> dict[str, Any]:
    return {
        "model": "titok-l-32",
        "batch": 8,
        "sampling": {"num_sample_steps": 8},
        "gflop_per_image": {"generator": 100.0, "pixel_decoder": 400.0},
        "paper_a100_images_per_s": 101.6,
        "implementation": implementation,
        "dtype": dtype,
        "mode": "eager",
        "first_call_s": 1.5,
        "weight_bytes": 2**30,
        "peak_bytes": 3 * 2**30,
        "agreement": {"ids_equal": 0.5, "pixel_rms": 0.01},
        "images_per_s": {"median": rate, "p20": rate * 0.9, "p80": rate * 1.1, "repeats": 3},
        "stages_s": {"generator": 1.0, "vit_decoder": 0.05},
    } | more


def record(device: str = "Some CPU", commit: str = "aaaa", day: int = 1, **environment: Any) -> Any:
    return {
        "benchmark": "sampling",
        "environment": {
            "date_utc": f"2026-01-{day:02}T00:00:00+00:00",
            "commit": commit,
            "dirty": False,
            "device": device,
            "threads": 2,
            "torch": "2.14.1",
        }
        | environment,
        "protocol": {"weights": "random"},
        "matmul_flop_per_s": {"fp32-ieee": 1e12, "bf16": 4e12},
        "cases": [
            case("reference", "fp32-ieee", 0.25),
            case("ours", "bf16", 1.0),
            case("upstream", "fp32-ieee", 0.2),
            case("upstream", "bf16", 0.4),
        ],
    }


def save(folder: Path, name: str, content: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content))


def section(folder: Path, benchmark: str) -> str:
    return str(report.section(tables.read(folder), benchmark))


def test_a_row_says_it_all() -> None:
    (row,) = cells(tables.sampling_table(record()), "ours, eager")
    assert row == {
        "model": "titok-l-32",
        "batch": "8",
        "implementation": "ours, eager",
        "dtype": "bf16",
        "steps": "8",
        "samples/s (p20-p80)": "1 (0.9-1.1)",
        "x upstream as shipped": "5.00",
        "x upstream, same dtype": "2.50",
        "of matmul peak": "12%",  # 500 GFLOP/s of 4 TFLOP/s, 12.5 rounded to even
        "peak GiB": "3.00",
        "ids equal": "50.0%",
        "PSNR dB": "40.0",
    }


def test_other_rivals_have_a_column_where_they_were_timed() -> None:
    def of(op: str, by: str, median: float | None = None, **more: float) -> dict[str, Any]:
        key = {"op": op, "model": "L-32", "batch": 8, "dtype": "float32", "work": "forward"}
        timed = {} if median is None else {"seconds": {"median": median}}
        return key | {"by": by} | timed | more

    run = [of("remask", "ours", 0.002, x_upstream=0.5), of("remask", "upstream", 0.001)]
    run += [of("remask", "compiled"), of("remask", "liger-kernel")]
    run += [of("soft_codes", "ours", 0.003), of("soft_codes", "compiled", 0.004)]
    run += [of("soft_codes", "channels-first", 0.005), of("soft_codes", "upstream", 0.006)]
    remask, soft_codes = cells(tables.kernels_table({"cases": run}))
    fixed = ["op", "shape", "batch", "dtype", "pass", "ours ms", "upstream ms", "x upstream"]
    assert list(remask) == [*fixed, "compiled ms", "channels-first ms"]
    timed = ["remask", "L-32", "8", "float32", "forward", "2", "1", "0.50"]
    assert [remask[name] for name in fixed] == timed
    assert (soft_codes["compiled ms"], soft_codes["channels-first ms"]) == ("4", "5")
    assert remask["compiled ms"] == "not measured"  # it was asked for, and has no time
    assert remask["channels-first ms"] == "-"  # there is no such rival


def test_caption_says_whose_weights_are_trained(tmp_path: Path) -> None:
    one = record()
    save(tmp_path, "a", one)
    assert "; random weights." in report.section(tables.read(tmp_path), "sampling")
    for row in one["cases"][:2]:
        row.update(model="fashion-16", weights=tables.IN_PACKAGE)
    save(tmp_path, "a", one)
    assert "; random weights, of fashion-16 those in the package." in section(tmp_path, "sampling")
    save(tmp_path, "a", record(dirty=True))
    text = section(tmp_path, "sampling")
    assert "commit aaaa with local changes, 2026-01-01; random weights" in text


def test_details_for_the_terminal() -> None:
    (row,) = cells(tables.sampling_table(record(), details=True), "ours, eager")
    assert row["x reference"] == "4.00"
    assert (row["generator ms"], row["ViT decoder ms"]) == ("1,000", "50.00")
    assert row["pixel decoder ms"] == "not measured"
    assert row["paper's figure: A100"] == "102"


def test_upstream_as_shipped_is_tf32_on_cuda() -> None:
    gpu = record("Some GPU", driver="550")
    (row,) = cells(tables.sampling_table(gpu), "ours, eager")
    assert row["x upstream as shipped"] == "not measured"
    gpu["cases"].append(case("upstream", "tf32", 0.8))
    (row,) = cells(tables.sampling_table(gpu), "ours, eager")
    assert row["x upstream as shipped"] == "1.25"
    assert cells(summaries.sampling_summary(gpu))[0]["ours, eager"] == "1 (1.25x, 2.50x)"


def test_gaps_and_failures_are_named() -> None:
    run = record()
    run["cases"] = [case("ours", "bf16", 1.0, peak_bytes=None), case("ours", "fp32-ieee", 1.0)]
    del run["cases"][1]["images_per_s"]
    run["cases"][1]["error"] = "OutOfMemoryError"
    first, second = cells(tables.sampling_table(run))
    assert first["x upstream as shipped"] == first["peak GiB"] == "not measured"
    assert second["samples/s (p20-p80)"] == "failed (OutOfMemoryError)"


def test_ratios_stay_within_model_batch_and_settings() -> None:
    run = record()
    run["cases"] = [
        case("ours", "bf16", 1.0),
        case("upstream", "fp32-ieee", 0.1, batch=1),
        case("upstream", "fp32-ieee", 0.1, sampling={"num_sample_steps": 64}),
    ]
    assert cells(tables.sampling_table(run))[0]["x upstream as shipped"] == "not measured"


def test_newest_commit_of_each_device(tmp_path: Path) -> None:
    old, new, more = record(day=1), record(commit="bbbb", day=2), record(commit="bbbb", day=3)
    old["cases"] = [case("ours", "bf16", 111.0)]
    new["cases"] = [case("ours", "bf16", 222.0), case("ours", "bf16", 333.0, batch=1)]
    more["cases"] = [case("ours", "bf16", 444.0)]
    for name, content in [("a", old), ("b", new), ("c", more), ("d", record("Other", day=1))]:
        save(tmp_path, name, content)
    save(tmp_path, "kernels", {"rows": []})
    save(tmp_path, "list", [1, 2])
    first, second = report.by_device(tables.read(tmp_path), "sampling")
    devices = [one["environment"]["device"] for one in (first, second)]
    assert devices == ["Other", "Some CPU"]
    assert [c["images_per_s"]["median"] for c in second["cases"]] == [444.0, 333.0]
    assert json.loads((tmp_path / "c.json").read_text()) == more
    assert report.by_device(tables.read(tmp_path), "reconstruction") == []


def test_the_papers_column_and_ours(tmp_path: Path) -> None:
    text = section(tmp_path, "sampling")
    assert text.startswith("Samples/s beside the paper's")
    (row,) = cells(text, "titok-l-32")
    assert row["paper's figure: A100"] == "102"
    assert row["ours: A100, best"] == "not measured"
    save(tmp_path, "a", record("NVIDIA A100-SXM4-80GB", driver="550"))
    text = section(tmp_path, "sampling")
    (row,) = cells(text[text.index("beside the paper's") :], "titok-l-32")
    assert row["ours: A100, best"] == "1"  # ours, not upstream's


def test_check_notices_what_report_repairs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, page = root / "bench" / "results", root / "docs" / "results" / "all.md"
    save(results, "a", record())
    words = ["--root", str(root)]
    assert report.main(["--check", *words]) == 1
    out = capsys.readouterr().out
    for name in ("README.md", "docs/results/all.md", str(report.CARD)):
        assert f"{name} differs" in out
    assert "old" in page.read_text()
    assert report.main(words) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "1 (0.9-1.1)" in text
    assert "Not measured yet." in text  # reconstruction
    assert "1 samples/s in bfloat16, mode eager" in (root / "README.md").read_text()
    assert report.main(["--check", *words]) == 0
    faster = copy.deepcopy(record())
    faster["cases"][0]["images_per_s"]["median"] = 9.0  # the reference: no headline
    save(results, "a", faster)
    assert report.main(["--check", *words]) == 1
    assert capsys.readouterr().out.startswith("docs/results/all.md differs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no markers", "wants <!-- results:headline --> and <!-- /results:headline --> once"),
        (marked("headline", "headline"), "found 2 times"),
        (marked("headline", "sampling"), "results:sampling -->"),  # once more, in another document
        (marked("headline", "speed"), "no results are called 'speed'; known: sampling"),
        ("<!-- results:headline -->", "found 0 times"),
    ],
)
def test_every_section_stands_once(
    root: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (root / "README.md").write_text(text)
    refused(capsys, report, ["--root", str(root)], message)
    assert (root / "README.md").read_text() == text


def test_every_committed_file_can_be_shown(root: Path) -> None:
    files = tables.read()
    assert {record["benchmark"] for _, record in files} >= set(report._PER_RUN)
    for path, one in files:  # the report shows the newest of each device; here each is alone
        text = report.section([(path, one)], one["benchmark"])
        assert "Not measured yet." not in text, path.name
        assert one["environment"]["device"] in text
    assert report.main(["--root", str(root), "--results", str(tables.RESULTS)]) == 0
    for page in report.documents(root):
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / link).is_file(), link
    assert "](" not in (root / report.CARD).read_text()  # it is installed without the pictures


def test_rows_that_were_tried_and_not_kept_are_still_shown() -> None:
    shown = [tables.waterfall_table(r) for _, r in tables.read() if r["benchmark"] == "waterfall"]
    assert any("| + masked-rows " in text for text in shown)


def scaling_record(model: str, date: str, speed: float) -> dict[str, Any]:
    made: dict[str, Any] = copy.deepcopy(record()) | {"benchmark": "scaling"}
    made["environment"]["date_utc"] = date
    case: dict[str, Any] = {"axis": "batch", "model": model, "batch": 1, "tokens": 32, "side": 256}
    case |= {"steps": 8, "threads": None, "ranks": 1, "peak_bytes": 2**30}
    rate = {"median": speed, "p20": speed, "p80": speed}
    return made | {"cases": [case | {"images_per_s": rate}]}


def test_files_that_stand_alone_show_the_newest_of_each_device(tmp_path: Path) -> None:
    save(tmp_path, "old", scaling_record("titok-l-32", "2026-01-01T00:00:00", 3.0))
    save(tmp_path, "new", scaling_record("titok-l-32", "2026-01-02T00:00:00", 7.0))
    text = section(tmp_path, "scaling")
    assert "| 7 (7-7)" in text
    assert "| 3 (3-3)" not in text
    assert "![" not in text
    (tmp_path / "new.svg").write_text("<svg/>")
    assert "![scaling](bench/results/new.svg)" in section(tmp_path, "scaling")
    elsewhere = report.section(tables.read(tmp_path), "scaling", "../../bench/results")
    assert "![scaling](../../bench/results/new.svg)" in elsewhere
    assert section(tmp_path, "peers") == "Not measured yet."


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


def test_kernels_in_a_line_per_op() -> None:
    def of(op: str, by: str, ratio: float | None) -> dict[str, Any]:
        return {"op": op, "by": by, "x_upstream": ratio}

    measured = [of("remask", "ours", r) for r in (0.5, 4.0, 2.0)] + [of("remask", "compiled", 9.0)]
    (row,) = cells(summaries.kernels_summary({"cases": [*measured, of("soft", "ours", None)]}))
    ratios = {"slowest": "0.50x", "median": "2.00x", "fastest": "4.00x"}
    assert row == {"op": "remask", "cases": "3"} | ratios
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


def test_the_headline_and_its_table_are_of_the_newest_device_and_largest_batch() -> None:
    old, new = record("Old GPU", day=1, driver="1"), record(day=2)
    new["cases"] += [case("ours", "bf16", 2.0, mode="int8"), case("ours", "bf16", 1.5, mode="fast")]
    new["cases"] += [case("ours", "bf16", 99.0, batch=1), case("ours", "fp32-ieee", 50.0)]
    assert summaries.headline([old, new]) == (
        "TiTok-L-32 at batch 8 on Some CPU, 2 threads: "
        "1.5 samples/s in bfloat16, mode fast (7.50 times upstream as shipped, 3.75 times upstream "
        "under autocast); 2 samples/s in int8 (10.00 times upstream as shipped, 5.00 times "
        "upstream under autocast)."
    )
    text = summaries.fast_modes([old, new])
    assert text.startswith("titok-l-32, bfloat16, batch 8; Some CPU, 2 threads.")
    eager, fast, int8 = cells(text)
    assert fast == {
        "mode": "fast",
        "samples/s": "1.5",
        "x upstream as shipped": "7.50",
        "x upstream under autocast": "3.75",
        "ids equal": "50.0%",
        "PSNR dB": "40.0",
    }
    assert (eager["samples/s"], int8["x upstream as shipped"]) == ("1", "10.00")


def test_headline_and_minutes_say_what_is_not_measured() -> None:
    assert summaries.headline([]) == "TiTok-L-32: not measured."
    assert [row["samples/s"] for row in cells(summaries.fast_modes([]))] == ["not measured"] * 3
    alone = record()
    alone["cases"] = [case("ours", "bf16", 1.0)]
    assert "(not measured times upstream as shipped" in summaries.headline([alone])
    assert summaries.headline([alone]).endswith("; int8: not measured.")
    assert summaries.training_minutes(None) == "Minutes of training: not measured."


def test_minutes_of_training_in_a_line() -> None:
    run = record() | {"cases": [{"run": "vqgan", "minutes": 7.4}, {"run": "stage1", "minutes": 32}]}
    said = summaries.training_minutes(run)
    assert said == "Minutes of training on Some CPU, 2 threads: vqgan 7, stage1 32; 39 in all."


def test_the_committed_documents_agree_with_the_committed_results() -> None:
    assert report.main(["--check"]) == 0
