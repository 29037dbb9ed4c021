"""Tables from result files: what is chosen, what is computed, what --check notices."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from support.bench_scripts import scripts

(report,) = scripts("report")

MARKERS = "\n".join(
    f"<!-- results:{name} -->\nold\n<!-- /results:{name} -->"
    for name in (*report._MERGED, *report._WHOLE)
)


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


def cells(text: str, *wanted: str) -> list[dict[str, str]]:
    """Rows of the first table of `text` that hold all of some words, by column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = [dict(zip(split[0], row, strict=True)) for row in split[2:] if len(row) == len(split[0])]
    return [row for row in rows if all(word in row.values() for word in wanted)]


def save(folder: Path, name: str, content: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content))


def section(folder: Path, benchmark: str) -> str:
    return str(report.section(report.read(folder), benchmark))


def test_a_row_says_it_all() -> None:
    (row,) = cells(report.sampling_table(record()), "ours, eager")
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


def test_a_kernel_row_sets_ours_beside_upstream() -> None:
    key = {"op": "remask", "model": "L-32", "batch": 8, "dtype": "float32", "work": "forward"}
    ours = key | {"by": "ours", "seconds": {"median": 0.002}, "x_upstream": 0.5}
    others = [key | {"by": "upstream", "seconds": {"median": 0.001}}, key | {"by": "compiled"}]
    (row,) = cells(report.kernels_table({"cases": [ours, *others]}), "remask")
    assert row == {
        "op": "remask", "shape": "L-32", "batch": "8", "dtype": "float32", "pass": "forward",
        "ours ms": "2", "upstream ms": "1", "x upstream": "0.50",
    }  # fmt: skip


def test_other_rivals_have_a_column_where_they_were_timed() -> None:
    def of(op: str, by: str, median: float | None = None) -> dict[str, Any]:
        key = {"op": op, "model": "L-32", "batch": 8, "dtype": "float32", "work": "forward"}
        timed = {} if median is None else {"seconds": {"median": median}}
        return key | {"by": by} | timed

    run = [of("remask", "ours", 0.002), of("remask", "compiled"), of("remask", "liger-kernel")]
    run += [of("soft_codes", "ours", 0.003), of("soft_codes", "compiled", 0.004)]
    run += [of("soft_codes", "channels-first", 0.005), of("soft_codes", "upstream", 0.006)]
    remask, soft_codes = cells(report.kernels_table({"cases": run}))
    fixed = ["op", "shape", "batch", "dtype", "pass", "ours ms", "upstream ms", "x upstream"]
    assert list(remask) == [*fixed, "compiled ms", "channels-first ms"]
    assert (soft_codes["compiled ms"], soft_codes["channels-first ms"]) == ("4", "5")
    assert remask["compiled ms"] == "not measured"  # it was asked for, and has no time
    assert remask["channels-first ms"] == "-"  # there is no such rival


def test_every_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    read = Path.read_text

    def counted(path: Path, *args: Any, **options: Any) -> str:
        seen.append(path.name)
        return read(path, *args, **options)

    for name in ("a", "b"):
        save(tmp_path, name, record())
    (tmp_path / "README.md").write_text(MARKERS)
    monkeypatch.setattr(Path, "read_text", counted)
    words = ["--readme", str(tmp_path / "README.md"), "--results", str(tmp_path)]
    assert report.main(words) == 0
    assert sorted(seen) == ["README.md", "a.json", "b.json"]


def test_caption_says_whose_weights_are_trained(tmp_path: Path) -> None:
    one = record()
    save(tmp_path, "a", one)
    assert "; random weights." in report.section(report.read(tmp_path), "sampling")
    for row in one["cases"][:2]:
        row.update(model="fashion-16", weights=report.IN_PACKAGE)
    save(tmp_path, "a", one)
    text = report.section(report.read(tmp_path), "sampling")
    assert "; random weights, of fashion-16 those in the package." in text


def test_details_for_the_terminal() -> None:
    (row,) = cells(report.sampling_table(record(), details=True), "ours, eager")
    assert row["x reference"] == "4.00"
    assert (row["generator ms"], row["ViT decoder ms"]) == ("1,000", "50.00")
    assert row["pixel decoder ms"] == "not measured"
    assert row["paper's figure: A100"] == "102"


def test_upstream_as_shipped_is_tf32_on_cuda() -> None:
    gpu = record("Some GPU", driver="550")
    (row,) = cells(report.sampling_table(gpu), "ours, eager")
    assert row["x upstream as shipped"] == "not measured"
    gpu["cases"].append(case("upstream", "tf32", 0.8))
    (row,) = cells(report.sampling_table(gpu), "ours, eager")
    assert row["x upstream as shipped"] == "1.25"


def test_gaps_and_failures_are_named() -> None:
    run = record()
    run["cases"] = [case("ours", "bf16", 1.0, peak_bytes=None), case("ours", "fp32-ieee", 1.0)]
    del run["cases"][1]["images_per_s"]
    run["cases"][1]["error"] = "OutOfMemoryError"
    first, second = cells(report.sampling_table(run))
    assert first["x upstream as shipped"] == first["peak GiB"] == "not measured"
    assert second["samples/s (p20-p80)"] == "failed (OutOfMemoryError)"


def test_ratios_stay_within_model_batch_and_settings() -> None:
    run = record()
    run["cases"] = [
        case("ours", "bf16", 1.0),
        case("upstream", "fp32-ieee", 0.1, batch=1),
        case("upstream", "fp32-ieee", 0.1, sampling={"num_sample_steps": 64}),
    ]
    assert cells(report.sampling_table(run))[0]["x upstream as shipped"] == "not measured"


def test_newest_commit_of_each_device(tmp_path: Path) -> None:
    old, new, more = record(day=1), record(commit="bbbb", day=2), record(commit="bbbb", day=3)
    old["cases"] = [case("ours", "bf16", 111.0)]
    new["cases"] = [case("ours", "bf16", 222.0), case("ours", "bf16", 333.0, batch=1)]
    more["cases"] = [case("ours", "bf16", 444.0)]
    for name, content in [("a", old), ("b", new), ("c", more), ("d", record("Other", day=1))]:
        save(tmp_path, name, content)
    save(tmp_path, "kernels", {"rows": []})
    save(tmp_path, "list", [1, 2])
    first, second = report.merged(report.read(tmp_path), "sampling")
    assert (first["environment"]["device"], second["environment"]["device"]) == (
        "Other",
        "Some CPU",
    )
    assert [c["images_per_s"]["median"] for c in second["cases"]] == [444.0, 333.0]
    assert json.loads((tmp_path / "c.json").read_text()) == more
    assert report.merged(report.read(tmp_path), "reconstruction") == []


def test_caption_says_dirty(tmp_path: Path) -> None:
    save(tmp_path, "a", record(dirty=True))
    assert "commit aaaa with local changes, 2026-01-01; random weights" in section(
        tmp_path, "sampling"
    )


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


def test_check_notices_what_report_repairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    readme.write_text(f"before\n{MARKERS}\nafter\n")
    save(results, "a", record())
    words = ["--readme", str(readme), "--results", str(results)]
    assert report.main(["--check", *words]) == 1
    assert "README.md differs" in capsys.readouterr().out
    assert "old" in readme.read_text()
    assert report.main(words) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "1 (0.9-1.1)" in text
    assert "Not measured yet." in text  # reconstruction
    assert report.main(["--check", *words]) == 0
    faster = copy.deepcopy(record())
    faster["cases"][1]["images_per_s"]["median"] = 9.0
    save(results, "a", faster)
    assert report.main(["--check", *words]) == 1


def test_missing_markers_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(SystemExit):
        report.main(["--readme", str(readme), "--results", str(tmp_path)])
    assert "<!-- results:sampling -->" in capsys.readouterr().err
    assert readme.read_text() == "no markers"


def test_the_committed_readme_agrees_with_the_committed_results() -> None:
    assert report.main(["--check"]) == 0


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
    assert section(tmp_path, "peers") == "Not measured yet."
