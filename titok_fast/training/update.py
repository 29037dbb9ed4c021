"""One update of a stage: gradients, a verdict on them, the step; and all that it must remember.

Weights, optimizer state and averages are float32 whatever autocast does. Every random number is a
function of (seed, update), so a checkpoint holds no generator's state and a resumed run draws what
the uninterrupted one would have drawn.
"""

from collections.abc import Iterator, Mapping
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
from titok_fast.training.stage_model import Trained, prepare_blocks
from titok_fast.training.tasks.base import Batch, Outcome
from titok_fast.training.tasks.registry import build_task

_DRAWS, _DROPOUT, _INIT = range(3)  # streams of random numbers


def seed_of(seed: int, *parts: int) -> int:
    """A 64-bit seed for a use of the run's seed; other parts give unrelated ones."""
    return int(np.random.SeedSequence((seed, *parts)).generate_state(1, np.uint64)[0])


class Learner:
    """A stage's networks, their optimizers and averages.

    Args:
        recipe: what is trained, and how.
        ranks: who takes part.

    Attributes:
        step: updates done, skipped ones included.
        bad, bad_in_a_row: updates skipped for a NaN or Inf.

    Raises:
        ValueError: options that exclude each other, or see `build_task`.
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
        self.model = Trained("model", model, engine, build_optimizer(model, recipe.optimizer))
        self.critic: Trained | None = None
        if criterion is not None:
            rate = recipe.optimizer.discriminator_learning_rate
            optimizer = build_optimizer(criterion, recipe.optimizer, learning_rate=rate)
            # the adversary is small, so it is never sharded
            self.critic = Trained("criterion", criterion, Engine(criterion, ranks), optimizer)
        self.ema = Ema(model, training.ema_decay) if training.use_ema else None
        codes = self.task.quantizer.embedding.num_embeddings if self.task.quantizer else 0
        self.usage = CodeUsage(codes, ranks.device) if codes else None
        revive = codes and training.clustering_vq
        self.revival = CodeRevival(codes, device=ranks.device) if revive else None
        self.step = self.bad = self.bad_in_a_row = 0
        self._outcomes: list[Outcome] = []
        self._logs: Logs = {}
        self._held: dict[str, Tensor] = {}

    def gradients(self, batch: Batch, detailed: bool = False) -> bool:
        """Gradients of an update, from this rank's share of the global batch.

        Args:
            batch: CPU tensors of data.py.
            detailed: whether logs that cost time are wanted.

        Returns:
            Whether they and the losses are finite numbers on this rank.
        """
        parts = list(self._parts(batch))
        # dropout is drawn on the device by rank; all other numbers come with the parts
        torch.manual_seed(seed_of(self.recipe.training.seed, self.step, _DROPOUT, self.ranks.rank))
        self._outcomes, self._logs = [], {}
        engine = self.model.engine
        for i, (part, draws) in enumerate(parts):
            with engine.gradients(reduce=i + 1 == len(parts)):
                outcome = self.task.learn(engine, part, draws, self.step, detailed)
                (outcome.loss / len(parts)).backward()
            self._add_logs(outcome.logs, len(parts))
            self._outcomes.append(outcome)
        self._logs["grad_norm"] = self.model.measure()
        # both halves come before both steps: neither sees the other's new weights, as published,
        # and a NaN in one of them stops the other in time
        critic = self._acting_critic()
        if critic is not None:
            self._judge(critic, [part["images"] for part, _ in parts])
            self._logs["discriminator_grad_norm"] = critic.measure()
        values = torch.stack([value.float() for value in self._logs.values()])
        return bool(torch.isfinite(values).all())  # the one wait for the device in an update

    def apply(self) -> None:
        """Take the step of the gradients."""
        recipe, limit = self.recipe, self.recipe.training.max_grad_norm
        self._see_codes()
        base, last = recipe.optimizer.learning_rate, recipe.training.max_train_steps
        rate = learning_rate(self.step, recipe.lr_scheduler, base, last)
        self.model.descend(rate, limit)
        critic = self._acting_critic()
        if critic is not None:
            rate = discriminator_learning_rate(
                self.step, recipe.lr_scheduler, recipe.optimizer, recipe.losses, recipe.training
            )
            critic.descend(rate, limit)
        if self.ema is not None:
            self.ema.update(self.step)
        self._outcomes, self._held = [], {}
        self.step += 1
        self.bad_in_a_row = 0

    def skip(self) -> str:
        """Leave weights, averages and optimizers as they were.

        Returns:
            The first number that is none: a loss, or a gradient by its parameter's name.
        """
        culprit = self._culprit()
        for name, buffer in self._held.items():  # LeCam's averages move in the forward
            setattr(self.task.criterion, name, buffer)
        for half in self._halves():
            half.forget()
        self._outcomes, self._held = [], {}
        self.step += 1
        self.bad += 1
        self.bad_in_a_row += 1
        return culprit

    def logs(self) -> dict[str, float]:
        """Numbers of the last update, means over ranks. Every rank must call it."""
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
        """Length of every parameter's gradient, before clipping. Every rank must call it."""
        return {
            f"grad_norm/{name}": float(whole(torch.linalg.vector_norm(p.grad)))
            for name, p in self.task.model.named_parameters()
            if p.grad is not None
        }

    def _parts(self, batch: Batch) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Batches to accumulate with their random numbers, on the device.

        Numbers are drawn for the global batch, in its order: each sample gets the same ones
        whatever the number of ranks and of parts.
        """
        size, device = self.recipe.training.per_gpu_batch_size, self.ranks.device
        count = len(batch["labels"])
        first = self.ranks.rank * count
        generator = torch.Generator()
        generator.manual_seed(seed_of(self.recipe.training.seed, self.step, _DRAWS))
        draws = self.task.draws(count * self.ranks.size, generator)
        for start in range(0, count, size):
            yield (
                {k: v[start : start + size].to(device) for k, v in batch.items()},
                {k: v[first + start : first + start + size].to(device) for k, v in draws.items()},
            )

    def _halves(self) -> list[Trained]:
        return [self.model] if self.critic is None else [self.model, self.critic]

    def _acting_critic(self) -> Trained | None:
        criterion = self.task.criterion
        acts = criterion is not None and criterion.discriminator_acts(self.step)
        return self.critic if acts else None

    def _judge(self, critic: Trained, images: list[Tensor]) -> None:
        """Gradients of the discriminator, on the reconstructions of the other half."""
        self._held = dict(critic.network.named_buffers(recurse=False))
        for i, (real, outcome) in enumerate(zip(images, self._outcomes, strict=True)):
            with critic.engine.gradients(reduce=i + 1 == len(images)):
                loss, logs = critic.engine(
                    ReconstructionLoss.discriminator_loss, real, outcome.reconstructions, self.step
                )
                (loss / len(images)).backward()
            self._add_logs(logs, len(images))

    def _add_logs(self, logs: Logs, parts: int) -> None:
        for name, value in logs.items():
            self._logs[name] = self._logs.get(name, 0.0) + value / parts

    def _see_codes(self) -> None:
        seen = [(o.latents, o.ids) for o in self._outcomes if o.ids is not None]
        if self.usage is not None:
            for _, ids in seen:
                self.usage.update(ids)
        if self.revival is not None:
            latents, ids = (torch.cat(part) for part in zip(*seen, strict=True))
            assert self.task.quantizer is not None
            self.revival.update(self.task.quantizer, latents, ids)

    def _culprit(self) -> str:
        for name, value in self._logs.items():
            if not name.endswith("grad_norm") and not bool(torch.isfinite(value).all()):
                return f"the loss term {name} is {float(value)}"
        for half in self._halves():
            parameter = half.culprit()
            if parameter is not None:
                return f"the gradient of {parameter} is not finite"
        return "a loss or gradient of another rank is not finite"

    def tensors(self, found: Mapping[str, torch.Size] | None = None) -> dict[str, Tensor]:
        """What a checkpoint holds, by name; the tensors themselves, see `Trained.tensors`."""
        tensors = self.model.tensors(found)
        if self.critic is not None:
            tensors |= self.critic.tensors(found)
        if self.ema is not None:
            tensors |= {f"ema/{k}": v for k, v in self.ema.state_dict()["average"].items()}
        if self.revival is not None:
            tensors["revival/embed_prob"] = self.revival.embed_prob
        return tensors

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors, as plain JSON."""
        state: dict[str, Any] = {
            "recipe": self.recipe.to_official(),
            "bad_steps": [self.bad, self.bad_in_a_row],
            "versions": {"titok_fast": __version__, "torch": torch.__version__},
        }
        for half in self._halves():
            state |= half.steps()
        return state

    def restore(self, saved: Checkpoint) -> None:
        """Take the state of a checkpoint. Every rank must call it.

        Raises:
            ValueError: its tensors do not fit.
        """
        tensors = self.tensors(saved.shapes())
        saved.load(tensors, self.ranks)  # in place, where memory is there already
        for half in self._halves():
            half.restore(tensors, saved.state)
        self.step = saved.step
        self.bad, self.bad_in_a_row = saved.state["bad_steps"]


def set_cuda_math(tf32: bool) -> None:
    """How CUDA multiplies, for the whole process: as upstream's scripts set it."""
    # not the newer fp32_precision switches: torch refuses to mix the two, and others read these
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True  # shapes stay: a trial of each convolution pays


def _check_options(recipe: Recipe, ranks: Ranks) -> None:
    if recipe.training.parallel != "fsdp2" or ranks.size == 1:
        return
    adversary = recipe.stage in ("vqgan", "stage2", "single_stage")
    adaptive = adversary and recipe.losses.adaptive_discriminator_weight
    for key, value in (
        ("model.vq_model.clustering_vq", recipe.training.clustering_vq),
        ("losses.adaptive_discriminator_weight", adaptive),
    ):
        if value:
            raise ValueError(
                f"{key} reads whole weights between passes, which training.parallel=fsdp2 shares "
                "out: use ddp"
            )
