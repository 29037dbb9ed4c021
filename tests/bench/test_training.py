"""The training benchmark: recipes, updates of both sides, rows and ratios, the record."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bench_scripts import scripts
from support.official import CHECKOUT, needs_upstream
from support.tiny_runs import recipe_of

from titok_fast import TiTok
from titok_fast.training.recipe.recipe import Recipe

training, ours = scripts("training", "lib.training_ours")
JOB = {"model": "titok-s-128", "stage": "stage1", "batch": 4}
CPU = torch.device("cpu")
LOADS = TiTok.from_pretrained.__func__  # type: ignore[attr-defined]


@pytest.mark.parametrize("stage", training.STAGES)
@pytest.mark.parametrize("model", ours.RECIPES)
def test_committed_recipes_with_all_losses_acting(model: str, stage: str) -> None:
    recipe = ours.recipe_of(model, stage, 3, True)
    assert recipe.stage == stage
    assert recipe.training.per_gpu_batch_size == 3
    assert recipe.training.mixed_precision == "bf16"
    assert not recipe.training.use_ema
    assert recipe.lr_scheduler.warmup_steps == 0
    if stage == "stage2":
        assert recipe.losses.discriminator_start == 0
        assert recipe.losses.perceptual_loss == "convnext_s"
    batch = ours.batch_of(recipe)
    if stage == "generator":
        assert batch["tokens"].shape == (3, int(model.rsplit("-", 1)[1]))
    else:
        assert batch["images"].shape == (3, 3, 256, 256)


@pytest.mark.parametrize("kind", ["stage1", "stage2", "generator"])
def test_our_update_runs_without_weight_files(kind: str, tmp_path: Path) -> None:
    recipe = recipe_of(kind, tmp_path / "no weights", tmp_path)
    if kind == "generator":
        recipe = recipe_of_tokens(recipe)
    system, batch = ours.OurLearner(recipe, CPU), ours.batch_of(recipe)
    first = system.update(batch)
    assert system.update(batch) != first
    assert torch.isfinite(torch.tensor(first))
    assert TiTok.from_pretrained.__func__ is LOADS  # type: ignore[attr-defined]


def recipe_of_tokens(recipe: Recipe) -> Recipe:
    data = replace(recipe.data, kind="tokens", train="random")
    experiment = replace(recipe.experiment, tokenizer_checkpoint="")
    return replace(recipe, data=data, experiment=experiment)


def test_rows_take_turns_and_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    found: dict[str, dict[str, Any]] = {
        "upstream autocast": {"seconds": [4.0, 6.0], "peak_bytes": 800, "loss": 7.0},
        "ours bf16": {"seconds": [2.0, 3.0], "peak_bytes": 400, "loss": 7.1},
        "ours fp32": {"error": "MemoryError"},
    }

    def child(job: dict[str, Any]) -> dict[str, Any]:
        calls.append(job["system"])
        return found[job["system"]]

    monkeypatch.setattr(training, "child", child)
    rows = training.measure(JOB, list(found), 2)
    training.compare(rows)
    assert calls == [*found, "ours bf16", "upstream autocast"]  # one that failed does not return
    base, mine, failed = rows
    assert base["x_upstream"] == base["x_upstream_memory"] == 1
    assert mine["step_s"]["median"] == 2.5
    assert mine["step_s"]["repeats"] == 4
    assert mine["samples_per_s"] == 4 / 2.5
    assert (mine["x_upstream"], mine["x_upstream_memory"]) == (2.0, 0.5)
    assert failed["error"] == "MemoryError"
    assert failed["x_upstream"] is None
    rates = {"bf16": 4e12, "fp32-ieee": 1e12}
    text = training.training_table({"cases": rows, "matmul_flop_per_s": rates})
    assert "2.5 (2-3)" in text
    share = training.floor_seconds(mine, rates) / 2.5
    assert 0.01 < share < 1
    assert f" {share:.0%} " in text
    own = mine | {"matmul_flop_per_s": {"bf16": 8e12, "fp32-ieee": 2e12}}  # of its own file
    assert f" {share / 2:.0%} " in training.training_table(
        {"cases": [own], "matmul_flop_per_s": rates}
    )
    assert "failed: MemoryError" in text
    training.compare(rows[1:])
    assert mine["x_upstream"] is None


def test_floor_counts_three_products_and_the_proxies_once() -> None:
    rates = {"bf16": 2e12, "fp32-ieee": 1e12}
    case = {"model": "titok-l-32", "stage": "generator", "batch": 8, "system": "ours bf16"}
    D, L = 768, 33
    blocks = 24 * (2 * L * 12 * D**2 + 4 * L**2 * D)
    flops = 8 * 3 * (blocks + 2 * 32 * D * 4096)
    assert training.floor_seconds(case, rates) == pytest.approx(flops / 2e12)
    assert training.floor_seconds(case | {"system": "upstream fp32"}, rates) == pytest.approx(
        flops / 1e12
    )
    case["stage"] = "stage1"
    both, proxies = (training.floor_seconds(case, rates | {"bf16": r}) for r in (2e12, 1e30))
    assert training.floor_seconds(case, rates | {"bf16": 1e12}) == pytest.approx(2 * both - proxies)
    assert 0 < proxies < both
    on_cuda = {"bf16": 2e12, "tf32": 1e12}  # where float32 is that
    assert training.floor_seconds(case, on_cuda) == training.floor_seconds(case, rates)
    assert training.floor_seconds(case | {"stage": "stage2"}, rates) is None


def test_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = {"environment": {}, "cases": [], "matmul_flop_per_s": {"bf16": 1e12}}
    monkeypatch.setattr(training, "start_record", lambda name, args: dict(start, benchmark=name))
    row = {"seconds": [2.0], "peak_bytes": 1 << 30, "loss": 7.0}
    monkeypatch.setattr(training, "child", lambda job: row)
    path = tmp_path / "record.json"
    assert training.main(["--smoke", "--stages", "generator", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["benchmark"] == "training"
    assert [(c["system"], c["batch"]) for c in record["cases"]] == [("ours bf16", 1)]


def test_what_is_measured_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = training.parse([])
    assert (args.device.type, args.dtype) == ("cuda", ["tf32", "bf16"])
    assert (args.models, args.batch, args.steps) == (list(ours.RECIPES), 32, 20)
    jobs: list[dict[str, Any]] = []

    def child(job: dict[str, Any]) -> dict[str, Any]:
        jobs.append(job)
        return {"seconds": [2.0], "peak_bytes": 1 << 30, "loss": 7.0}

    monkeypatch.setattr(training, "child", child)
    monkeypatch.setattr(training, "start_record", lambda name, args: {"cases": []})
    args = training.parse(["--models", "titok-l-32", "--stages", "stage1", "--rounds", "1"])
    record = training.run(args)
    assert [job["system"] for job in jobs] == ["ours bf16", "ours bf16, compiled"]
    assert {job["device"] for job in jobs} == {"cuda"}
    assert "tensors" in record["protocol"]["memory"]
    recipe = ours.recipe_of("titok-l-32", "stage1", 1, True, compiled=True)
    assert recipe.training.compile
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    assert training.high_water(torch.device("cuda")) == 5
    assert training.high_water(CPU) != 5


def test_a_child_that_fails_is_told() -> None:
    job = {"threads": 1, "model": "none", "stage": "stage1", "batch": 1}
    found = training.child(job | {"system": "ours bf16", "device": "cpu"})
    assert "KeyError" in found["error"]


@pytest.mark.slow
@needs_upstream
@pytest.mark.parametrize("stage", training.STAGES)
def test_upstream_begins_with_the_same_loss(stage: str) -> None:
    recipe = ours.recipe_of("titok-s-128", stage, 1, False)
    batch = ours.batch_of(recipe)
    losses = [
        training.system_of(name, recipe, Path(CHECKOUT), CPU).update(batch)
        for name in ("upstream fp32", "ours fp32")
    ]
    # the generator's masks and dropout are drawn by each
    assert losses[1] == pytest.approx(losses[0], rel=0.05 if stage == "generator" else 1e-4)
