"""Decay groups against upstream's rule on upstream's names, learning rates, the optimizer."""

import ast
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.official import CHECKOUT, needs_upstream
from support.tiny_models import TINY_KINDS, TINY_VQGAN, tiny_generator, tiny_tokenizer
from torch import Tensor, nn

from titok_fast import MaskGitVQGAN
from titok_fast.models.attention import BackendError
from titok_fast.models.weights import PretrainedModel, to_official
from titok_fast.training.optim import (
    build_optimizer,
    decays,
    discriminator_learning_rate,
    learning_rate,
    parameter_groups,
)
from titok_fast.training.recipe.recipe import Recipe
from titok_fast.training.recipe.sections import (
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)

KINDS = (*TINY_KINDS, "ViT", "UViT", "vqgan")


def model_of(kind: str) -> PretrainedModel:
    if kind == "vqgan":
        return MaskGitVQGAN(TINY_VQGAN)
    return tiny_generator(kind) if kind in ("ViT", "UViT") else tiny_tokenizer(kind)


def official_rule(name: str, p: Tensor) -> bool:
    """The fact sheet's: who decays."""
    words = ["ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed"]
    return p.ndim >= 2 and not any(word in name for word in words)


@cache
def upstreams_predicate() -> Callable[[str, Tensor], bool]:
    """Whom its training script, which cannot be imported, excludes from decay."""
    source = (Path(CHECKOUT) / "utils/train_utils.py").read_text()
    (excluded,) = (
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "exclude"
    )
    return eval(ast.unparse(excluded))


def upstreams_rule(name: str, p: Tensor) -> bool:
    return not upstreams_predicate()(name, p)


@pytest.mark.parametrize(
    "rule", [official_rule, pytest.param(upstreams_rule, marks=needs_upstream)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_our_names_decay_as_the_published_names_do(
    kind: str, rule: Callable[[str, Tensor], bool]
) -> None:
    model = model_of(kind)
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = decays(name, parameter.ndim)
        for official, tensor in to_official({name: parameter}, model.kind).items():
            assert found[name] == rule(official, tensor), name
    assert set(found.values()) == {True, False}


def test_what_decays_in_a_tokenizer() -> None:
    model = model_of("legacy")
    still, rest = parameter_groups(model, 0.03)
    assert (still["weight_decay"], rest["weight_decay"]) == (0.0, 0.03)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in rest["params"]}
    kept = {names[id(p)] for p in still["params"]}
    assert {"decoder.ffn.0.weight", "pixel_decoder.conv_in.weight"} <= decayed
    assert {"decoder.mask_token", "pixel_quantize.embedding.weight"} <= kept
    assert {"decoder.decoder_embed.weight", "decoder.transformer.0.norm1.weight"} <= kept
    # stage 2 freezes everything before the codes
    frozen = ("encoder.", "latent_tokens", "quantize.")
    assert not any(name.startswith(frozen) for name in decayed | kept)
    assert len(decayed) + len(kept) == sum(p.requires_grad for p in model.parameters())


def test_a_model_without_anything_to_train_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="Linear has no trainable parameter"):
        parameter_groups(model, 0.1)


# learning rate

COSINE = ScheduleConfig(warmup_steps=10, end_lr=1e-5)


def test_the_rate_rises_from_zero_and_falls_along_a_cosine() -> None:
    rates = [learning_rate(step, COSINE, 1e-4, 110) for step in range(112)]
    assert rates[0] == 0.0
    assert rates[5] == pytest.approx(5e-5, rel=1e-12)
    assert rates[10] == pytest.approx(1e-4, rel=1e-12)
    assert rates[60] == pytest.approx((1e-4 + 1e-5) / 2, rel=1e-12)
    assert rates[110] == rates[111] == pytest.approx(1e-5, rel=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_constant_rate_and_a_run_without_warm_up() -> None:
    constant = replace(COSINE, scheduler="constant")
    assert [learning_rate(s, constant, 1e-4, 20) for s in (0, 10, 500)] == [0.0, 1e-4, 1e-4]
    assert learning_rate(0, replace(COSINE, warmup_steps=0), 1e-4, 20) == 1e-4
    # a short trial of a long recipe ends inside its warm-up
    assert learning_rate(3, COSINE, 1e-4, 4) == pytest.approx(3e-5)


@needs_upstream
@pytest.mark.parametrize("scheduler", ["cosine", "constant"])
def test_rates_are_upstreams(scheduler: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    path = Path(CHECKOUT) / "utils/lr_schedulers.py"  # its package wants more than torch
    get_scheduler = runpy.run_path(str(path))["get_scheduler"]
    theirs = get_scheduler(scheduler, optimizer, 10, 110, base_lr=3e-4, end_lr=1e-5)
    ours = replace(COSINE, scheduler=scheduler)
    for step in range(111):
        rate = learning_rate(step, ours, 3e-4, 110)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12)
        optimizer.step()
        theirs.step()


def test_the_discriminator_has_a_clock_of_its_own_and_ends_with_the_run() -> None:
    optimizer = OptimizerConfig(learning_rate=1e-4, discriminator_learning_rate=2e-4)
    run = Recipe(
        "classifier",
        losses=LossConfig(discriminator_start=50),
        lr_scheduler=COSINE,
        training=TrainingConfig(max_train_steps=150),
    )

    def rate(step: int, config: OptimizerConfig = optimizer) -> float:
        return discriminator_learning_rate(step, replace(run, optimizer=config))

    assert rate(50) == 0.0
    assert rate(60) == pytest.approx(2e-4, rel=1e-12)
    assert rate(150) == pytest.approx(1e-5, rel=1e-12)
    assert rate(149) > 1e-5
    same = replace(optimizer, discriminator_learning_rate=None)
    assert rate(60, same) == pytest.approx(1e-4, rel=1e-12)
    with pytest.raises(ValueError, match="learns from update 50; got update 49"):
        rate(49)


# the optimizer


def trained(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[torch.Tensor]:
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(8, 5).to(next(model.parameters()).device)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def small() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


@pytest.mark.parametrize("fused", ["auto", "torch"])
def test_it_steps_as_plain_adamw_with_two_groups_does(fused: str) -> None:
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.3, epsilon=1e-3, fused=fused)
    ours = small()
    optimizer = build_optimizer(ours, config)
    assert optimizer.defaults["fused"] is True
    plain = small()
    vectors = [p for p in plain.parameters() if p.ndim < 2]
    matrices = [p for p in plain.parameters() if p.ndim == 2]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.3}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-3, foreach=False)
    for got, want in zip(trained(optimizer, ours), trained(reference, plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_its_state_is_there_before_the_first_step(device: str) -> None:
    ours, plain = small().to(device), small().to(device)
    optimizer = build_optimizer(ours, OptimizerConfig())
    reference = torch.optim.AdamW(plain.parameters(), fused=device == "cpu")
    before = {p: dict(optimizer.state[p]) for p in ours.parameters()}
    trained(reference, plain)
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        shapes = {k: (v.shape, v.dtype, v.device) for k, v in before[mine].items()}
        wanted = {k: (v.shape, v.dtype, v.device) for k, v in reference.state[other].items()}
        assert shapes == wanted
    trained(optimizer, ours)
    for p, state in before.items():
        assert all(optimizer.state[p][k] is v for k, v in state.items())


def test_where_the_fused_step_does_not_fit() -> None:
    model = nn.Linear(2, 2, device="meta")
    assert build_optimizer(model, OptimizerConfig()).defaults["fused"] is False
    with pytest.raises(ValueError, match=r"wants cpu or cuda; got \['meta'\]"):
        build_optimizer(model, OptimizerConfig(fused="torch"))


@pytest.mark.parametrize("module", [None, ModuleType("apex.optimizers")])
def test_apex_is_looked_for_by_its_class(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType | None
) -> None:
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)  # None: cannot be imported
    with pytest.raises(BackendError, match="PyPI's apex is another package"):
        build_optimizer(small(), OptimizerConfig(fused="apex"))


def test_apex_gets_adamws_mode_and_our_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    seen: dict[str, Any] = {}

    def fused_adam(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        seen.update(options, decay=[g["weight_decay"] for g in groups])
        return torch.optim.SGD(groups, lr=options["lr"])

    monkeypatch.setitem(sys.modules, "apex.optimizers", SimpleNamespace(FusedAdam=fused_adam))
    config = OptimizerConfig(learning_rate=0.5, beta1=0.8, beta2=0.7, epsilon=0.1, fused="apex")
    build_optimizer(small(), replace(config, weight_decay=0.2))
    adam = {"lr": 0.5, "betas": (0.8, 0.7), "eps": 0.1, "adam_w_mode": True}
    assert seen == {**adam, "decay": [0.0, 0.2]}
