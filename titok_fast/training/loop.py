"""The one loop of all stages: data -> update -> log -> checkpoint; what it does when things fail.

Counting is in updates. A checkpoint is due before pictures and measures of the same update, so that
a failure in those loses nothing.
"""

import time
from pathlib import Path

from torch import Tensor

from titok_fast.data.loader import Batches, open_source
from titok_fast.data.sources import Source, check_same_data
from titok_fast.data.token_shards import TokenSource
from titok_fast.distributed import Ranks
from titok_fast.models.classifier import CLASSES
from titok_fast.training import checkpoints as state
from titok_fast.training.engine import whole_state
from titok_fast.training.logs import Log
from titok_fast.training.recipe.recipe import Recipe
from titok_fast.training.resume import check_same_recipe
from titok_fast.training.signals import Interrupt
from titok_fast.training.update import Learner
from titok_fast.training.validation import averaged, measure, show

FINAL = "final"  # folder of the exported model
Sources = tuple[Source, Source | None]


def train(recipe: Recipe, ranks: Ranks, sources: Sources | None = None, *, bar: bool = True) -> str:
    """Train, or go on training, to the end of a recipe. Every rank must call it.

    Args:
        recipe: what to train.
        ranks: who takes part.
        sources: data for training and, or None, evaluation, in place of the recipe's.
        bar: show a progress bar on rank 0.

    Returns:
        How it ended, in a sentence: at the last update, the exported model is in `final/`; after
        a signal, the state is in a checkpoint, and the same command goes on from there.

    Raises:
        ValueError: the recipe, data or checkpoint do not fit each other; too many records are
            damaged; too many updates in a row met a NaN or Inf.
        FileNotFoundError: data or weights are not where the recipe says.
        OSError: a file could not be written; the last checkpoint is whole.
        RankLostError: another rank is gone.
    """
    return _Run(recipe, ranks, sources).run(bar)


class _Run:
    def __init__(self, recipe: Recipe, ranks: Ranks, sources: Sources | None) -> None:
        self.recipe, self.ranks = recipe, ranks
        self.output = Path(recipe.experiment.output_dir)
        self.train_source, self.eval_source = sources or _open_sources(recipe)
        _check_tokens(recipe, self.train_source)
        self.described = self.train_source.describe()
        training = recipe.training
        self.last = training.max_train_steps
        share = training.per_gpu_batch_size * training.gradient_accumulation_steps
        self.batch_size = share * ranks.size
        self.learner = Learner(recipe, ranks)
        bytes_needed = sum(t.nbytes for t in self.learner.tensors().values())
        if not self.learner.model.optimizer.state:  # apex's, before its first step
            bytes_needed += 2 * sum(p.nbytes for p in self.learner.task.model.parameters())
        ranks.agree(lambda: state.check_writable(self.output, bytes_needed))
        self._resume()

    def _resume(self) -> None:
        found = self.ranks.agree(lambda: state.newest(self.output))
        if found is None:
            return
        if not self.recipe.experiment.resume:
            raise ValueError(
                f"{self.output} holds checkpoints of an earlier run, and experiment.resume is off: "
                "turn it on, or choose another experiment.output_dir"
            )
        check_same_recipe(found.state["recipe"], self.recipe)
        check_same_data(found.state["data"], self.described)
        if found.state["batch_size"] != self.batch_size:
            raise ValueError(
                f"the run began with {found.state['batch_size']} samples per update, now there are "
                f"{self.batch_size}: {self.ranks.size} ranks x training.per_gpu_batch_size x "
                "training.gradient_accumulation_steps"
            )
        self.learner.restore(found)

    def run(self, bar: bool) -> str:
        learner, experiment, last = self.learner, self.recipe.experiment, self.last
        log = Log(
            self.output, kind=experiment.logging, name=experiment.name, project=experiment.project,
            config=self.recipe.to_official(), step=learner.step, total=last, rank=self.ranks.rank,
            bar=bar,
        )  # fmt: skip
        with log as self.log, Interrupt() as interrupt:
            self.batches = self._batches()
            stream = iter(self.batches)
            self.since = time.perf_counter(), learner.step
            while learner.step < last:
                stopped = self._update(next(stream), interrupt)
                self.log.advance(learner.step)
                if stopped or learner.step == last or _due(learner.step, experiment.save_every):
                    self._save()
                if stopped:
                    return (
                        f"stopped by {interrupt.requested or 'a signal to another rank'} after "
                        f"update {learner.step}; the same command goes on from there"
                    )
                self._review()
            return self._export()

    def _batches(self) -> Batches:
        return Batches(
            self.train_source,
            self.recipe.data,
            batch_size=self.batch_size,
            seed=self.recipe.training.seed,
            train=True,
            rank=self.ranks.rank,
            world=self.ranks.size,
            start_step=self.learner.step,
        )

    def _update(self, batch: dict[str, Tensor], interrupt: Interrupt) -> bool:
        """One update; whether the run must end, which all ranks answer alike."""
        learner, experiment = self.learner, self.recipe.experiment
        step = learner.step + 1
        logs = _due(step, experiment.log_every)
        finite = learner.gradients(batch, detailed=logs)
        bad, stopped = self.ranks.any(not finite, bool(interrupt.requested))
        if bad:
            self._skip()
            return stopped
        values: dict[str, float] = {}
        if _due(step, experiment.log_grad_norm_every):
            values |= learner.gradient_norms()
        learner.apply()
        if logs:
            values |= learner.logs() | self._pace()
        if values:
            self.log.scalars(step, values)
        return stopped

    def _skip(self) -> None:
        learner, limit = self.learner, self.recipe.training.max_bad_steps
        culprit = learner.skip()
        row = learner.bad_in_a_row
        self.log.note(
            learner.step, f"skipped: {culprit} ({row} in a row, {learner.bad} in this run)"
        )
        if row >= limit:
            raise ValueError(
                f"{row} updates in a row, the last of them {learner.step}, met a number that is "
                f"none: {culprit}. Lower the learning rate, or raise training.max_bad_steps; the "
                "last checkpoint is whole"
            )

    def _pace(self) -> dict[str, float]:
        now, step = time.perf_counter(), self.learner.step
        seconds, updates = now - self.since[0], step - self.since[1]
        self.since = now, step
        epoch = self.recipe.experiment.max_train_examples or len(self.train_source)
        return {
            "samples_per_s": updates * self.batch_size / seconds,
            "epoch": step * self.batch_size / epoch,
            "bad_steps": float(self.learner.bad),
            "bad_records": float(self.batches.bad.count),
        }

    def _save(self) -> None:
        learner = self.learner
        extra = {"data": self.described, "batch_size": self.batch_size}
        state.write(
            self.output, learner.step, learner.tensors(), learner.state() | extra,
            ranks=self.ranks, keep=self.recipe.experiment.keep,
        )  # fmt: skip

    def _review(self) -> None:
        experiment, step = self.recipe.experiment, self.learner.step
        shows, measures = _due(step, experiment.generate_every), _due(step, experiment.eval_every)
        if not shows and not (measures and self.eval_source):
            return
        with averaged(self.learner):
            if shows:
                sheets = show(self.learner, self.eval_source or self.train_source)
                for name, images in sheets.items():
                    self.log.pictures(step, name, images)
            if measures and self.eval_source:
                self.log.scalars(step, measure(self.learner, self.eval_source, self.batch_size))
        self.since = time.perf_counter(), step  # the pace is that of training

    def _export(self) -> str:
        """Write the model, with averaged weights where there are some."""
        learner = self.learner
        folder = self.output / FINAL
        with averaged(learner):
            weights = whole_state(learner.task.model)  # the model's memory where it is not sharded
            self.ranks.agree(lambda: learner.task.export(weights, folder))
        return f"{learner.step} updates done; the model is in {folder}"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_tokens(recipe: Recipe, source: Source) -> None:
    if not isinstance(source, TokenSource) or recipe.generator is None:
        return
    found = source.tokens.shape[1], int(source.tokens.max())
    wanted = recipe.generator.image_seq_len, recipe.generator.codebook_size
    if found[0] != wanted[0] or found[1] >= wanted[1]:
        raise ValueError(
            f"{source.path} holds {found[0]} tokens a picture with ids up to {found[1]}; the "
            f"generator wants {wanted[0]} with ids below {wanted[1]}"
        )


def _open_sources(recipe: Recipe) -> Sources:
    data, looks = recipe.data, recipe.experiment.eval_every or recipe.experiment.generate_every
    if recipe.stage == "classifier":
        classes: int | None = CLASSES
    else:
        classes = recipe.generator.condition_num_classes if recipe.generator else None
    has_eval = bool(data.eval) or data.kind == "fashion-mnist"
    evaluation = open_source(data, "eval", classes) if looks and has_eval else None
    return open_source(data, "train", classes), evaluation
