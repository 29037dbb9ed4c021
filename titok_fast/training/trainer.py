"""Updates of a stage: gradients, a check that they are finite, optimizer steps; a run's state.

Weights, optimizer state and averages are float32 even under autocast. Every random number is a
function of (seed, update), so checkpoints need no generator's state, and a resumed run draws the
same numbers.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titok_fast.distributed import Ranks
from titok_fast.models.code_usage import CodeUsage
from titok_fast.settings import __version__
from titok_fast.training.checkpoints import Checkpoint
from titok_fast.training.code_revival import CodeRevival
from titok_fast.training.ema import Ema
from titok_fast.training.engine import Engine, whole
from titok_fast.training.losses import Logs, ReconstructionLoss
from titok_fast.training.optim import build_optimizer, discriminator_learning_rate, learning_rate
from titok_fast.training.recipe.recipe import Recipe
from titok_fast.training.stage_model import StageModel, prepare_blocks
from titok_fast.training.tasks.base import Batch, Outcome
from titok_fast.training.tasks.registry import build_task

_RANDOM_INPUTS, _DROPOUT, _INIT = range(3)  # streams of random numbers


def seed_of(seed: int, *parts: int) -> int:
    """A 64-bit seed derived from the run's seed; other `parts` give unrelated seeds."""
    return int(np.random.SeedSequence((seed, *parts)).generate_state(1, np.uint64)[0])


class Trainer:
    """A stage's networks with their optimizers and averages.

    Attributes:
        step: updates done, skipped ones included.
        bad, bad_in_a_row: updates skipped for a NaN or Inf.

    Raises:
        ValueError: options that exclude each other; or as `build_task`.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        _check_options(recipe, ranks)
        self.recipe, self.ranks, training = recipe, ranks, recipe.training
        set_cuda_math(training.enable_tf32)
        torch.manual_seed(seed_of(training.seed, _INIT))  # the same weights on every rank
        self.task = build_task(recipe, ranks.device)
        model, criterion = self.task.model, self.task.criterion
        prepare_blocks(model, training)
        engine = Engine(model, ranks, training.parallel, training.mixed_precision == "bf16")
        self.model = StageModel("model", model, engine, build_optimizer(model, recipe.optimizer))
        self.criterion: StageModel | None = None
        if criterion is not None:
            optimizer = build_optimizer(criterion, recipe.optimizer)
            # the discriminator is small, so it is never sharded
            self.criterion = StageModel("criterion", criterion, Engine(criterion, ranks), optimizer)
        self._networks = [part for part in (self.model, self.criterion) if part is not None]
        self.ema = Ema(model, training.ema_decay) if training.use_ema else None
        codes = self.task.quantizer.embedding.num_embeddings if self.task.quantizer else 0
        self.usage = CodeUsage(codes, ranks.device) if codes else None
        revive = codes and training.clustering_vq
        self.revival = CodeRevival(codes, device=ranks.device) if revive else None
        self.step = self.bad = self.bad_in_a_row = 0
        self._outcomes: list[Outcome] = []
        self._logs: Logs = {}
        self._lecam: dict[str, Tensor] = {}  # LeCam's averages before the update

    def gradients(self, batch: Batch, detailed: bool = False) -> bool:
        """Gradients of an update, from this rank's share of the global batch.

        Args:
            batch: CPU tensors of `Batches`.
            detailed: whether logs that cost time are wanted.

        Returns:
            Whether they and the losses are finite on this rank.
        """
        parts = list(self._parts(batch))
        # dropout draws on the device and differs by rank; other random numbers come with the parts
        torch.manual_seed(seed_of(self.recipe.training.seed, self.step, _DROPOUT, self.ranks.rank))
        self._outcomes, self._logs = [], {}
        engine = self.model.engine
        for i, part in enumerate(parts):
            with engine.gradients(reduce=i + 1 == len(parts)):
                outcome = self.task.loss(engine, part, self.step, detailed)
                (outcome.loss / len(parts)).backward()
            self._add_logs(outcome.logs, len(parts))
            self._outcomes.append(outcome)
        self._logs["grad_norm"] = self.model.gradient_norm()
        # both gradients are computed before both steps: as published, neither network sees the
        # other's new weights, and a NaN in one skips both
        criterion = self._active_criterion()
        if criterion is not None:
            self._discriminator_gradients(criterion, [part["images"] for part in parts])
            self._logs["discriminator_grad_norm"] = criterion.gradient_norm()
        values = torch.stack([value.float() for value in self._logs.values()])
        return bool(torch.isfinite(values).all())  # the update's only wait for the device

    def apply(self) -> None:
        """Take the optimizer steps."""
        recipe, max_norm = self.recipe, self.recipe.training.max_grad_norm
        self._count_codes()
        base, last = recipe.optimizer.learning_rate, recipe.training.max_train_steps
        rate = learning_rate(self.step, recipe.lr_scheduler, base, last)
        self.model.step(rate, max_norm)
        criterion = self._active_criterion()
        if criterion is not None:
            criterion.step(discriminator_learning_rate(self.step, recipe), max_norm)
        if self.ema is not None:
            self.ema.update(self.step)
        self._finish(bad=False)

    def skip(self) -> str:
        """Leave weights, averages and optimizers as they were.

        Returns:
            The first non-finite loss or gradient, the latter by its parameter's name.
        """
        reason = self._first_non_finite()
        for name, buffer in self._lecam.items():  # the forward has already moved these averages
            setattr(self.task.criterion, name, buffer)
        for part in self._networks:
            part.optimizer.zero_grad()
        self._finish(bad=True)
        return reason

    def _finish(self, *, bad: bool) -> None:
        self._outcomes, self._lecam = [], {}
        self.step += 1
        self.bad += bad
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0

    def logs(self) -> dict[str, float]:
        """Losses and norms of the last update, averaged over ranks. Every rank must call it."""
        names = list(self._logs)
        sums = self.ranks.sum(torch.stack([self._logs[name].float() for name in names]))
        values = dict(zip(names, (sums / self.ranks.size).tolist(), strict=True))
        values["lr"] = float(self.model.optimizer.param_groups[0]["lr"])
        if self.usage is not None:
            report = self.usage.report()
            values |= {"codes/usage": report.usage, "codes/dead": float(report.dead)}
            values["codes/entropy_bits"] = report.entropy_bits
            self.usage.reset()
        return values

    def gradient_norms(self) -> dict[str, float]:
        """Norm of every parameter's gradient, before clipping. Every rank must call it."""
        return {
            f"grad_norm/{name}": float(whole(torch.linalg.vector_norm(p.grad)))
            for name, p in self.task.model.named_parameters()
            if p.grad is not None
        }

    def random_inputs(self, total: int, first: int, count: int, *parts: int) -> dict[str, Tensor]:
        """Random numbers of a batch of `total` samples: `count` rows from `first` on.

        `parts` say what they are for, as in `seed_of`.
        """
        generator = torch.Generator().manual_seed(seed_of(self.recipe.training.seed, *parts))
        drawn = self.task.random_inputs(total, generator)
        return {name: x[first : first + count] for name, x in drawn.items()}

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """Batches to accumulate, with their random numbers, on the device.

        Numbers are drawn for the global batch in its order, so a sample gets the same ones with any
        number of ranks and parts.
        """
        ranks, size = self.ranks, self.recipe.training.per_gpu_batch_size
        count = len(batch["labels"])
        total, first = count * ranks.size, count * ranks.rank
        whole = {**batch, **self.random_inputs(total, first, count, self.step, _RANDOM_INPUTS)}
        for start in range(0, count, size):
            yield {k: v[start : start + size].to(ranks.device) for k, v in whole.items()}

    def _active_criterion(self) -> StageModel | None:
        """The criterion, once its discriminator acts."""
        criterion = self.task.criterion
        acts = criterion is not None and criterion.discriminator_acts(self.step)
        return self.criterion if acts else None

    def _discriminator_gradients(self, criterion: StageModel, images: list[Tensor]) -> None:
        self._lecam = dict(criterion.network.named_buffers(recurse=False))
        for i, (real, outcome) in enumerate(zip(images, self._outcomes, strict=True)):
            with criterion.engine.gradients(reduce=i + 1 == len(images)):
                loss, logs = criterion.engine(
                    ReconstructionLoss.discriminator_loss, real, outcome.reconstructions, self.step
                )
                (loss / len(images)).backward()
            self._add_logs(logs, len(images))

    def _add_logs(self, logs: Logs, parts: int) -> None:
        for name, value in logs.items():
            self._logs[name] = self._logs.get(name, 0.0) + value / parts

    def _count_codes(self) -> None:
        """Count the update's codes, and revive unused ones."""
        seen = [(o.latents, o.ids) for o in self._outcomes if o.ids is not None]
        if self.usage is not None:
            for _, ids in seen:
                self.usage.update(ids)
        if self.revival is not None:
            latents, ids = (torch.cat(part) for part in zip(*seen, strict=True))
            assert self.task.quantizer is not None
            self.revival.update(self.task.quantizer, latents, ids)

    def _first_non_finite(self) -> str:
        for name, value in self._logs.items():
            if not name.endswith("grad_norm") and not bool(torch.isfinite(value).all()):
                return f"the loss term {name} is {float(value)}"
        for part in self._networks:
            parameter = part.first_non_finite()
            if parameter is not None:
                return f"the gradient of {parameter} is not finite"
        return "a loss or gradient of another rank is not finite"

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint by name; the tensors themselves, see `StageModel.tensors`."""
        tensors = {k: v for part in self._networks for k, v in part.tensors().items()}
        if self.ema is not None:
            tensors |= {f"ema/{k}": v for k, v in self.ema.average.items()}
        if self.revival is not None:
            tensors["revival/embed_prob"] = self.revival.embed_prob
        return tensors

    def state(self) -> dict[str, Any]:
        """The rest of a checkpoint, as plain JSON."""
        state: dict[str, Any] = {
            "recipe": self.recipe.to_official(),
            "bad_steps": [self.bad, self.bad_in_a_row],
            "versions": {"titok_fast": __version__, "torch": torch.__version__},
        }
        for part in self._networks:
            state |= part.state()
        return state

    def restore(self, saved: Checkpoint) -> None:
        """Take the state of a checkpoint. Every rank must call it.

        Raises:
            ValueError: its tensors do not fit.
        """
        saved.load(self.tensors(), self.ranks)  # in place
        for part in self._networks:
            part.restore(saved.state)
        self.step = saved.step
        self.bad, self.bad_in_a_row = saved.state["bad_steps"]


def set_cuda_math(tf32: bool) -> None:
    """Set TF32 for the whole process, as upstream's scripts do."""
    # not the newer fp32_precision switches: torch refuses to mix both, and others read these
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True  # shapes do not change, so trying algorithms pays


def _check_options(recipe: Recipe, ranks: Ranks) -> None:
    if recipe.training.parallel != "fsdp2" or ranks.size == 1:
        return
    has_discriminator = recipe.stage in ("vqgan", "stage2", "single_stage")
    refused = {
        "model.vq_model.clustering_vq": recipe.training.clustering_vq,
        "losses.adaptive_discriminator_weight": (
            has_discriminator and recipe.losses.adaptive_discriminator_weight
        ),
    }
    for key in (key for key, value in refused.items() if value):
        raise ValueError(
            f"{key} reads whole weights outside the forward, which training.parallel=fsdp2 "
            "shards: use ddp"
        )
