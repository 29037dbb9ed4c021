"""`titok-fast train`: a recipe to a model, on this machine or, under torchrun, on many.

    titok-fast train fashion/stage1 training.max_train_steps=100
    torchrun --nproc_per_node 8 -m titok_fast train fashion/stage1

Started again, the same command goes on from the last checkpoint.
"""

import argparse
from collections.abc import Iterator

from titok_fast.cli.options import add_device, add_quiet, seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments on its parser."""
    parser.description = (
        "Train one stage by its recipe: vqgan, stage1, stage2, single_stage, generator or "
        "classifier. Started again, the command goes on from the last checkpoint; SIGTERM and "
        "Ctrl-C save one at the end of the update. Many processes: torchrun --nproc_per_node N "
        "-m titok_fast train RECIPE."
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="YAML file, or a name such as fashion/stage1")
    what = "keys of the recipe to change, such as training.seed=1; right after RECIPE"
    add("overrides", nargs="*", metavar="KEY=VALUE", help=what)
    add_device(parser)
    what = "without an answer for so long, another process counts as lost (default: 600)"
    add("--patience", type=seconds, default=600.0, metavar="SECONDS", help=what)
    add_quiet(parser)


def run(args: argparse.Namespace) -> Iterator[str]:
    """Train; yields how it ended, on rank 0.

    Raises:
        ValueError, OSError: see `titok_fast.training.loop.train`.
    """
    # here: torch's distributed parts take seconds to import, which --help does not need
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
