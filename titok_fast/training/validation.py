"""Looking at a model while it trains: pictures and measures of its averaged weights."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from titok_fast.data.loader import Batches
from titok_fast.data.sources import Source
from titok_fast.training.update import Learner, seed_of


@contextmanager
def averaged(learner: Learner) -> Iterator[None]:
    """Inside, the model holds its averages, if the recipe wants any, and is in eval mode."""
    model = learner.task.model
    with learner.ema.applied() if learner.ema else nullcontext(), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train()


def show(learner: Learner, source: Source) -> dict[str, Tensor]:
    """Sheets of pictures by name, each (M, 3, H, W), of the first records. Every rank must call it.

    Every rank makes the same ones: where weights are sharded, none can do it alone.
    """
    count = min(learner.recipe.training.num_generated_images, len(source))
    batch = next(iter(_batches(learner, source, count, 0, 1)))
    return learner.task.show(learner.model.engine, _moved(batch, learner))


def measure(learner: Learner, source: Source, batch_size: int) -> dict[str, float]:
    """Means over all records, which ranks share, as "eval/name". Every rank must call it.

    Args:
        learner: inside `averaged`.
        source: of the records.
        batch_size: of all ranks together.

    Raises:
        ValueError: there are fewer records than ranks.
    """
    ranks, task = learner.ranks, learner.task
    batches = _batches(learner, source, batch_size, ranks.rank, ranks.size)
    sums: dict[str, Tensor] = {}
    count = 0
    for i, (batch, counts) in enumerate(_in_step(iter(batches), batches.steps)):
        size, mine = min(batch_size, len(source) - i * batch_size), len(batch["labels"])
        draws = _moved(_draws(learner, i, size, mine), learner)
        values = task.measure(learner.model.engine, _moved(batch, learner), draws)
        if counts:
            count += mine
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.double().sum()
    names = sorted(sums)
    total = ranks.sum(torch.tensor([float(count), *(float(sums[name]) for name in names)]))
    means = (total[1:] / total[0]).tolist()
    return {f"eval/{name}": mean for name, mean in zip(names, means, strict=True)}


def _batches(learner: Learner, source: Source, size: int, rank: int, world: int) -> Batches:
    data, seed = learner.recipe.data, learner.recipe.training.seed
    return Batches(source, data, batch_size=size, seed=seed, train=False, rank=rank, world=world)


def _draws(learner: Learner, index: int, size: int, mine: int) -> dict[str, Tensor]:
    """Random numbers of this rank's `mine` records of a batch of `size`; the same each time."""
    generator = torch.Generator()
    generator.manual_seed(seed_of(learner.recipe.training.seed, index))
    first = size * learner.ranks.rank // learner.ranks.size
    # the batch that a rank repeats may be longer than its share of a smaller one
    draws = learner.task.draws(max(size, first + mine), generator)
    return {name: x[first : first + mine] for name, x in draws.items()}


def _moved(tensors: dict[str, Tensor], learner: Learner) -> dict[str, Tensor]:
    return {name: x.to(learner.ranks.device) for name, x in tensors.items()}


def _in_step(
    batches: Iterator[dict[str, Tensor]], steps: int
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """As many batches on each rank, and whether each counts: one that has no more repeats its last.

    Where weights are sharded, a pass needs every rank.
    """
    batch: dict[str, Tensor] | None = None
    for _ in range(steps):
        new = next(batches, None)
        batch = new or batch
        if batch is None:
            raise ValueError("the evaluation data hold fewer records than there are ranks")
        yield batch, new is not None
