"""Checkpoints: whole or absent, whatever kills the writer; damage is found and avoided."""

import errno
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from support.tiny_runs import ALONE, assert_equal, newest, updated
from torch import Tensor, nn

from titok_fast import TokenizerConfig
from titok_fast.training import checkpoints
from titok_fast.training.engine import Engine
from titok_fast.training.optim import build_optimizer
from titok_fast.training.recipe.recipe import Recipe
from titok_fast.training.recipe.sections import OptimizerConfig
from titok_fast.training.resume import check_same_recipe
from titok_fast.training.stage_model import StageModel


def tensors(step: int) -> dict[str, Tensor]:
    """Of all kinds that a run has; the values depend on the step."""
    base = torch.arange(12.0) + 100 * step
    return {
        "model/weight": base.view(3, 4),
        "model/half": base.bfloat16(),
        "optimizer/weight/step": torch.tensor(float(step)),
        "codes": torch.full((5,), step),
    }


def save(output: Path, step: int, keep: int = 0) -> Path:
    return checkpoints.write(output, step, tensors(step), {"step": step}, ranks=ALONE, keep=keep)


def check(output: Path, step: int) -> None:
    """The newest valid checkpoint is that of `step`, to the last bit."""
    found = newest(output)
    assert (found.step, found.state) == (step, {"step": step})
    wanted = tensors(step)
    got = {name: torch.zeros_like(t) for name, t in wanted.items()}
    found.load(got, ALONE)
    assert_equal(got, wanted)


def test_round_trip_and_names(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) is None
    folder = save(tmp_path, 7)
    assert folder == tmp_path / "checkpoint-7"
    check(tmp_path, 7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-7", "latest"]
    assert (tmp_path / "latest").read_text() == "checkpoint-7"
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert listed.keys() == {p.name for p in folder.iterdir()} - {"manifest.json"}


def test_old_checkpoints_go_when_the_new_one_is_there(tmp_path: Path) -> None:
    for step in (2, 9, 10, 11):
        save(tmp_path, step, keep=2)
    assert [step for step, _ in checkpoints.found(tmp_path)] == [11, 10]
    assert not list(tmp_path.glob(".*"))
    save(tmp_path, 12)
    assert len(checkpoints.found(tmp_path)) == 3


def test_written_twice_is_written_once(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    before = (folder / "manifest.json").stat()
    save(tmp_path, 3)
    assert (folder / "manifest.json").stat().st_ino == before.st_ino
    next(folder.glob("*.safetensors")).write_bytes(b"")
    save(tmp_path, 3)
    check(tmp_path, 3)


def damage_byte(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damage_length(folder: Path) -> None:
    os.truncate(next(folder.glob("*.safetensors")), 100)


def damage_state(folder: Path) -> None:
    (folder / "state.json").unlink()


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (damage_byte, r"content of shard.* has changed \(SHA-256\)"),
        (damage_length, "has 100 bytes, not"),
        (damage_state, r"state\.json is missing"),
        (damage_manifest, r"no readable manifest\.json"),
    ],
)
def test_damage_is_named_and_avoided(tmp_path: Path, damage: Any, told: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    damage(tmp_path / "checkpoint-2")
    with pytest.warns(UserWarning, match=rf"checkpoint-2 is damaged: .*{told}"):
        check(tmp_path, 1)
    damage_byte(tmp_path / "checkpoint-1")
    with (
        pytest.warns(UserWarning, match="checkpoint-1 is damaged"),
        pytest.raises(ValueError, match=r"all 2 checkpoints in .* are damaged: move them away"),
    ):
        checkpoints.newest(tmp_path)


def test_latest_counts_before_the_number(tmp_path: Path) -> None:
    for step in (5, 6):
        save(tmp_path, step)
    (tmp_path / "latest").write_text("checkpoint-5")  # as if killed before the name was written
    check(tmp_path, 5)
    (tmp_path / "latest").unlink()
    check(tmp_path, 6)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found = newest(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-1 does not fit this run: .*model/bias"):
        found.load({"model/bias": torch.zeros(3)}, ALONE)
    with pytest.raises(ValueError, match=r"Size mismatch .*model/weight"):
        found.load({"model/weight": torch.zeros(4, 4)}, ALONE)


PATCHED = (
    *((os, name) for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "chmod")),
    *((Path, name) for name in ("write_text", "write_bytes")),
    (safetensors.torch, "save"),
)


def write_and_die(output: Path, deadly: int, told: int) -> None:
    """In a process of its own: save, and die at the `deadly`-th call that changes files.

    Args:
        output: folder of the run, which has checkpoint 1.
        deadly: 0 lives.
        told: file descriptor for the steps saved, and at last the number of calls.
    """
    calls = 0

    def deadly_call(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for owner, name in PATCHED:
        setattr(owner, name, deadly_call(getattr(owner, name)))
    for step in (2, 3, 4):
        save(output, step, keep=2)
        os.write(told, f"{step}\n".encode())
    os.write(told, f"{calls}\n".encode())


def child(output: Path, deadly: int) -> tuple[int | None, list[int]]:
    """Exit status of `write_and_die`, and what it told."""
    output.mkdir()
    save(output, 1, keep=2)
    reader, writer = os.pipe()
    # fork: a new interpreter would import torch for seconds
    process = get_context("fork").Process(target=write_and_die, args=(output, deadly, writer))
    process.start()
    process.join()
    os.close(writer)
    with open(reader) as told:
        return process.exitcode, [int(line) for line in told]


def survives(output: Path, deadly: int) -> None:
    """Kill the writer at a point; the checkpoints must be whole, and the run must continue."""
    status, told = child(output, deadly)
    assert status == -signal.SIGKILL
    found = newest(output)  # a warning of damage would be an error here
    assert found.step >= max(told, default=1)
    check(output, found.step)
    save(output, 9, keep=2)
    check(output, 9)
    assert not list(output.glob(".*"))


def count_calls(output: Path) -> int:
    status, told = child(output, 0)
    assert status == 0
    assert told[:3] == [2, 3, 4]
    return told[3]


@pytest.mark.filterwarnings("error::UserWarning")
def test_killed_while_writing(tmp_path: Path) -> None:
    calls = count_calls(tmp_path / "count")
    for deadly in random.Random(0).sample(range(1, calls + 1), 8):
        survives(tmp_path / str(deadly), deadly)


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning")
def test_killed_while_writing_at_a_hundred_points(tmp_path: Path) -> None:
    calls = count_calls(tmp_path / "count")
    points = random.Random(1)
    for i in range(100):
        survives(tmp_path / str(i), points.randint(1, calls))


def test_full_disk_ends_clearly_and_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 1)
    for owner, name in ((safetensors.torch, "save"), (Path, "write_text"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="checkpoint-2 was not written: No space") as error:
                save(tmp_path, 2)
        assert error.value.errno == errno.ENOSPC
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "latest"]
        check(tmp_path, 1)
    save(tmp_path, 2)
    check(tmp_path, 2)


def test_folder_is_tried_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / ".checkpoint-4.part").mkdir(parents=True)  # of a killed run
    checkpoints.check_writable(tmp_path / "run", 1000)
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(OSError, match=r"has room for \d+ MiB, a checkpoint takes \d{10,} MiB"):
        checkpoints.check_writable(tmp_path / "run", 1 << 60)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write checkpoints to .*output_dir"):
        checkpoints.check_writable(tmp_path / "file" / "run", 1000)

    def read_only(*args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)  # root may write where the mode forbids it
    with pytest.raises(OSError, match=r"Read-only file system.*make this one writable"):
        checkpoints.check_writable(tmp_path / "run", 1000)


class ApexAdam(torch.optim.Optimizer):
    """Counts steps by group, as apex's FusedAdam does; makes its state at the first step."""

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, {"lr": 1.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 0.1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 0.1)
                p -= 0.01 / group["step"] * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1)


@pytest.mark.parametrize("fused", ["torch", "apex"])
def test_optimizer_state_by_name(
    tmp_path: Path, fused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    apex = SimpleNamespace(FusedAdam=ApexAdam)
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)

    def stage_model() -> StageModel:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        optimizer = build_optimizer(model, OptimizerConfig(fused=fused))
        return StageModel("model", model, Engine(model, ALONE), optimizer)

    def advance(trained: StageModel, steps: range) -> None:
        for i in steps:
            trained.network(torch.full((2, 3), float(i))).square().sum().backward()
            trained.step(1e-2, 0.0)

    first, resumed = stage_model(), stage_model()
    names = ["exp_avg", "exp_avg_sq"] + ["step"] * (fused == "torch")
    parameters = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert first.tensors().keys() == {f"model/{p}" for p in parameters} | {
        f"model_optimizer/{p}/{name}" for p in parameters for name in names
    }
    advance(first, range(3))
    state = json.loads(json.dumps(first.state()))
    assert state == {"model_optimizer_steps": [3, 3] if fused == "apex" else [None, None]}
    checkpoints.write(tmp_path, 3, first.tensors(), state, ranks=ALONE)

    found = newest(tmp_path)
    before = resumed.tensors()
    found.load(before, ALONE)
    resumed.restore(found.state)
    assert all(before[name] is value for name, value in resumed.tensors().items() if "exp" in name)
    for trained in (first, resumed):
        advance(trained, range(3, 6))
    assert_equal(resumed.tensors(), first.tensors())


def test_changed_recipe_is_listed() -> None:
    recipe = Recipe(stage="stage1", tokenizer=TokenizerConfig(finetune_decoder=False))
    saved = json.loads(json.dumps(recipe.to_official()))
    check_same_recipe(saved, recipe)
    longer = updated(recipe, training={"max_train_steps": 5, "per_gpu_batch_size": 1})
    other_log = {"log_every": 7, "output_dir": "elsewhere"}
    check_same_recipe(saved, updated(longer, experiment=other_log))
    changed = updated(longer, training={"seed": 1}, optimizer={"beta2": 0.95})
    with pytest.raises(ValueError, match="differs") as error:
        check_same_recipe(saved, changed)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines == ["optimizer.params.beta2: 0.99 -> 0.95", "training.seed: 42 -> 1"]
