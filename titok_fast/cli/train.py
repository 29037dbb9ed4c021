"""`titok-fast train`: a recipe to a model, on this machine or, under torchrun, on many.

    titok-fast train recipes/fashion/stage1.yaml training.max_train_steps=100
    torchrun --nproc_per_node 8 -m titok_fast.cli.train recipes/fashion/stage1.yaml

Started again, the same command goes on from the last checkpoint.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

import torch

from titok_fast.models.attention import BackendError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.description = (
        "Train one stage by its recipe: vqgan, stage1, stage2, single_stage, generator or "
        "classifier. Started again, the command goes on from the last checkpoint; SIGTERM and "
        "Ctrl-C save one at the end of the update. Many processes: torchrun --nproc_per_node N "
        "-m titok_fast.cli.train RECIPE."
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, see recipes/")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE",
        help="keys of the recipe to change, such as training.seed=1; right after RECIPE",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    parser.add_argument(
        "--patience", type=float, default=600.0, metavar="S",
        help="seconds without an answer after which another process counts as lost (default: 600)",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


def run(args: argparse.Namespace) -> Iterator[str]:
    """Train; yields how it ended, on rank 0.

    Raises:
        ValueError, OSError: see `titok_fast.training.loop.train`.
    """
    # here: torch's distributed parts take seconds to import, and the program has other commands
    from titok_fast.backends.cpu_training import keep_freed_memory
    from titok_fast.distributed import join
    from titok_fast.training.loop import train
    from titok_fast.training.recipe.recipe import read_recipe

    recipe = read_recipe(args.recipe, args.overrides)
    with join(args.device, args.patience) as ranks:
        if ranks.device.type == "cpu":
            keep_freed_memory()
        ended = train(recipe, ranks, bar=not args.quiet)
    if ranks.rank == 0:
        yield ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one process of the command.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        Exit status: 0 done or stopped by a signal, 2 an error that is reported on stderr.
    """
    parser = argparse.ArgumentParser(prog="titok_fast.cli.train")
    add_arguments(parser)
    args, rank = parser.parse_args(argv), os.environ.get("RANK", "0")
    try:
        for line in run(args):
            sys.stdout.write(f"{line}\n")
    except (
        ValueError, OSError, ImportError, MemoryError, BackendError, torch.OutOfMemoryError
    ) as error:  # fmt: skip
        sys.stderr.write(f"\ntrain: rank {rank}: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
