"""AdamW and its learning rate as in upstream's training scripts. Steps are optimizer updates."""

import importlib
from math import cos, pi
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from titok_fast.models.attention import BackendError
from titok_fast.training.recipe.recipe import Recipe
from titok_fast.training.recipe.sections import OptimizerConfig, ScheduleConfig

# a parameter whose name holds one of these does not decay; upstream: utils/train_utils.py
NO_DECAY = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")


def decays(name: str, ndim: int) -> bool:
    """Whether weight decay acts on a parameter, by its name and number of dimensions.

    Upstream's rule, written for the published names; our names give the same groups.
    """
    return ndim >= 2 and not any(word in name for word in NO_DECAY)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of a model in two groups: those that do not decay, then the others.

    Wrappers (DDP, compile) do not change the groups.

    Raises:
        ValueError: nothing can be trained.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    return [
        {"params": [p for n, p in named if not decays(n, p.ndim)], "weight_decay": 0.0},
        {"params": [p for n, p in named if decays(n, p.ndim)], "weight_decay": weight_decay},
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """AdamW over the trainable parameters of a model (or of a loss with its discriminator).

    Args:
        model: on the device it trains on.
        config: `fused` "torch" is torch's fused step, "apex" NVIDIA's FusedAdam, "auto" torch's
            where every parameter can take it, else its loop over tensor lists.

    Raises:
        ValueError: nothing to train; a fused step asked for that these parameters cannot take.
        BackendError: apex asked for, but `apex.optimizers.FusedAdam` is not there.
    """
    groups = parameter_groups(model, config.weight_decay)
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
    }
    if config.fused == "apex":
        return _with_moments(_fused_adam()(groups, adam_w_mode=True, **options))
    parameters = [p for group in groups for p in group["params"]]
    fits = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    if config.fused == "torch" and not fits:
        devices = sorted({p.device.type for p in parameters})
        raise ValueError(f"optimizer.params.fused=torch wants cpu or cuda; got {devices}: use auto")
    return _with_moments(AdamW(groups, fused=fits, **options))


def _with_moments(optimizer: Optimizer) -> Optimizer:
    """Allocate the state that the first step would: a checkpoint is then loaded in place.

    Allocated at the first step, moments would also fragment a CPU's heap.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(p, requires_grad=False)
            if isinstance(optimizer, AdamW):  # apex counts steps by group
                state["step"] = torch.zeros((), device=p.device if group["fused"] else "cpu")
    return optimizer


def _fused_adam() -> Any:
    """NVIDIA's optimizer class, which PyPI's other package `apex` does not have."""
    try:
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError) as error:
        raise BackendError(
            "optimizer.params.fused=apex wants NVIDIA's apex, built from "
            f"https://github.com/NVIDIA/apex (PyPI's apex is another package): {error}. "
            "fused=auto uses torch's own fused step"
        ) from error


def learning_rate(step: int, schedule: ScheduleConfig, base_lr: float, max_steps: int) -> float:
    """Rate of an update: linear from 0, then half a cosine to `end_lr`, or constant.

    Args:
        step: updates done before this one, so the first update has rate 0 if there is a warm-up.
        schedule: warm-up and decay.
        base_lr: rate at the end of the warm-up.
        max_steps: updates of the whole run; the rate stays at its last value after them.
    """
    if step < schedule.warmup_steps:
        return base_lr * step / schedule.warmup_steps
    if schedule.scheduler == "constant":
        return base_lr
    length = max(1, max_steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / length)
    return schedule.end_lr + (base_lr - schedule.end_lr) * 0.5 * (1.0 + cos(pi * progress))


def discriminator_learning_rate(step: int, recipe: Recipe) -> float:
    """Rate of the discriminator at the model's update `step`.

    Its schedule starts at discriminator_start, with a warm-up of its own, and reaches `end_lr` at
    the end of the run. Upstream's does not on several devices: it subtracts the start once from a
    length that it has multiplied by the number of devices.

    Raises:
        ValueError: the discriminator has not started.
    """
    start, optimizer = recipe.losses.discriminator_start, recipe.optimizer
    if step < start:
        raise ValueError(f"the discriminator learns from update {start}; got update {step}")
    base = optimizer.discriminator_learning_rate
    base = optimizer.learning_rate if base is None else base
    steps = recipe.training.max_train_steps - start
    return learning_rate(step - start, recipe.lr_scheduler, base, steps)
