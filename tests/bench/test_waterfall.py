"""The waterfall: rows and groups, ratios, quality, record, plot."""

from itertools import pairwise
from math import log10
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bench_scripts import BENCH, add_tiny, recorded, scripts, small_official
from support.official import CHECKOUT, needs_upstream
from support.tiny_models import CONFIGS, relative, tiny_generator, tiny_tokenizer

from titok_fast import PRESETS, TiTokPipeline

options, techniques, waterfall = scripts("lib.options", "lib.techniques", "waterfall")
quality, rows_of = scripts("lib.waterfall_candidates", "lib.waterfall_rows")

LINEAR, BUILT_IN = CONFIGS[0], techniques.BUILT_IN


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    add_tiny(monkeypatch, options, LINEAR)
    monkeypatch.setattr(waterfall, "matmul_peak", lambda device, dtype: 2e12)
    # the tiny decoder's largest level to be upsampled is 16 x 16
    monkeypatch.setattr("titok_fast.models.vqgan.PHASES_FROM_PIXELS", 16 * 16)


def test_rows_are_cumulative() -> None:
    made = {r.name: r for r in rows_of.rows(PRESETS["titok-s-128"], "cpu", 8)}
    assert list(made) == rows_of.names()
    measured = [r for r in made.values() if not (r.upstream or r.not_measured)]
    names = "plain bf16 skip-zero one-batch mixed-hidden channels-last phases folded-shortcut"
    names += " fused-norm one-image packed products int8"
    assert [r.name for r in measured] == names.split()
    for before, row in pairwise(measured):
        assert row.parent == before.name
        assert set(before.techniques) < set(row.techniques)
    assert {n for n in measured[-1].techniques if n in BUILT_IN} == set(BUILT_IN)  # fused-qkv too
    changing = [r.name for r in made.values() if not r.exact]
    assert changing == ["upstream-autocast", "upstream-compiled", "bf16", "int8"]
    on_cuda = [r for r in rows_of.rows(PRESETS["titok-s-128"], "cuda", 8) if not r.not_measured]
    assert on_cuda[-1].techniques[-2:] == ("inductor", "graph")


def test_rows_that_have_nothing_to_show_say_why() -> None:
    def reasons(model: str, device: str, batch: int, **options: str) -> dict[str, str]:
        found = rows_of.rows(PRESETS[model], device, batch, **options)
        return {r.name: r.not_measured for r in found if r.not_measured}

    l32 = reasons("titok-l-32", "cpu", 8)
    assert set(l32) == {"skip-zero", "inductor", "graph"}
    assert l32["skip-zero"] == "under linear guidance upstream does without it as well"
    assert set(reasons("titok-l-32", "cpu", 1)) == {*l32, "one-image"}
    assert set(reasons("titok-s-128", "cpu", 8)) == {"fused-qkv", "inductor", "graph"}
    none = reasons("titok-l-32", "cpu", 8, upstream="no --upstream")
    assert set(none) - set(l32) == {r.name for r in rows_of.UPSTREAM}
    cuda = reasons("titok-l-32", "cuda", 8)
    assert cuda["packed"] == cuda["products"] == cuda["int8"] == cuda["one-image"] == "only on cpu"
    assert "inductor" not in cuda


def test_groups_hold_three_sets_of_weights_and_share_a_row() -> None:
    def sets(group: list[Any]) -> set[str]:
        return set().union(*(row.sets for row in group))

    waiting = [r for r in rows_of.rows(PRESETS["titok-l-32"], "cpu", 8) if not r.not_measured]
    order, groups, anchor = list(waiting), [], None
    while waiting:
        group = rows_of.next_group(waiting, anchor)
        assert len(sets(group)) <= rows_of.WEIGHTS_AT_ONCE
        if anchor is not None:
            assert group[0] is anchor
        waiting = [r for r in waiting if r not in group]
        anchor = group[-1]
        groups.append([r.name for r in group])
    firsts = [*groups[0], *(name for group in groups[1:] for name in group[1:])]
    assert firsts == [r.name for r in order]  # each row once, in order
    assert groups[0][:3] == ["upstream-fp32", "upstream-autocast", "upstream-compiled"]
    assert groups[0][3:5] == ["plain", "bf16"]
    assert groups[-1][-1] == "int8"


def case(row: str, group: int, rate: float, parent: str | None = None) -> dict[str, Any]:
    return {"row": row, "group": group, "parent": parent, "images_per_s": {"median": rate}}


def test_ratios_go_through_the_common_row() -> None:
    record = {
        "gflop_per_image": {"generator": 100.0, "vit_decoder": 200.0},
        "matmul_flop_per_s": {"fp32-ieee": 1e11, "bf16": 6e11},
        "groups": [
            {"anchor": None, "images_per_s": None},
            {"anchor": "a", "images_per_s": {"median": 0.5}},  # the clock has fallen by half
            {"anchor": "b", "images_per_s": {"median": 1.5}},
        ],
        "cases": [
            case("upstream-fp32", 0, 0.25),
            case("upstream-autocast", 0, 0.5),
            case("a", 0, 1.0, "plain"),
            case("b", 1, 1.0, "a"),
            case("c", 2, 3.0, "b"),
            {"row": "d", "parent": "c", "group": 2, "error": "RuntimeError"},
            {"row": "e", "parent": "c", "not_measured": "no"},
        ],
    }
    waterfall.compare_rates(record)
    assert [g["factor"] for g in record["groups"]] == [1.0, 2.0, pytest.approx(4 / 3)]
    found = {c["row"]: c for c in record["cases"]}
    assert [found[n]["x_upstream_fp32"] for n in "abc"] == pytest.approx([4, 8, 16])
    assert [found[n]["x_upstream_autocast"] for n in "abc"] == pytest.approx([2, 4, 8])
    assert found["a"]["x_parent"] is None  # "plain" was not measured
    assert [found[n]["x_parent"] for n in "bc"] == pytest.approx([2, 2])
    # 300 GFLOP a picture, as measured: 1/s is half of 600 GFLOP/s
    assert [found[n]["of_bf16_peak"] for n in "abc"] == pytest.approx([0.5, 0.5, 1.5])
    assert "x_parent" not in found["d"]
    record["groups"][1]["images_per_s"] = None  # the common row failed there
    waterfall.compare_rates(record)
    assert record["groups"][1]["factor"] is None
    assert found["b"]["x_upstream_fp32"] is None


def test_quality_is_counted_from_what_differs() -> None:
    wanted = {
        "step1": torch.arange(8).view(2, 4),
        "final": torch.arange(8).view(2, 4),
        "logits": torch.full((2, 4, 3), 2.0),
        "pixels": torch.full((2, 3, 2, 2), 0.5),
    }
    got = {name: t.clone() for name, t in wanted.items()}
    same = quality.compare(got, wanted)
    assert (same.pop("step1_ids_equal"), same.pop("final_ids_equal")) == (1.0, 1.0)
    assert same == {"logit_error": 0.0, "pixel_rms": 0.0, "psnr_db": None}
    got["step1"][0, 0], got["final"][:, :2] = 99, 99
    got["logits"] *= 1.01
    got["pixels"] += 0.01
    found = quality.compare(got, wanted)
    assert (found["step1_ids_equal"], found["final_ids_equal"]) == (7 / 8, 0.5)
    assert found["logit_error"] == pytest.approx(0.01, rel=1e-3)
    assert found["psnr_db"] == pytest.approx(-20 * log10(0.01), abs=1e-3)
    del got["step1"]  # upstream's
    assert quality.compare(got, wanted)["step1_ids_equal"] is None


def test_outputs_do_not_depend_on_the_batch() -> None:
    pipe = TiTokPipeline(tiny_tokenizer(), tiny_generator(), LINEAR)
    whole = quality.outputs(pipe, pipe, quality.IMAGES, LINEAR)
    one = quality.outputs(pipe, pipe, 1, LINEAR)
    assert {name: len(t) for name, t in whole.items()} == dict.fromkeys(whole, quality.IMAGES)
    lengths = {"logits": 1, "pixels": 1, "final": quality.IMAGES, "step1": quality.IMAGES}
    assert {name: len(t) for name, t in one.items()} == lengths
    assert relative(one["pixels"], whole["pixels"][:1]) < 1e-5
    assert torch.equal(one["step1"], whole["step1"])
    assert torch.equal(one["final"], whole["final"])
    # what the first step draws is no mask, and most of it is drawn again
    assert whole["step1"].max() < 64
    assert 0.05 < (whole["step1"] == whole["final"]).float().mean() < 0.9
    short = quality.outputs(pipe, pipe, 8, LINEAR.updated(num_sample_steps=1))
    assert torch.equal(short["step1"], short["final"])


def run(path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    return recorded(waterfall, path, "--model", "tiny", "--batch-size", "2", *words)


FIELDS = "row text parent exact techniques implementation sampling dtype mode group seconds "
FIELDS += "images_per_s stages_s prepare_s first_call_s weight_bytes peak_bytes x_upstream_fp32 "
FIELDS += "x_upstream_autocast x_parent of_bf16_peak quality"
QUALITY = {"step1_ids_equal", "final_ids_equal", "logit_error", "pixel_rms", "psnr_db"}


def test_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(BENCH))  # the plot is imported late
    path = tmp_path / "r.json"
    chosen = [name for name in rows_of.names() if name != "int8"]  # wants a compiler: slow tests
    status, record = run(path, "--rows", ",".join(chosen))
    assert status == 0
    assert (record["benchmark"], record["model"], record["batch"]) == ("waterfall", "tiny", 2)
    assert record["protocol"]["weights"] == "random"
    assert "Random weights" in record["protocol"]["quality"]
    assert record["matmul_flop_per_s"] == {"fp32-ieee": 2e12, "bf16": 2e12}  # the better of two
    cases = {c["row"]: c for c in record["cases"]}
    assert list(cases) == chosen
    measured = {name: c for name, c in cases.items() if "images_per_s" in c}
    official = {"upstream-fp32", "upstream-autocast", "upstream-compiled"}
    assert set(cases) - set(measured) == official | {"skip-zero", "inductor", "graph"}
    assert cases["upstream-fp32"]["not_measured"] == "no --upstream"
    for name, c in measured.items():
        assert set(c) == set(FIELDS.split()), name
        assert set(c["quality"]) == QUALITY
        assert len(c["seconds"]) == 2
        assert c["x_upstream_fp32"] is None
        assert c["dtype"] == ("fp32-ieee" if name == "plain" else "bf16")
        assert (c["x_parent"] is None) == (name == "plain")
    # exact in float32; in bfloat16 they round as their parents do
    assert measured["plain"]["quality"]["final_ids_equal"] == 1.0
    assert measured["plain"]["quality"]["logit_error"] < 1e-5
    # these weights are badly conditioned: float32 itself is 6e-5 from float64
    assert measured["plain"]["quality"]["pixel_rms"] < 1e-4
    assert 1e-4 < measured["bf16"]["quality"]["logit_error"] < 0.1
    assert measured["bf16"]["weight_bytes"] < 0.7 * measured["plain"]["weight_bytes"]
    assert measured["packed"]["prepare_s"] > 0
    packed, before = (measured[n]["weight_bytes"] for n in ("packed", "bf16"))
    assert before < packed < 1.3 * before  # phase kernels are 16/9 of what they come from, kept
    assert [g["anchor"] for g in record["groups"]] == [None, "packed"]
    rates = [c["images_per_s"]["median"] for c in (cases["products"], cases["packed"])]
    want = record["groups"][1]["factor"] * rates[0] / rates[1]
    assert cases["products"]["x_parent"] == pytest.approx(want)
    out = capsys.readouterr().out
    assert "not measured: no --upstream" in out
    assert "GFLOP per image" in out
    drawing = path.with_suffix(".svg").read_text()
    assert "samples/s, ratio to the official code" in drawing
    for c in measured.values():
        assert c["text"] in drawing
    assert str(tmp_path) not in path.read_text() + drawing


def test_a_row_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("no such layout")

    def exhaust(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(TiTokPipeline, "compile", fail)
    monkeypatch.setitem(
        techniques._PLAIN, "fused-norm", (*techniques._PLAIN["fused-norm"][:2], exhaust)
    )
    status, record = run(tmp_path / "r.json", "--rows", "plain,bf16,one-image,packed,products")
    assert status == 1
    found = {c["row"]: c.get("error") for c in record["cases"]}
    assert [found.pop(name) for name in ("plain", "bf16")] == ["MemoryError"] * 2
    assert found == {"one-image": None, "packed": "ValueError", "products": "ValueError"}
    assert record["cases"][2]["x_parent"] is None


@pytest.mark.slow
def test_compiled_rows(tmp_path: Path) -> None:
    status, record = run(tmp_path / "r.json", "--rows", "one-image,products,int8")
    assert status == 0
    eager, plain, whole = record["cases"]
    for c in record["cases"]:
        assert 1e-4 < c["quality"]["logit_error"] < 0.03
    # residual sums round as much as 8 bits in so small a generator; the pixel decoder shows them
    eight, *sixteen = (c["quality"]["pixel_rms"] for c in (whole, eager, plain))
    assert 1.5 * max(sixteen) < eight < 0.05
    assert [g["anchor"] for g in record["groups"]] == [None]  # few enough weights for one group


@pytest.fixture
def official_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", small_official(LINEAR))


@needs_upstream
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_upstream_is_side_by_side(official_size: None, tmp_path: Path, compiled: bool) -> None:
    names = ["upstream-fp32", "upstream-autocast", "plain", "bf16"]
    names += ["upstream-compiled"] * compiled
    words = ("--rows", ",".join(names), "--upstream", CHECKOUT)
    status, record = run(tmp_path / "r.json", *words)
    assert status == 0
    assert CHECKOUT not in (tmp_path / "r.json").read_text()
    assert len(record["upstream_commit"]) == 40
    cases = {c["row"]: c for c in record["cases"]}
    shipped, mixed = cases["upstream-fp32"], cases["upstream-autocast"]
    assert shipped["implementation"] == "upstream"
    assert (shipped["dtype"], mixed["dtype"]) == ("fp32-ieee", "bf16")
    # the same weights and, for ids, torch's global seeds
    assert shipped["quality"]["final_ids_equal"] == 1.0
    assert shipped["quality"]["logit_error"] < 1e-5
    assert shipped["quality"]["pixel_rms"] < 1e-5
    assert shipped["quality"]["step1_ids_equal"] is None
    assert 1e-4 < mixed["quality"]["logit_error"] < 0.1
    assert mixed["weight_bytes"] == shipped["weight_bytes"]  # autocast keeps float32 weights
    rates = {name: c["images_per_s"]["median"] for name, c in cases.items()}
    for name, c in cases.items():
        assert c["x_upstream_fp32"] == pytest.approx(rates[name] / rates["upstream-fp32"])
        assert c["x_upstream_autocast"] == pytest.approx(rates[name] / rates["upstream-autocast"])
    if compiled:
        fast = cases["upstream-compiled"]
        assert (fast["mode"], fast["dtype"]) == ("compiled", "bf16")
        assert fast["first_call_s"] > 10 * min(fast["seconds"])
        assert fast["quality"]["logit_error"] < 0.1
