"""The training loop of all stages: update, log, checkpoint, evaluate; signals and failures.

Steps are optimizer updates. The checkpoint of an update is written before its example images and
measures, so that a failure there loses nothing.
"""

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from titok_fast.data.loader import Batches, open_source
from titok_fast.data.sources import Source, check_same_data
from titok_fast.data.token_shards import TokenSource
from titok_fast.distributed import Ranks
from titok_fast.models.classifier import CLASSES
from titok_fast.training import checkpoints
from titok_fast.training.engine import whole_state
from titok_fast.training.logs import Log
from titok_fast.training.recipe.recipe import Recipe
from titok_fast.training.resume import check_same_recipe
from titok_fast.training.trainer import Trainer
from titok_fast.training.validation import averaged, evaluate, example_images

FINAL = "final"  # folder of the exported model
Sources = tuple[Source, Source | None]


def train(recipe: Recipe, ranks: Ranks, sources: Sources | None = None, *, bar: bool = True) -> str:
    """Train, or continue training, to the end of a recipe. Every rank must call it.

    Args:
        recipe: of the run.
        ranks: the processes of the run.
        sources: data for training and, or None, evaluation, in place of the recipe's.
        bar: show a progress bar on rank 0.

    Returns:
        A sentence on how it ended: after the last update, the exported model is in `final/`; after
        a signal, a checkpoint is written, from which the same command continues.

    Raises:
        ValueError: the recipe, data or checkpoint do not fit each other; too many records are
            damaged; too many updates in a row produced NaN or Inf.
        FileNotFoundError: data or weights are not where the recipe says.
        OSError: a file could not be written; the last checkpoint is whole.
        RankLostError: another rank is gone.
    """
    return _Run(recipe, ranks, sources).run(bar)


class Interrupt:
    """Inside `with`, a SIGTERM or SIGINT sets `requested`; the same signal again kills.

    Only the same signal kills, because Ctrl-C under torchrun sends both: SIGINT from the terminal,
    then SIGTERM from the launcher. Only the main thread may enter.
    """

    def __init__(self) -> None:
        self.requested = ""
        self._before: dict[signal.Signals, Any] = {}
        self._seen: set[int] = set()

    def __enter__(self) -> "Interrupt":
        signals = (signal.SIGTERM, signal.SIGINT)
        self._before = {s: signal.signal(s, self._note) for s in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in self._seen:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._seen.add(number)
        self.requested = signal.Signals(number).name


class _Run:
    def __init__(self, recipe: Recipe, ranks: Ranks, sources: Sources | None) -> None:
        self.recipe, self.ranks = recipe, ranks
        self.output = Path(recipe.experiment.output_dir)
        self.train_source, self.eval_source = sources or _open_sources(recipe)
        _check_tokens(recipe, self.train_source)
        self.data = self.train_source.describe()
        training = recipe.training
        self.last = training.max_train_steps
        share = training.per_gpu_batch_size * training.gradient_accumulation_steps
        self.batch_size = share * ranks.size
        self.trainer = Trainer(recipe, ranks)
        size = sum(t.nbytes for t in self.trainer.tensors().values())
        ranks.agree(lambda: checkpoints.check_writable(self.output, size))
        self._resume()

    def _resume(self) -> None:
        found = self.ranks.agree(lambda: checkpoints.newest(self.output))
        if found is None:
            return
        if not self.recipe.experiment.resume:
            raise ValueError(
                f"{self.output} holds checkpoints of an earlier run, and experiment.resume is off: "
                "turn it on, or choose another experiment.output_dir"
            )
        check_same_recipe(found.state["recipe"], self.recipe)
        check_same_data(found.state["data"], self.data)
        if found.state["batch_size"] != self.batch_size:
            raise ValueError(
                f"the run began with {found.state['batch_size']} samples per update, now there are "
                f"{self.batch_size}: {self.ranks.size} ranks x training.per_gpu_batch_size x "
                "training.gradient_accumulation_steps"
            )
        self.trainer.restore(found)

    def run(self, bar: bool) -> str:
        trainer, recipe, last = self.trainer, self.recipe, self.last
        experiment, ranks = recipe.experiment, self.ranks
        log = Log(
            self.output,
            experiment,
            config=recipe.to_official(),
            step=trainer.step,
            total=last,
            rank=ranks.rank,
            bar=bar,
        )
        with log as self.log, Interrupt() as interrupt:
            self.batches = Batches(
                self.train_source,
                recipe.data,
                batch_size=self.batch_size,
                seed=recipe.training.seed,
                train=True,
                rank=ranks.rank,
                world=ranks.size,
                start_step=trainer.step,
            )
            stream = iter(self.batches)
            self.since = time.perf_counter(), trainer.step
            while trainer.step < last:
                stopped = self._update(next(stream), interrupt)
                self.log.advance(trainer.step)
                if stopped or trainer.step == last or _due(trainer.step, experiment.save_every):
                    self._save()
                if stopped:
                    return (
                        f"stopped by {interrupt.requested or 'a signal to another rank'} after "
                        f"update {trainer.step}; the same command goes on from there"
                    )
                self._evaluate()
            return self._export()

    def _update(self, batch: dict[str, Tensor], interrupt: Interrupt) -> bool:
        """One update. Returns whether some rank was asked to stop."""
        trainer, experiment = self.trainer, self.recipe.experiment
        step = trainer.step + 1
        logs = _due(step, experiment.log_every)
        finite = trainer.gradients(batch, detailed=logs)
        bad, stopped = self.ranks.any(not finite, bool(interrupt.requested))
        if bad:
            self._skip()
            return stopped
        values: dict[str, float] = {}
        if _due(step, experiment.log_grad_norm_every):
            values |= trainer.gradient_norms()
        trainer.apply()
        if logs:
            values |= trainer.logs() | self._pace()
        if values:
            self.log.scalars(step, values)
        return stopped

    def _skip(self) -> None:
        trainer = self.trainer
        reason, row = trainer.skip(), trainer.bad_in_a_row
        text = f"skipped: {reason} ({row} in a row, {trainer.bad} in this run)"
        self.log.note(trainer.step, text)
        if row >= self.recipe.training.max_bad_steps:
            raise ValueError(
                f"{row} updates in a row, the last of them {trainer.step}, produced NaN or Inf: "
                f"{reason}. Lower the learning rate, or raise training.max_bad_steps; the last "
                "checkpoint is whole"
            )

    def _pace(self) -> dict[str, float]:
        now, step = time.perf_counter(), self.trainer.step
        seconds, updates = now - self.since[0], step - self.since[1]
        self.since = now, step
        epoch = self.recipe.experiment.max_train_examples or len(self.train_source)
        return {
            "samples_per_s": updates * self.batch_size / seconds,
            "epoch": step * self.batch_size / epoch,
            "bad_steps": float(self.trainer.bad),
            "bad_records": float(self.batches.bad.count),
        }

    def _save(self) -> None:
        trainer, keep = self.trainer, self.recipe.experiment.keep
        state = trainer.state() | {"data": self.data, "batch_size": self.batch_size}
        tensors = trainer.tensors()
        checkpoints.write(self.output, trainer.step, tensors, state, ranks=self.ranks, keep=keep)

    def _evaluate(self) -> None:
        """Example images and measures, where they are due."""
        trainer, experiment, step = self.trainer, self.recipe.experiment, self.trainer.step
        draws = _due(step, experiment.generate_every)
        measured = self.eval_source if _due(step, experiment.eval_every) else None
        if not draws and not measured:
            return
        with averaged(trainer):
            if draws:
                sheets = example_images(trainer, self.eval_source or self.train_source)
                for name, images in sheets.items():
                    self.log.images(step, name, images)
            if measured:
                self.log.scalars(step, evaluate(trainer, measured, self.batch_size))
        self.since = time.perf_counter(), step  # samples_per_s measures training alone

    def _export(self) -> str:
        """Write the model, with averaged weights where there are some."""
        trainer, folder = self.trainer, self.output / FINAL
        with averaged(trainer):
            weights = whole_state(trainer.task.model)  # the model's memory where it is not sharded
            self.ranks.agree(lambda: trainer.task.export(weights, folder))
        return f"{trainer.step} updates done; the model is in {folder}"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_tokens(recipe: Recipe, source: Source) -> None:
    if not isinstance(source, TokenSource) or recipe.generator is None:
        return
    found = source.tokens.shape[1], int(source.tokens.max())
    wanted = recipe.generator.image_seq_len, recipe.generator.codebook_size
    if found[0] != wanted[0] or found[1] >= wanted[1]:
        raise ValueError(
            f"{source.path} holds {found[0]} tokens per image with ids up to {found[1]}; the "
            f"generator wants {wanted[0]} with ids below {wanted[1]}"
        )


def _open_sources(recipe: Recipe) -> Sources:
    data, experiment = recipe.data, recipe.experiment
    classes = CLASSES if recipe.stage == "classifier" else None
    if recipe.generator is not None:
        classes = recipe.generator.condition_num_classes
    wants_eval = experiment.eval_every or experiment.generate_every
    has_eval = data.eval or data.kind == "fashion-mnist"
    evaluation = open_source(data, "eval", classes) if wants_eval and has_eval else None
    return open_source(data, "train", classes), evaluation
