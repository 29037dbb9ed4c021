"""What a checkpoint must agree with before a run continues from it, and optimizer state by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from titok_fast.training.recipe.official import flatten
from titok_fast.training.recipe.recipe import Recipe

# keys that do not change what is learned from a batch, or whose effect is checked elsewhere:
# batch sizes by their product, the data by what they hold
_MAY_CHANGE = (
    "experiment.name",
    "experiment.output_dir",
    "experiment.project",
    "experiment.max_train_examples",
    "experiment.save_every",
    "experiment.eval_every",
    "experiment.generate_every",
    "experiment.log_every",
    "experiment.log_grad_norm_every",
    "experiment.resume",
    "experiment.init_weight",
    "experiment.logging",
    "experiment.keep",
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
    """Refuse to continue a run under another recipe.

    Args:
        saved: `Recipe.to_official()` of the run so far, as read back from JSON.
        now: the recipe it would continue with.

    Raises:
        ValueError: lists every changed key with both values.
    """
    before, after = flatten(saved), flatten(now.to_official())
    changed = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if key not in _MAY_CHANGE and _plain(before.get(key)) != _plain(after.get(key))
    ]
    if changed:
        raise ValueError(
            "the recipe differs from the one of the checkpoint: restore these keys, or choose "
            "another experiment.output_dir\n  " + "\n  ".join(changed)
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """State tensors of an optimizer by "parameter name/key"."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def optimizer_steps(optimizer: torch.optim.Optimizer) -> list[int | None]:
    """Steps counted by group, where apex counts them; torch counts by parameter."""
    return [group.get("step") for group in optimizer.param_groups]


def room_for(
    names: Mapping[str, torch.Size], optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, Tensor]:
    """Tensors to load an optimizer's state into: its own, where it has them before its first step.

    Args:
        names: "parameter name/key" -> shape, as saved.
        optimizer: of the model's parameters.
        model: sharded or not; state of a parameter's shape is placed like the parameter.
    """
    parameters, own = dict(model.named_parameters()), optimizer_tensors(optimizer, model)
    room: dict[str, Tensor] = {}
    for name, shape in names.items():
        parameter = parameters.get(name.rpartition("/")[0])
        if name in own and own[name].shape == shape:
            room[name] = own[name]
        elif parameter is not None and parameter.shape == shape:
            room[name] = torch.zeros_like(parameter, requires_grad=False)
        else:
            room[name] = torch.zeros(shape)
    return room


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    steps: list[int | None],
) -> None:
    """Give an optimizer, built from the same recipe, the state that `optimizer_tensors` took."""
    template = optimizer.state_dict()
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(order.index(parameter), {})[key] = value
    groups = template["param_groups"]
    for group, step in zip(groups, steps, strict=True):
        if step is not None:
            group["step"] = step
    optimizer.load_state_dict({"state": state, "param_groups": groups})
