"""The discriminator: published keys and sizes, blur, pool, and the official module's numbers."""

import pytest
import torch
import torch.nn.functional as F
from support.official import needs_upstream, official

from titok_fast.training.discriminator import Blur, Discriminator

PUBLISHED = {
    "block_in.0.weight": (128, 3, 5, 5),
    "block_in.0.bias": (128,),
    **{
        key: shape
        for s, (i, o) in enumerate([(128, 128), (128, 256), (256, 512)])
        for key, shape in {
            f"blocks.{s}.0.weight": (o, i, 3, 3),
            f"blocks.{s}.0.bias": (o,),
            f"blocks.{s}.1.kernel": (1, 1, 4, 4),
            f"blocks.{s}.2.weight": (o,),
            f"blocks.{s}.2.bias": (o,),
        }.items()
    },
    "to_logits.0.weight": (512, 512, 1, 1),
    "to_logits.0.bias": (512,),
    "to_logits.2.weight": (1, 512, 5, 5),
    "to_logits.2.bias": (1,),
}


def test_keys_shapes_and_size_are_the_published_ones() -> None:
    with torch.device("meta"):
        network = Discriminator()
    assert {k: tuple(t.shape) for k, t in network.state_dict().items()} == PUBLISHED
    assert sum(p.numel() for p in network.parameters()) == 1_909_889


@pytest.mark.parametrize(
    ("side", "logits"), [(512, 16), (256, 16), (128, 16), (120, 15), (64, 8), (32, 4), (8, 1)]
)
def test_grid_of_logits(side: int, logits: int) -> None:
    with torch.device("meta"):
        got = Discriminator()(torch.empty(2, 3, side, side))
    assert got.shape == (2, 1, logits, logits)


def test_pooled_side_width_and_stages() -> None:
    network = Discriminator(32, num_stages=2, pooled_side=3)
    assert network(torch.rand(1, 3, 32, 24)).shape == (1, 1, 3, 3)
    assert [block[2].num_channels for block in network.blocks] == [32, 64]


@pytest.mark.parametrize(("H", "W"), [(8, 8), (7, 8), (8, 7), (9, 5), (1, 1)])
def test_blur_pads_like_a_same_convolution(H: int, W: int) -> None:
    x = torch.randn(2, 3, H, W, dtype=torch.float64)
    blur = Blur().double()
    taps = torch.tensor([1, 3, 3, 1], dtype=torch.float64) / 8
    pads = []
    for side in (W, H):
        total = max((-(-side // 2) - 1) * 2 + 4 - side, 0)
        pads += [total // 2, total - total // 2]
    windows = F.pad(x, pads).unfold(2, 4, 2).unfold(3, 4, 2)
    want = torch.einsum("bchwij,i,j->bchw", windows, taps, taps)
    torch.testing.assert_close(blur(x), want, rtol=1e-12, atol=1e-12)
    assert blur(x).shape[2:] == (-(-H // 2), -(-W // 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((48,), "hidden_channels to be a multiple of 32"),
        ((0,), "hidden_channels to be a multiple of 32"),
        ((32, 0), r"at least 1; got \(0, 16\)"),
        ((32, 3, 0), r"at least 1; got \(3, 0\)"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Discriminator(*arguments)


def test_wrong_images_are_named() -> None:
    with pytest.raises(ValueError, match=r"images \(B, 3, H, W\); got \(2, 1, 32, 32\)"):
        Discriminator(32)(torch.rand(2, 1, 32, 32))


@needs_upstream
@pytest.mark.parametrize("sides", [(128, 128), (131, 150)])
def test_logits_and_gradients_are_upstreams(sides: tuple[int, int]) -> None:
    ours = Discriminator()
    with official("modeling.modules.discriminator") as module:
        theirs = module.NLayerDiscriminator()
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(1, 3, *sides)
    results = []
    for network in (ours, theirs):
        x = images.clone().requires_grad_()
        logits = network(x)
        (logits * torch.linspace(-1, 1, 256).view_as(logits)).sum().backward()
        results.append([logits.detach(), x.grad, *(p.grad for p in network.parameters())])
    assert results[0][0].shape == (1, 1, 16, 16)
    for got, want in zip(*results, strict=True):
        # gradients add up thousands of terms in another order; compare by their size
        assert (got - want).norm() <= 1e-6 * want.norm()
