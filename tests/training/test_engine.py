"""Ranks: two do what one does with the same global batch; all notice when one is gone."""

import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_together
from support.tiny_runs import (
    ALONE,
    GENERATOR,
    KINDS,
    assert_equal,
    final,
    newest,
    recipe_of,
    saved_tensors,
    source_of,
    updated,
)
from torch import Tensor

from titok_fast.distributed import Ranks, rank_mean
from titok_fast.training import loop
from titok_fast.training.engine import whole
from titok_fast.training.logs import read_log
from titok_fast.training.recipe.recipe import Recipe
from titok_fast.training.trainer import Trainer

BATCH = 8
pytestmark = pytest.mark.usefixtures("one_thread")  # as the ranks have


def together(work: Callable[..., Any], *args: Any, size: int = 2) -> list[Any]:
    """What `work(ranks, *args)` returned on each of `size` ranks."""
    messages, processes = run_together(work, args, size)
    assert [process.exitcode for process in processes] == [0] * size, messages
    return [result for _, result in sorted(messages, key=lambda message: message[0])]


def digest(tensors: dict[str, Tensor]) -> str:
    """Of names and bits; every rank must call it."""
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(name.encode() + whole(tensors[name]).contiguous().numpy().tobytes())
    return hashed.hexdigest()


def train_all(ranks: Ranks, recipes: list[Recipe]) -> list[str]:
    """Train each; digests of everything a checkpoint holds."""
    found = []
    for recipe in recipes:
        run = loop._Run(recipe, ranks, (source_of(recipe), source_of(recipe)))
        run.run(bar=False)
        found.append(digest(run.trainer.tensors()))
    return found


def losses(output: Path) -> dict[str, list[float]]:
    """Every logged loss and norm by name."""
    found: dict[str, list[float]] = {}
    for line in read_log(output / "log.jsonl"):
        for name, value in line.items():
            if "loss" in name or "norm" in name or "accuracy" in name or "codes" in name:
                found.setdefault(name, []).append(value)
    return found


def comparable(kind: str, weights: Path, output: Path, steps: int, **training: Any) -> Recipe:
    """Without dropout, which each rank draws for itself; with the published warm-up.

    The discriminator makes a run chaotic: on one rank, changing the first weights by 1e-7 changes
    the 50th loss by 1e-3 at full rate (1e-4), but only by rounding errors during the warm-up. Wrong
    gradients show in their norm, whatever the rate.
    """
    recipe = recipe_of(kind, weights, output, steps, **training)
    rate = {"optimizer": {"learning_rate": 1e-4}, "lr_scheduler": {"warmup_steps": 5000}}
    recipe = updated(recipe, experiment={"eval_every": steps, "save_every": 0}, **rate)
    if kind == "generator":
        recipe = replace(recipe, generator=replace(GENERATOR, dropout=0.0, attn_drop=0.0))
    return recipe


def agree(kinds: tuple[str, ...], steps: int, weights: Path, folder: Path) -> None:
    """Compare one rank with two, in all the ways to share the work."""
    many: list[Recipe] = []
    for kind in kinds:
        revives = kind in ("stage1", "vqgan")
        ways: dict[str, dict[str, Any]] = {"ddp": {"per_gpu_batch_size": BATCH // 2}}
        if kind in ("stage1", "generator", "classifier"):  # LeCam sees the mean of each part
            ways["parts"] = {
                "per_gpu_batch_size": BATCH // 4,
                "gradient_accumulation_steps": 2,
                "activation_checkpointing": True,
            }
        for way in ways.values():
            way["clustering_vq"] = revives
        if not revives:
            ways["fsdp2"] = {"per_gpu_batch_size": BATCH // 2, "parallel": "fsdp2"}
        train_all(
            ALONE, [comparable(kind, weights, folder / f"{kind}-one", steps, clustering_vq=revives)]
        )
        many += [
            comparable(kind, weights, folder / f"{kind}-{name}", steps, **way)
            for name, way in ways.items()
        ]
    first, second = together(train_all, many)
    assert first == second  # equal bits on both ranks
    for recipe in many:
        output = Path(recipe.experiment.output_dir)
        want, got = losses(folder / f"{recipe.experiment.name}-one"), losses(output)
        assert want.keys() == got.keys()
        for name, values in want.items():
            # a gradient's length moves more than the loss where a unit crosses its kink, and the
            # discriminator's term is a mean of logits of either sign
            rel, floor = (1e-4 if "norm" in name else 1e-5), (1e-6 if "gan" in name else 1e-7)
            assert got[name] == pytest.approx(values, rel=rel, abs=floor), f"{output.name} {name}"


def test_two_ranks_do_what_one_does(weights: Path, tmp_path: Path) -> None:
    agree(("stage2", "stage1", "generator"), 5, weights, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_do_what_one_does_for_50_updates(
    weights: Path, tmp_path: Path, kind: str
) -> None:
    agree((kind,), 50, weights, tmp_path)


def train_in_turn(ranks: Ranks, *jobs: tuple[Recipe, list[int]]) -> None:
    """Train each to each of its ends, building everything anew from the checkpoint."""
    for recipe, ends in jobs:
        for end in ends:
            run = loop._Run(recipe, ranks, (source_of(recipe), None))
            run.last = end
            run.run(bar=False)


def test_resuming_shards_is_exact_and_other_ways_of_sharing_may_go_on(
    weights: Path, tmp_path: Path
) -> None:
    outputs = [tmp_path / name for name in ("whole", "parts", "moved")]
    whole_run, parts, moved = (
        recipe_of("stage2", weights, output, 4, per_gpu_batch_size=BATCH // 2, parallel="fsdp2")
        for output in outputs
    )
    jobs = [(whole_run, [4]), (parts, [1, 2, 4]), (moved, [2])]
    together(train_in_turn, *jobs)
    want = saved_tensors(outputs[0])
    assert_equal(saved_tensors(outputs[1]), want)
    assert_equal(final(outputs[1]), final(outputs[0]))

    alone = updated(moved, training={"per_gpu_batch_size": BATCH, "parallel": "ddp"})
    train_in_turn(ALONE, (alone, [4]))
    for name, tensor in want.items():
        if name.startswith("model/"):
            assert torch.allclose(saved_tensors(outputs[2])[name], tensor, atol=1e-4), name
    too_large = updated(moved, training={"per_gpu_batch_size": 2 * BATCH})
    with pytest.raises(ValueError, match="began with 8 samples per update, now there are 16"):
        train_in_turn(ALONE, (too_large, [4]))


def loses_a_rank(ranks: Ranks, recipe: Recipe, kill: int, how: signal.Signals) -> str:
    """Rank 1 is killed or stopped in update `kill`."""
    step = Trainer.apply

    def apply(trainer: Trainer) -> None:
        if ranks.rank == 1 and trainer.step == kill:
            os.kill(os.getpid(), how)
        step(trainer)

    Trainer.apply = apply  # type: ignore[method-assign]
    loop.train(recipe, ranks, (source_of(recipe), None), bar=False)
    return "never"


@pytest.mark.parametrize(
    ("how", "patience"),
    [
        (signal.SIGKILL, 60.0),
        pytest.param(signal.SIGSTOP, 5.0, marks=pytest.mark.slow),  # there, but does not answer
    ],
)
def test_lost_rank_ends_the_others(
    weights: Path, tmp_path: Path, how: signal.Signals, patience: float
) -> None:
    recipe = recipe_of("stage1", weights, tmp_path, 500, per_gpu_batch_size=BATCH // 2)
    told, (first, _) = run_together(loses_a_rank, (recipe, 5, how), patience=patience)
    assert first.exitcode == 3
    (message,) = told
    wanted = f"another rank is gone, or has not answered for {patience:g} s: "
    assert message.startswith(wanted)
    assert newest(tmp_path).step == 4


def agreements(ranks: Ranks) -> None:
    def fails() -> None:
        raise OSError(28, "No space left on device")

    assert ranks.agree(lambda: ranks.rank + 10) == 10
    with pytest.raises(OSError, match="No space left"):
        ranks.agree(fails)
    assert ranks.any(ranks.rank == 1, False) == [True, False]
    x = torch.tensor(1.0 + ranks.rank, requires_grad=True)
    loss = rank_mean(x).square()  # (3 / 2)**2, and a derivative of 2 * 3 / 2 on each rank
    loss.backward()
    assert (loss.item(), x.grad) == (2.25, torch.tensor(3.0))
    assert ranks.sum(torch.tensor([1.0, ranks.rank])).tolist() == [2.0, 1.0]


def test_ranks_agree() -> None:
    together(agreements)


def test_sharing_refuses_what_reads_whole_weights(weights: Path, tmp_path: Path) -> None:
    two = Ranks(0, 2, torch.device("cpu"))
    recipe = recipe_of("stage1", weights, tmp_path, parallel="fsdp2", clustering_vq=True)
    with pytest.raises(ValueError, match=r"clustering_vq reads whole weights.*use ddp"):
        Trainer(recipe, two)
    recipe = recipe_of("stage2", weights, tmp_path, parallel="fsdp2")
    recipe = updated(recipe, losses={"adaptive_discriminator_weight": True})
    with pytest.raises(ValueError, match=r"adaptive_discriminator_weight reads whole weights"):
        Trainer(recipe, two)
