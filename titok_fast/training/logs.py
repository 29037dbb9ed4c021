"""Logs of a run: JSON lines always, TensorBoard or W&B where asked, a progress bar, image sheets.

`log.jsonl` in the output directory holds one object per line with `step` (updates done), `time`
(seconds since 1970) and the values. Only rank 0 writes; on other ranks every method does nothing.
"""

import hashlib
import importlib
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from titok_fast.io.files import write_atomic
from titok_fast.io.images import grid, save_png, to_pil, to_uint8
from titok_fast.training.recipe.sections import Experiment

LOG_NAME = "log.jsonl"


class Log:
    """Records a run's numbers, notes and images; a context manager.

    Args:
        output_dir: is created.
        experiment: board to log to, name and project.
        config: the recipe in official form, shown by W&B.
        step: updates already done. Lines of later updates, which a run logged after its last
            checkpoint, are removed, and so is an incomplete last line.
        total: updates of the whole run, for the bar.
        rank: of this process.
        bar: show a progress bar on standard error.

    Raises:
        ImportError: the board's package is missing.
        OSError: the directory cannot be written.
    """

    def __init__(
        self,
        output_dir: str | Path,
        experiment: Experiment,
        *,
        config: Mapping[str, Any] | None = None,
        step: int = 0,
        total: int | None = None,
        rank: int = 0,
        bar: bool = True,
    ) -> None:
        self.folder, self.writes = Path(output_dir), rank == 0
        if not self.writes:
            return
        self.board: _TensorBoard | _Wandb | None = None
        if experiment.logging == "tensorboard":
            self.board = _TensorBoard(self.folder, step)
        elif experiment.logging == "wandb":
            self.board = _Wandb(self.folder, experiment, config or {})
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LOG_NAME
        if path.exists():
            drop_after(path, step)
        self.file = path.open("a", encoding="utf-8")
        self.bar: tqdm[NoReturn] = tqdm(
            total=total,
            initial=step,
            unit="update",
            desc=experiment.name,
            mininterval=1.0,
            disable=not bar,
            file=sys.stderr,
        )

    def scalars(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Record values after `step` updates, and show those without a group beside the bar.

        A name "a/b" is of group "a" on boards. Reading a tensor waits for its device.
        """
        if not self.writes:
            return
        numbers = {name: float(value) for name, value in values.items()}
        # JSON has no NaN and no infinity: write their names
        self._line(step, {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()})
        if self.board is not None:
            self.board.scalars(step, numbers)
        shown = {name: f"{v:.4g}" for name, v in numbers.items() if "/" not in name}
        self.bar.set_postfix(shown, refresh=False)

    def note(self, step: int, text: str) -> None:
        """Record a note, such as a skipped update, and print it above the bar."""
        if self.writes:
            self._line(step, {"note": text})
            self.bar.write(f"update {step}: {text}", file=sys.stderr)

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Write a sheet of images to `pictures/NAME-STEP.png`, atomically, and to the board.

        `images` (B, 3, H, W) of any float dtype and device are clamped to [0, 1] and rounded.

        Raises:
            ValueError: wrong shape or dtype, no image, or NaN on a CPU.
        """
        if not self.writes:
            return
        sheet = grid(to_pil(to_uint8(images, rounding="round")))
        path = self.folder / "pictures" / f"{name}-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        save_png(path, sheet)
        if self.board is not None:
            self.board.image(step, name, sheet)

    def advance(self, step: int) -> None:
        """Move the bar to `step` updates done."""
        if self.writes:
            self.bar.update(step - self.bar.n)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        if not self.writes:
            return
        self.bar.close()
        self.file.close()
        if self.board is not None:
            self.board.close()

    def _line(self, step: int, values: Mapping[str, Any]) -> None:
        line = {"step": step, "time": round(time.time(), 3), **values}
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()  # a killed run loses nothing


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log, in order, without an incomplete last one.

    Raises:
        ValueError: another line is not a JSON object with a `step`.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):  # text after the last newline is incomplete
        try:
            record = json.loads(line)
            record["step"] + 0  # refuses all but a number
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number} is no record of a log: {line!r}") from error
        records.append(record)
    return records


def drop_after(path: Path, step: int) -> None:
    """Remove a log's records of updates after `step`, and an incomplete last line.

    Raises:
        ValueError: the file is not a log; it is left unchanged.
    """
    records = [record for record in read_log(path) if record["step"] <= step]
    kept = "".join(json.dumps(record) + "\n" for record in records).encode()
    if kept != path.read_bytes():
        write_atomic(path, kept)


def _package(module: str, kind: str, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"experiment.logging={kind} wants the package {kind}: pip install {install}, or choose "
            "experiment.logging=none"
        ) from error


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        package = _package("torch.utils.tensorboard", "tensorboard", "'titok_fast[train]'")
        # hides what an earlier run wrote after its last checkpoint
        self.writer = package.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.close = self.writer.close

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, sheet: Image.Image) -> None:
        self.writer.add_image(name, np.asarray(sheet), step, dataformats="HWC")


class _Wandb:
    def __init__(self, folder: Path, experiment: Experiment, config: Mapping[str, Any]) -> None:
        # training.enable_wandb of an official file asks for it too
        self.wandb = _package("wandb", "wandb", "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        self.run = self.wandb.init(
            project=experiment.project,
            name=experiment.name or None,
            dir=str(folder),
            # the same directory is the same run, so that a resumed run continues its curves
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            config=dict(config),
        )
        self.close = self.run.finish

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, name: str, sheet: Image.Image) -> None:
        self.run.log({name: self.wandb.Image(sheet)}, step=step)
