"""The cost model: counted work, the fit on synthetic times, the comparison, the floors."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.bench_scripts import add_tiny, recorded, scripts

from titok_fast.costs import generation_costs

pytest.importorskip("scipy")
cost_model, options, scaling, workloads = scripts(
    "lib.cost_model", "lib.options", "scaling", "lib.workloads"
)

Workload = workloads.Workload
# a machine of this project's kind, every kind of work with a cost of its own
TRUE = {
    "gemm_flops": 1 / 350e9,
    "attention_flops": 1 / 110e9,
    "attention_rows": 1 / 5e6,
    "conv_flops": 1 / 400e9,
    "weight_bytes": 1 / 20e9,
    "activation_bytes": 1 / 30e9,
    "draws": 1 / 100e6,
    "layer_calls": 2e-4,
}


def row(workload: Any, seconds_per: dict[str, float], noise: float = 0.0) -> dict[str, Any]:
    """A measured row whose times follow the model, some by `noise` too long, some too short."""
    works = cost_model.work(workload.system, workload.batch, "bf16")
    signs = (1 + noise, 1 - noise)
    times = {
        s: cost_model.predict(seconds_per, w) * signs[i % 2]
        for i, (s, w) in enumerate(works.items())
    }
    return workload.row() | {"dtype": "bf16", "stages_s": {"transfer": 1e-3} | times}


def test_the_fit_recovers_the_machine() -> None:
    rows = [row(p, TRUE) for p in (*cost_model.FIT, *cost_model.CHECK)]
    machine = cost_model.fit_rows(rows)
    assert machine == pytest.approx(TRUE, rel=1e-4)
    assert cost_model.rates(machine)["gemm_flops"] == "350 GFLOP/s"
    lines = cost_model.compare(machine, rows)
    worst = cost_model.worst(lines)
    assert max(worst[stage] for stage in cost_model.STAGES) < 1e-6
    assert worst["total"] < 0.01  # "transfer" is not predicted
    assert sum(line["fitted"] for line in lines) == 5 * len(cost_model.FIT)


def test_kinds_without_a_cost_stay_without() -> None:
    few = TRUE | {"activation_bytes": 0.0, "layer_calls": 0.0}
    rows = [row(p, few) for p in (*cost_model.FIT, *cost_model.CHECK)]
    machine = cost_model.fit_rows(rows)
    assert machine["activation_bytes"] * 30e9 < 1e-4
    assert cost_model.rates(few)["layer_calls"] == "no cost seen"


def test_noisy_workloads_are_predicted_within_twice_the_noise() -> None:
    rows = [row(p, TRUE, noise=0.03) for p in cost_model.FIT]
    rows += [row(p, TRUE) for p in cost_model.CHECK]
    worst = cost_model.worst(cost_model.compare(cost_model.fit_rows(rows), rows))
    assert 1e-3 < max(worst.values()) < 0.06


def test_work_is_that_of_the_costs() -> None:
    workload = Workload("titok-b-64", 4)
    found = cost_model.work(workload.system, 4, "bf16")
    system = workload.system
    costs = generation_costs(system.tokenizer, system.generator, system.sampling)
    flops = ("gemm_flops", "attention_flops", "conv_flops")
    for stage in ("generator", "vit_decoder"):
        counted = sum(found[stage].get(kind, 0) for kind in flops)
        assert counted == pytest.approx(4 * costs[stage].flops)
    pixels = costs["pixel_decoder"].flops + costs["pixel_codebook"].flops
    assert sum(found["pixel_decoder"].get(kind, 0) for kind in flops) == pytest.approx(4 * pixels)
    # 12 layers on 1 + 256 + 64 tokens: scores and sums, 2 FLOPs a multiply-add
    assert found["vit_decoder"]["attention_flops"] == 4 * 12 * 4 * 321**2 * 768
    assert found["vit_decoder"]["attention_rows"] == 4 * 12 * 12 * 321
    # weights are read once a step, whatever the batch; the draw shrinks as tokens become known
    alone = cost_model.work(workload.system, 1, "bf16")
    assert found["generator"]["weight_bytes"] == alone["generator"]["weight_bytes"]
    assert found["head"]["draws"] == 4 * 64 * 4096
    assert 64 * 4096 < alone["generator"]["draws"] < 8 * 64 * 4096


def test_a_step_of_no_guidance_is_one_pass() -> None:
    # power-cosine begins with weight 0: of two steps three passes, as L-32's linear has
    one, two = (
        cost_model.work(Workload("titok-s-128", steps=T).system, 1, "bf16")["generator"]
        for T in (1, 2)
    )
    assert two["gemm_flops"] == pytest.approx(3 * one["gemm_flops"])
    assert two["layer_calls"] == 2 * one["layer_calls"] == 2 * 21


def test_rows_of_other_threads_or_ranks_are_left_alone() -> None:
    rows = [row(p, TRUE) for p in cost_model.FIT]
    odd = row(Workload(threads=1), {k: 9 * v for k, v in TRUE.items()})
    missing = Workload(batch=64).row() | {"not_measured": "too large"}
    machine = cost_model.fit_rows([*rows, odd, missing], (*cost_model.FIT, Workload(threads=1)))
    assert machine == pytest.approx(TRUE, rel=1e-4)
    assert len(cost_model.compare(machine, [*rows, odd, missing])) == 5 * len(rows)


def test_a_fit_on_too_little_is_refused() -> None:
    rows = [row(cost_model.FIT[0], TRUE)]
    with pytest.raises(ValueError, match="wants 8 or more stages"):
        cost_model.fit_rows(rows)
    works = [{"gemm_flops": 1.0}] * 8
    with pytest.raises(ValueError, match="positive time"):
        cost_model.fit(works, [1.0] * 7 + [0.0])


def test_comparison_marks_what_is_over_the_goal() -> None:
    rows = [row(p, TRUE) for p in (*cost_model.FIT, *cost_model.CHECK)]
    rows[-1]["stages_s"]["vit_decoder"] *= 2
    lines = cost_model.compare(cost_model.fit_rows(rows), rows)
    text = cost_model.comparison_table(lines)
    assert text.count("(over)") == 2  # the stage, and its row's total
    assert cost_model.worst(lines)["vit_decoder"] == pytest.approx(0.5)
    assert cost_model.worst(lines[:5])["total"] is None  # all of these were fitted


def test_floors_of_both_cards() -> None:
    rows = {(r["card"], r["model"]): r for r in cost_model.floors()}
    assert {card for card, _ in rows} == {"a100-sxm-40gb", "a100-sxm-80gb", "h100-sxm"}
    a100, h100 = rows["a100-sxm-80gb", "titok-l-32"], rows["h100-sxm", "titok-l-32"]
    # 544 GFLOP at 312 TFLOP/s in bfloat16
    assert a100["total"] == pytest.approx(1.74, rel=0.01)
    assert a100["total"] / h100["total"] == pytest.approx(989 / 312, rel=0.02)
    assert "encoder" not in a100
    assert "| h100-sxm " in cost_model.floors_table()


def test_command_on_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(p, TRUE) for p in (*cost_model.FIT, *cost_model.CHECK)]
    record = {"benchmark": "scaling", "cases": rows}
    path, out = tmp_path / "r.json", tmp_path / "out.json"
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        scaling.main(["--cost-model", str(path)])
    record["cost_model"] = cost_model.analysis(rows, cost_model.FIT)
    path.write_text(json.dumps(record))
    assert scaling.main(["--cost-model", str(path), "--json", str(out)]) == 0
    made = json.loads(out.read_text())
    assert made["benchmark"] == "cost-model"
    written = made["cost_model"]
    assert written["seconds_per"] == pytest.approx(TRUE, rel=1e-4)
    rows[-1]["stages_s"]["generator"] *= 1.5
    path.write_text(json.dumps(record))
    assert scaling.main(["--cost-model", str(path)]) == 1
    assert "350 GFLOP/s" in capsys.readouterr().out
    assert scaling.main(["--floors"]) == 0


def test_a_run_measures_what_is_fitted_and_what_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_tiny(monkeypatch, options)
    monkeypatch.setattr(cost_model, "FIT", tuple(Workload("tiny", B, steps=2) for B in (1, 3)))
    monkeypatch.setattr(cost_model, "CHECK", (Workload("tiny", 2, tokens=4, steps=3),))
    status, record = recorded(scaling, tmp_path / "r.json", "--cost-model")
    assert status in (0, 1)  # times this short are all overhead
    assert record["benchmark"] == "cost-model"
    assert [(c["batch"], c["tokens"]) for c in record["cases"]] == [(1, 8), (3, 8), (2, 4)]
    assert [line["fitted"] for line in record["cost_model"]["lines"]] == [True] * 10 + [False] * 5
    assert set(record["cost_model"]["seconds_per"]) == set(cost_model.KINDS)
