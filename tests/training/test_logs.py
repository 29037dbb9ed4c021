"""Logs: lines that survive a kill, resuming, boards, the bar, sheets of images."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from titok_fast.training.logs import LOG_NAME, Log, drop_after, read_log
from titok_fast.training.recipe.sections import Experiment


def records(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in record.items() if k != "time"} for record in read_log(folder / LOG_NAME)
    ]


def quiet(folder: Path, *, step: int = 0, config: Any = None, **experiment: Any) -> Log:
    return Log(folder, Experiment(**experiment), bar=False, step=step, config=config)


def test_a_line_is_in_the_file_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with quiet(tmp_path / "new" / "run") as log:
        log.scalars(20, {"loss": 0.1 + 0.2, "codes/used": torch.tensor(7.0)})
        log.note(21, "skipped: NaN in the gradient of a.weight")
        assert records(tmp_path / "new" / "run") == [
            {"step": 20, "loss": 0.1 + 0.2, "codes/used": 7.0},
            {"step": 21, "note": "skipped: NaN in the gradient of a.weight"},
        ]


def test_lines_are_strict_json_also_for_nan_and_infinity(tmp_path: Path) -> None:
    with quiet(tmp_path) as log:
        log.scalars(1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    line = json.loads((tmp_path / LOG_NAME).read_text(), parse_constant=refuse)
    assert (line["a"], line["b"], line["c"]) == ("nan", "inf", "-inf")
    assert abs(line["time"] - (tmp_path / LOG_NAME).stat().st_mtime) < 5


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with quiet(tmp_path) as log:
        for step in (10, 20, 30, 40):
            log.scalars(step, {"loss": step / 3})
    before = (tmp_path / LOG_NAME).read_text().splitlines()
    with (tmp_path / LOG_NAME).open("a") as file:
        file.write('{"step": 50, "lo')  # killed while writing
    with quiet(tmp_path, step=30) as log:
        log.scalars(40, {"loss": -1.0})
    after = (tmp_path / LOG_NAME).read_text().splitlines()
    assert after[:3] == before[:3]
    assert [r["step"] for r in records(tmp_path)] == [10, 20, 30, 40]
    assert records(tmp_path)[-1]["loss"] == -1.0


def test_a_log_with_nothing_to_drop_is_not_rewritten(tmp_path: Path) -> None:
    with quiet(tmp_path) as log:
        log.scalars(10, {"loss": 1e-17})
    inode = (tmp_path / LOG_NAME).stat().st_ino
    drop_after(tmp_path / LOG_NAME, 10)
    assert (tmp_path / LOG_NAME).stat().st_ino == inode


@pytest.mark.parametrize("damage", ["not json\n", '{"loss": 1}\n', "[1]\n", '{"step": "1"}\n'])
def test_a_file_that_is_no_log_is_left_alone(tmp_path: Path, damage: str) -> None:
    path = tmp_path / LOG_NAME
    path.write_text('{"step": 1}\n' + damage)
    with pytest.raises(ValueError, match="line 2 is no record of a log"):
        quiet(tmp_path, step=0)
    assert path.read_text() == '{"step": 1}\n' + damage


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # not even the board is made
    with Log(tmp_path / "run", Experiment(logging="wandb"), rank=1) as log:
        log.scalars(1, {"loss": 1.0})
        log.note(1, "text")
        log.advance(1)
        log.images(1, "samples", torch.zeros(1, 3, 4, 4))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


# images


def test_images_are_a_sheet_on_white(tmp_path: Path) -> None:
    images = torch.rand(3, 3, 8, 8) * 1.2 - 0.1  # models overshoot
    with quiet(tmp_path) as log:
        log.images(70, "samples", images.bfloat16())
    sheet = np.asarray(Image.open(tmp_path / "pictures" / "samples-00000070.png"))
    assert sheet.shape == (22, 22, 3)
    want = (images.bfloat16().float().clamp(0, 1) * 255).round()[2].permute(1, 2, 0)
    assert np.array_equal(sheet[12:20, 2:10], want.numpy())
    assert (sheet[12:20, 12:20] == 255).all()  # no fourth image


@pytest.mark.parametrize(
    ("images", "message"),
    [(torch.full((1, 3, 4, 4), torch.nan), "NaN"), (torch.zeros(1, 1, 4, 4), r"\(B, 3, H, W\)")],
)
def test_images_that_are_none_write_no_file(
    tmp_path: Path, images: torch.Tensor, message: str
) -> None:
    with quiet(tmp_path) as log, pytest.raises(ValueError, match=message):
        log.images(1, "a", images)
    assert [path.name for path in tmp_path.iterdir()] == [LOG_NAME]


# the bar


def test_the_bar_and_remarks_go_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Log(tmp_path, Experiment(name="stage1"), step=40, total=100) as log:
        log.advance(60)
        log.scalars(60, {"loss": 0.123456, "grad_norm/lm_head.weight": 1.0})
        log.note(60, "saved")
    out, err = capsys.readouterr()
    assert out == ""
    assert "stage1" in err
    assert "60/100" in err
    assert "loss=0.1235" in err
    assert "lm_head" not in err  # there are hundreds of these
    assert "update 60: saved" in err


# boards


@pytest.mark.parametrize(
    ("kind", "module", "remedy"),
    [
        ("tensorboard", "torch.utils.tensorboard", r"titok_fast\[train\]"),
        ("wandb", "wandb", "pip install wandb"),
    ],
)
def test_a_missing_board_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=remedy):
        quiet(tmp_path / "run", logging=kind)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_numbers_and_sheets_and_hides_what_was_undone(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="install titok_fast[train]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with quiet(tmp_path, logging="tensorboard") as log:
        log.scalars(10, {"loss": 2.0})
        log.scalars(20, {"loss": 1.0})
    with quiet(tmp_path, logging="tensorboard", step=10) as log:
        log.scalars(20, {"loss": 0.5})
        log.images(20, "samples", torch.zeros(1, 3, 4, 4))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 2.0), (20, 0.5)]
    assert (events.Images("samples")[0].width, events.Images("samples")[0].step) == (8, 20)


def test_wandb_continues_the_run_of_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in: the package needs an account."""
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )

    def init(**options: Any) -> Any:
        calls.append(options)
        return run

    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda sheet: sheet.size)
    )
    for folder in ("a", "a", "b"):
        with quiet(
            tmp_path / folder, logging="wandb", project="p", name="n", config={"stage": "vqgan"}
        ) as log:
            log.scalars(3, {"loss": 1.5})
            log.images(3, "samples", torch.zeros(1, 3, 4, 4))
    first, second, third = (c for c in calls if isinstance(c, dict))
    assert first == second
    assert first["id"] != third["id"]
    del first["id"], first["dir"]
    wanted = {"project": "p", "name": "n", "resume": "allow", "config": {"stage": "vqgan"}}
    assert first == wanted
    assert calls[1:4] == [(3, {"loss": 1.5}), (3, {"samples": (8, 8)}), "end"]
