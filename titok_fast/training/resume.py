"""Which recipes may continue from a checkpoint."""

from collections.abc import Mapping
from typing import Any

from titok_fast.training.recipe.official import flatten
from titok_fast.training.recipe.recipe import Recipe

# keys that do not change the weights, or are checked elsewhere: batch sizes by the samples per
# update, data by its content. So are all keys of `experiment` but one
_MAY_CHANGE = (
    "dataset.params.train_shards_path_or_url",
    "dataset.params.eval_shards_path_or_url",
    "dataset.params.num_workers_per_gpu",
    "dataset.params.max_bad_share",
    "training.gradient_accumulation_steps",
    "training.per_gpu_batch_size",
    "training.max_train_steps",
    "training.max_bad_steps",
    "training.num_generated_images",
    "training.compile",
    "training.activation_checkpointing",
    "training.parallel",
)


def check_same_recipe(saved: Mapping[str, Any], now: Recipe) -> None:
    """Refuse to continue a run, whose `Recipe.to_official()` was saved, under another recipe.

    Raises:
        ValueError: lists every changed key with both values.
    """
    before, after = flatten(saved), flatten(now.to_official())
    changed = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and key not in _MAY_CHANGE
        and (key == "experiment.tokenizer_checkpoint" or not key.startswith("experiment."))
    ]
    if changed:
        raise ValueError(
            "the recipe differs from the one of the checkpoint: restore these keys, or choose "
            "another experiment.output_dir\n  " + "\n  ".join(changed)
        )
