"""Faults: signals, kills, NaN, full disks, wrong recipes."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file
from support.ranks import PROCESSES
from support.tiny_runs import (
    assert_equal,
    final,
    newest,
    recipe_of,
    run,
    snapshot,
    source_of,
    updated,
)
from torch import Tensor

from titok_fast.cli.main import main
from titok_fast.data.sources import ArraySource
from titok_fast.training import checkpoints
from titok_fast.training.logs import Log, read_log
from titok_fast.training.loop import Interrupt
from titok_fast.training.recipe.recipe import Recipe
from titok_fast.training.trainer import Trainer

# children use one thread, and the order of sums, so their last bits, follow the number of threads
pytestmark = pytest.mark.usefixtures("one_thread")


def train_slowly(recipe: Recipe) -> None:
    """In a process of its own, with a pause in each update in which it can be killed."""
    torch.set_num_threads(1)
    apply = Trainer.apply

    def slow(trainer: Trainer) -> None:
        apply(trainer)
        time.sleep(0.02)

    Trainer.apply = slow  # type: ignore[method-assign]
    run(recipe)


def done(output: Path) -> int:
    """Last update in the log."""
    try:
        return read_log(output / "log.jsonl")[-1]["step"]
    except (FileNotFoundError, IndexError):
        return 0


def killed_runs_are_exact(kills: int, steps: int, weights: Path, folder: Path) -> None:
    """Kill -9 at random moments, resume, and end with the weights of an undisturbed run."""
    alone, killed = (
        updated(
            recipe_of("stage2", weights, folder / name, steps),
            experiment={"save_every": 3, "keep": 2},
        )
        for name in ("alone", "killed")
    )
    run(alone)
    output, chance, deaths = folder / "killed", random.Random(kills), 0
    while deaths < kills:
        goal = min(done(output) + chance.randint(0, steps // kills), steps - 3)
        process = PROCESSES.Process(target=train_slowly, args=(killed,))
        process.start()
        while process.is_alive() and done(output) <= goal:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.04)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
    run(killed)
    assert_equal(final(output), final(folder / "alone"))
    assert newest(output).step == steps


@pytest.mark.filterwarnings("error::UserWarning")  # of a damaged checkpoint
def test_killed_run_ends_with_the_same_weights(weights: Path, tmp_path: Path) -> None:
    killed_runs_are_exact(2, 12, weights, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning")
def test_run_killed_twenty_times_ends_with_the_same_weights(weights: Path, tmp_path: Path) -> None:
    killed_runs_are_exact(20, 200, weights, tmp_path)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], what: str) -> None:
    """Put a NaN into the loss, or an Inf into a gradient, of some updates."""
    gradients, loss = Trainer.gradients, None

    def poisoned(trainer: Trainer, batch: Any, detailed: bool = False) -> bool:
        nonlocal loss
        loss = loss or trainer.task.loss
        step = trainer.step

        def bad(*args: Any) -> Any:
            outcome = loss(*args)
            if step in steps and what == "loss":
                name = next(iter(outcome.logs))
                outcome.logs[name] = outcome.logs[name] * float("nan")
                outcome.loss = outcome.loss * float("nan")
            if step in steps and what == "gradient":
                parameter = dict(trainer.task.model.named_parameters())["decoder.mask_token"]
                hooks.append(parameter.register_hook(lambda g: g * float("inf")))
            return outcome

        hooks: list[Any] = []
        trainer.task.loss = bad  # type: ignore[method-assign]
        finite = gradients(trainer, batch, detailed)
        for hook in hooks:
            hook.remove()
        return finite

    monkeypatch.setattr(Trainer, "gradients", poisoned)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("loss", "skipped: the loss term quantizer_loss is nan (1 in a row, 1 in this run)"),
        ("gradient", "skipped: the gradient of decoder.mask_token is not finite (1 in a row"),
    ],
)
def test_bad_update_changes_nothing(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, told: str
) -> None:
    poison(monkeypatch, {3}, what)
    kept: list[dict[str, Tensor]] = []  # after each update
    finish = Trainer._finish

    def remember(trainer: Trainer, *, bad: bool) -> None:
        finish(trainer, bad=bad)
        kept.append(snapshot(trainer))

    monkeypatch.setattr(Trainer, "_finish", remember)
    assert "6 updates done" in run(recipe_of("stage2", weights, tmp_path))
    assert {"criterion/ema_real_logits_mean", "ema/decoder.mask_token"} <= kept[2].keys()
    assert_equal(kept[3], kept[2])
    (note,) = [line["note"] for line in read_log(tmp_path / "log.jsonl") if "note" in line]
    assert note.startswith(told)
    bad = [line["bad_steps"] for line in read_log(tmp_path / "log.jsonl") if "lr" in line]
    assert bad == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["vqgan", "stage1", "single_stage"])
def test_nan_in_an_image_reaches_the_loss(
    kind: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even through the nearest-code search, whose ids are always valid."""
    gradients = Trainer.gradients

    def spoilt(trainer: Trainer, batch: Any, detailed: bool = False) -> bool:
        if trainer.step == 1:
            batch = {**batch, "images": batch["images"].clone()}
            batch["images"][3, 0, 5, 5] = float("nan")
        return gradients(trainer, batch, detailed)

    monkeypatch.setattr(Trainer, "gradients", spoilt)
    assert "3 updates done" in run(recipe_of(kind, weights, tmp_path, 3))
    lines = read_log(tmp_path / "log.jsonl")
    (note,) = [line["note"] for line in lines if "note" in line]
    assert note.startswith("skipped: the loss term")
    assert "is nan (1 in a row, 1 in this run)" in note
    assert [line["bad_steps"] for line in lines if "lr" in line] == [0, 1]


def test_too_many_bad_updates_end_the_run(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {1, 3, 4, 5}, "loss")
    recipe = recipe_of("stage2", weights, tmp_path, max_bad_steps=3)
    message = "3 updates in a row, the last of them 6, produced NaN or Inf: the loss term"
    with pytest.raises(ValueError, match=message):
        run(recipe)
    found = newest(tmp_path)
    assert (found.step, found.state["bad_steps"]) == (4, [2, 1])


def test_signal_twice_kills(tmp_path: Path) -> None:
    code = """
import os, signal
from titok_fast.training.loop import Interrupt
with Interrupt() as interrupt:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    print(interrupt.requested, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGTERM
    assert ended.stdout == "SIGTERM\n"


def test_signals_mean_what_they_did_before() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert interrupt.requested == ""
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize(
    ("owner", "name", "call", "told"),
    [
        (safetensors.torch, "save", 2, "checkpoint-4 was not written: No space left on device"),
        (Log, "scalars", 3, "No space left on device"),
    ],
    ids=["checkpoint", "log"],
)
def test_full_disk_ends_the_run_and_it_goes_on_later(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    told: str,
) -> None:
    whole, full = tmp_path / "whole", tmp_path / "full"
    run(recipe_of("stage1", weights, whole))
    recipe = recipe_of("stage1", weights, full)
    write, calls = getattr(owner, name), count(1)

    def fails_later(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args, **options)

    monkeypatch.setattr(owner, name, fails_later)
    with pytest.raises(OSError, match=told):
        run(recipe)
    assert [step for step, _ in checkpoints.found(full)] == [2]
    run(recipe)
    assert_equal(final(full), final(whole))


def test_room_that_is_asked_for_before_training_is_what_a_checkpoint_takes(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, asked = checkpoints.check_writable, []

    def watched(output: Path, needed: int) -> None:
        assert list(output.iterdir()) == []
        asked.append(needed)
        check(output, needed)

    monkeypatch.setattr(checkpoints, "check_writable", watched)
    run(recipe_of("stage2", weights, tmp_path, 2))
    files = [load_file(file) for file in newest(tmp_path).folder.glob("*.safetensors")]
    assert asked == [sum(t.nbytes for tensors in files for t in tensors.values())]


def test_resume_refuses_another_run(weights: Path, tmp_path: Path) -> None:
    recipe = recipe_of("stage1", weights, tmp_path, 2)
    run(recipe)
    with pytest.raises(ValueError, match=r"recipe differs .*\n  optimizer\.params\.beta1: 0\.9 ->"):
        run(updated(recipe, optimizer={"beta1": 0.5}))
    source = source_of(recipe)
    fewer = ArraySource(source.images[:9], source.labels[:9])
    with pytest.raises(ValueError, match="the data are not those this run began with"):
        run(recipe, (fewer, None))
    with pytest.raises(ValueError, match="began with 8 samples per update, now there are 4"):
        run(updated(recipe, training={"per_gpu_batch_size": 4}))
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run, and .*resume"):
        run(updated(recipe, experiment={"resume": False}))
    assert "3 updates done" in run(updated(recipe, training={"max_train_steps": 3}))


def test_missing_weights_are_named(weights: Path, tmp_path: Path) -> None:
    for kind, key in (
        ("stage1", "pretrained_tokenizer_weight"),
        ("stage2", "init_weight"),
        ("generator", "tokenizer_checkpoint"),
    ):
        recipe = updated(recipe_of(kind, weights, tmp_path), experiment={key: ""})
        with pytest.raises(ValueError, match=f"this stage wants .*{key}"):
            run(recipe)
        with pytest.raises(FileNotFoundError):
            run(updated(recipe, experiment={key: str(tmp_path / "nowhere")}))


@pytest.fixture
def recipe_file(weights: Path, tmp_path: Path) -> Path:
    """A recipe of a folder of images, as a file."""
    rng = np.random.default_rng(0)
    for i in range(16):
        path = tmp_path / "data" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    recipe = updated(
        recipe_of("stage1", weights, tmp_path / "out", 4),
        data={"train": str(tmp_path / "data"), "eval": str(tmp_path / "data")},
        experiment={"eval_every": 2, "generate_every": 2},
    )
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_official()))
    return file


def test_command(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert (
        main(["train", str(recipe_file), "training.max_train_steps=2", "--quiet", "--device=cpu"])
        == 0
    )
    assert main(["train", str(recipe_file), "--quiet", "--device=cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{steps} updates done; the model is in {out / 'final'}" for steps in (2, 4)
    ]
    assert sorted(p.name for p in (out / "pictures").iterdir()) == [
        f"reconstructions-{step:08d}.png" for step in (2, 4)
    ]
    measured = [line for line in read_log(out / "log.jsonl") if "eval/proxy_loss" in line]
    assert [line["step"] for line in measured] == [2, 4]
    assert main(["train", str(recipe_file), "training.seed=1", "--quiet", "--device=cpu"]) == 2
    assert "error: the recipe differs" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "no recipe file or name" in capsys.readouterr().err


def test_torchrun_and_its_signal(recipe_file: Path, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    train = ["-m", "titok_fast", "train", "--device=cpu", "--quiet", str(recipe_file)]
    more = ["training.per_gpu_batch_size=4", "training.max_train_steps=100000"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*start, *train, *more], env=environment, **told)
    end = time.monotonic() + 120
    while done(tmp_path / "out") < 5 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert out.count("stopped by SIGTERM after update") == 1, errors
    stopped_at = int(out.split("after update ")[1].split(";")[0])
    assert newest(tmp_path / "out").step == stopped_at >= 5
