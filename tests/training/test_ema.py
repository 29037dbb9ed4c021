"""The moving average: its rule, frozen parameters, swapping, sharded models."""

from pathlib import Path

import pytest
import torch
from support.official import needs_upstream, official
from support.ranks import two_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from titok_fast.training.ema import Ema

STEPS = 12


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))


def move(model: nn.Module, step: int) -> None:
    """Change parameters as an optimizer would, alike on every rank."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.0 - 0.01 * (step + 1)).add_(0.003 * step)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def averaging(model: nn.Module, decay: float) -> Ema:
    """The average after a short run."""
    ema = Ema(model, decay)
    for step in range(STEPS):
        move(model, step)
        ema.update(step)
    return ema


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_the_decay_is_zero_first_and_rises_to_its_bound() -> None:
    model = network()
    ema = Ema(model, 0.5)
    expected = {n: p.double() for n, p in weights(model).items()}
    for step in range(STEPS):
        move(model, step)
        ema.update(step)
        if step == 0:
            assert same(ema.average, weights(model))  # the first update copies
        decay = 0.0 if step == 0 else min(0.5, (1 + step) / (10 + step))
        for name, now in weights(model).items():
            expected[name] += (1 - decay) * (now.double() - expected[name])
    for name, want in expected.items():
        torch.testing.assert_close(ema.average[name].double(), want, rtol=1e-6, atol=1e-7)


@needs_upstream
def test_it_is_upstreams_average() -> None:
    model = network()
    model[0].requires_grad_(False)
    with official("modeling.modules.ema_model") as upstream:
        theirs = upstream.EMAModel(model.parameters(), decay=0.6)
    ours = Ema(model, 0.6)
    for step in range(STEPS):
        move(model, step)
        ours.update(step)
        theirs.step(model.parameters())
    with ours.applied():
        for got, want in zip(model.parameters(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(got.detach(), want, rtol=1e-6, atol=1e-7)


def test_a_frozen_parameter_is_its_own_average() -> None:
    model = network()
    model[0].requires_grad_(False)
    ema = Ema(model, 0.9)
    assert set(ema.average) == {"2.weight", "2.bias"}
    with torch.no_grad():
        model[0].weight.fill_(4.0)  # weights loaded after the average was made
    ema.update(5)
    with ema.applied():
        assert torch.equal(model[0].weight, torch.full((7, 5), 4.0))


def test_applied_shows_the_averages_and_gives_the_weights_back() -> None:
    model = network()
    ema = Ema(model, 0.9)
    move(model, 4)
    raw, average = weights(model), {n: t.clone() for n, t in ema.average.items()}
    assert not same(raw, average)
    with ema.applied():
        assert same(weights(model), average)
    assert same(weights(model), raw)
    assert same(ema.average, average)
    with pytest.raises(KeyError), ema.applied():
        raise KeyError  # an evaluation that fails
    assert same(weights(model), raw)


def test_nothing_else_happens_while_the_weights_are_swapped() -> None:
    ema = Ema(network(), 0.9)
    with ema.applied():
        for forbidden in (
            lambda: ema.update(1),
            lambda: ema.average,
            lambda: ema.applied().__enter__(),
        ):
            with pytest.raises(RuntimeError, match="the weights are swapped"):
                forbidden()


def test_a_decay_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay in \[0, 1\]; got 1\.5"):
        Ema(network(), 1.5)


def _average_sharded(rank: int, world: int, folder: Path) -> None:
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    ema = averaging(model, 0.7)
    assert all(isinstance(t, DTensor) for t in ema.average.values())
    raw = weights(model)
    with ema.applied():
        y = model(torch.ones(2, 5))  # gathers what was swapped in
    model(torch.ones(2, 5))  # leaves the root gathered: the next swap must not act on copies
    with ema.applied():
        assert torch.equal(model(torch.ones(2, 5)), y)
    whole = {n: t.full_tensor() for n, t in ema.average.items()}  # type: ignore[attr-defined]
    unchanged = all(
        torch.equal(p.to_local(), raw[n].to_local())  # type: ignore[attr-defined]
        for n, p in model.named_parameters()
    )
    if rank == 0:
        torch.save({"average": whole, "y": y.detach(), "unchanged": unchanged}, folder / "out")


def test_sharded_models_average_as_whole_ones_do(tmp_path: Path) -> None:
    two_ranks(_average_sharded, tmp_path)
    got = torch.load(tmp_path / "out", weights_only=True)
    model = network()
    ema = averaging(model, 0.7)
    assert same(got["average"], ema.average)
    assert got["unchanged"]
    with ema.applied():
        torch.testing.assert_close(got["y"], model(torch.ones(2, 5)).detach())
