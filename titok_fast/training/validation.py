"""Evaluation while a model trains: example images and measures of its averaged weights."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from titok_fast.data.loader import Batches
from titok_fast.data.sources import Source
from titok_fast.training.trainer import Trainer


@contextmanager
def averaged(trainer: Trainer) -> Iterator[None]:
    """Inside `with`, the model holds its averages, if the recipe has any, and is in eval mode."""
    model = trainer.task.model
    with trainer.ema.applied() if trainer.ema else nullcontext(), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train()


def example_images(trainer: Trainer, source: Source) -> dict[str, Tensor]:
    """Sheets by name, each (M, 3, H, W), of the first records. Every rank must call it.

    Every rank makes the same ones: where weights are sharded, none can do it alone.
    """
    count = min(trainer.recipe.training.num_generated_images, len(source))
    batch = next(iter(_batches(trainer, source, count, 0, 1)))
    batch = {name: x.to(trainer.ranks.device) for name, x in batch.items()}
    return trainer.task.example_images(trainer.model.engine, batch)


def evaluate(trainer: Trainer, source: Source, batch_size: int) -> dict[str, float]:
    """Means over all records, which ranks share, as "eval/name". Every rank must call it.

    Call it inside `averaged`. `batch_size` counts the records of all ranks together.

    Raises:
        ValueError: there are fewer records than ranks.
    """
    ranks, task = trainer.ranks, trainer.task
    batches = _batches(trainer, source, batch_size, ranks.rank, ranks.size)
    stream = iter(batches)
    batch: dict[str, Tensor] | None = None
    sums: dict[str, Tensor] = {}
    count = 0
    for i in range(batches.steps):
        new = next(stream, None)
        # a sharded forward needs every rank: one without a batch repeats its last, uncounted
        batch = new or batch
        if batch is None:
            raise ValueError("the evaluation data hold fewer records than there are ranks")
        size, mine = min(batch_size, len(source) - i * batch_size), len(batch["labels"])
        first = size * ranks.rank // ranks.size
        # the batch that a rank repeats may be longer than its share of a smaller one
        drawn = trainer.random_inputs(max(size, first + mine), first, mine, i)
        inputs = {name: x.to(ranks.device) for name, x in (batch | drawn).items()}
        values = task.evaluate(trainer.model.engine, inputs)
        if new:
            count += mine
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.double().sum()
    names = sorted(sums)
    total = ranks.sum(torch.tensor([float(count), *(float(sums[name]) for name in names)]))
    means = (total[1:] / total[0]).tolist()
    return {f"eval/{name}": mean for name, mean in zip(names, means, strict=True)}


def _batches(trainer: Trainer, source: Source, size: int, rank: int, world: int) -> Batches:
    data, seed = trainer.recipe.data, trainer.recipe.training.seed
    return Batches(source, data, batch_size=size, seed=seed, train=False, rank=rank, world=world)
