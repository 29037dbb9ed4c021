"""Linear probing: train a linear classifier on a frozen encoder's latents and test it.

The paper names MAE's recipe (arXiv:2111.06377, code facebookresearch/mae): BatchNorm without
affine, a linear layer, LARS. It does not say which features it used: `layer` chooses them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok_fast.data.sources import Source
from titok_fast.distributed import gather_rows, my_share, sum_over_ranks
from titok_fast.evaluation.measure import Figures
from titok_fast.evaluation.pictures import Pictures, batches
from titok_fast.io.images import to_tensor
from titok_fast.models.packages import package
from titok_fast.models.tokenizer import TiTok
from titok_fast.settings import Settings, among, within

LAYERS = ("latents", "codes")
_TRUST = 0.001  # LARS: step length as a share of the weights' length, MAE's value


@dataclass(frozen=True)
class ProbeConfig(Settings):
    """Settings; the defaults are MAE's for ImageNet. Small data want a smaller batch.

    Fewer than about fifty steps say little: BatchNorm's running mean averages over ten steps, and
    LARS moves the weights by a fixed share of their length each step.

    Attributes:
        layer: "latents", the D-wide latents after the encoder's last norm, or "codes", the C-wide
            vectors before quantisation (of a VAE: the means); either way their mean over the K
            tokens.
        epochs: passes over the training data.
        warmup_epochs: linear, from 0; then half a cosine down to 0.
        base_learning_rate: per 256 images of a batch.
        batch_size: images per step, of all ranks together; at most the training set.
        weight_decay, momentum: of LARS.
        augment: random resized crop and flip, drawn anew each epoch, so that each image is
            encoded in each epoch; else the evaluation's crop, encoded once.
        encode_batch_size: images in the encoder at once.
        seed: of order, crops and the head.
    """

    layer: str = among("latents", *LAYERS)
    epochs: int = within(90, 1)
    warmup_epochs: int = 10
    base_learning_rate: float = 0.1
    batch_size: int = within(16384, 1)
    weight_decay: float = 0.0
    momentum: float = 0.9
    augment: bool = True
    encode_batch_size: int = within(256, 1)
    seed: int = 0


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose matrices move by a fixed share of their length (arXiv:1708.03888).

    As in MAE's code, vectors get neither that nor weight decay. Not timm's: the package does not
    depend on timm.
    """

    def __init__(
        self, parameters: Any, *, lr: float, weight_decay: float = 0.0, momentum: float = 0.9
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad
                if p.ndim > 1:
                    step = step + group["weight_decay"] * p
                    length, move = torch.linalg.vector_norm(p), torch.linalg.vector_norm(step)
                    trust = torch.where((length > 0) & (move > 0), _TRUST * length / move, 1.0)
                    step = step * trust
                state = self.state[p]
                speed = state.setdefault("momentum", torch.zeros_like(p))
                speed.mul_(group["momentum"]).add_(step)
                p.add_(speed, alpha=-group["lr"])


@torch.no_grad()
def probe_features(tokenizer: TiTok, images: Tensor, layer: str) -> Tensor:
    """Inputs of the linear layer, of images (B, 3, S, S) in [0, 1] on any device.

    Returns:
        (B, D) float32 for the layer "latents", (B, C) for "codes", on the tokenizer's device.
    """
    seen: list[Tensor] = []
    encoder = tokenizer.encoder
    handle = encoder.ln_post.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        z = encoder(images.to(tokenizer.latent_tokens), tokenizer.latent_tokens)
    finally:
        handle.remove()
    if layer == "latents":
        return seen[0].float().mean(dim=1)  # (B, K, D)
    return z[:, : tokenizer.config.token_size].float().mean(dim=(2, 3))  # (B, C, 1, K)


def linear_probe(
    tokenizer: TiTok,
    train: Source,
    test: Pictures,
    classes: int,
    config: ProbeConfig | None = None,
    *,
    progress: Callable[[int], object] | None = None,
) -> Figures:
    """Train a linear classifier on frozen features, and test it.

    Ranks of a process group share the encoding; all train the same head and get the figures.

    Args:
        tokenizer: frozen.
        train: images with classes 0..classes-1, of any size.
        test: images with classes, of the tokenizer's size.
        classes: their number.
        config: None for MAE's settings.
        progress: called with 1 after each epoch.

    Returns:
        `probe_top1` and `probe_top5` in [0, 1], and `probe_epochs`.

    Raises:
        ValueError: an unknown layer, or images without a class.
        ImportError: torchvision, which draws the crops, is missing.
    """
    config = config or ProbeConfig()
    device, count = tokenizer.latent_tokens.device, len(train)
    batch = min(config.batch_size, count)
    crop = _random_crop(tokenizer.config.crop_size) if config.augment else None
    cached = None if crop else _encode(tokenizer, train, range(count), config)
    head = _head(_width(tokenizer, config.layer), classes, config.seed).to(device)
    optimizer = LARS(
        head.parameters(), lr=0.0, weight_decay=config.weight_decay, momentum=config.momentum
    )
    for epoch in range(config.epochs):
        for b, rows in enumerate(_order(count, batch, config.seed, epoch)):
            if cached is not None:
                features, labels = cached[0][rows], cached[1][rows]
            else:
                features, labels = _encode(tokenizer, train, rows.tolist(), config, crop, epoch)
            optimizer.param_groups[0]["lr"] = _rate(epoch + b / (count // batch), batch, config)
            loss = F.cross_entropy(head(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if progress is not None:
            progress(1)
    return _test(tokenizer, test, head.eval(), config) | {"probe_epochs": float(config.epochs)}


def _head(width: int, classes: int, seed: int) -> nn.Module:
    linear = nn.Linear(width, classes)
    drawn = torch.Generator().manual_seed(seed)
    nn.init.trunc_normal_(linear.weight, std=0.01, generator=drawn)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)


def _width(tokenizer: TiTok, layer: str) -> int:
    config = tokenizer.config
    return config.encoder_size[0] if layer == "latents" else config.token_size


def _order(count: int, batch: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Whole batches of an epoch."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_seed(seed, epoch)))
    yield from order[: count - count % batch].split(batch)


def _seed(*numbers: int) -> int:
    """One seed of several numbers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _rate(epoch: float, batch: int, config: ProbeConfig) -> float:
    """Learning rate at a fractional epoch."""
    peak = config.base_learning_rate * batch / 256
    if epoch < config.warmup_epochs:
        return peak * epoch / config.warmup_epochs
    done = (epoch - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def _encode(
    tokenizer: TiTok,
    source: Source,
    rows: Sequence[int],
    config: ProbeConfig,
    crop: Callable[[np.ndarray, int], Tensor] | None = None,
    epoch: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features (n, d) and labels (n,) of records; each rank encodes its share of them."""
    share, device = my_share(len(rows)), tokenizer.latent_tokens.device
    width = _width(tokenizer, config.layer)
    features, labels = [torch.empty(0, width, device=device)], list[int]()
    for first in range(share.start, share.stop, config.encode_batch_size):
        part = rows[first : min(first + config.encode_batch_size, share.stop)]
        records = [source.read(row) for row in part]
        if crop is None:
            images = to_tensor([record.values for record in records], tokenizer.config.crop_size)
        else:
            seeds = [_seed(config.seed, epoch, row) for row in part]
            images = torch.stack([crop(r.values, s) for r, s in zip(records, seeds, strict=True)])
        features.append(probe_features(tokenizer, images, config.layer))
        labels += [record.label for record in records]
    classes = torch.tensor(labels, dtype=torch.int64, device=device)
    parts = torch.cat(features), classes
    return tuple(gather_rows(part, share.start, len(rows)) for part in parts)  # type: ignore[return-value]


def _random_crop(size: int) -> Callable[[np.ndarray, int], Tensor]:
    """MAE's training view: random part, bicubic and antialiased resize, mirrored half the time.

    Returns:
        (H, W, 3) uint8 and a seed -> (3, S, S) float32 in [0, 1].
    """
    transforms = package("torchvision.transforms.v2")
    bicubic = transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(size, interpolation=bicubic, antialias=True)
    view = transforms.Compose([crop, transforms.RandomHorizontalFlip()])

    def draw(image: np.ndarray, seed: int) -> Tensor:
        # torchvision draws from the global generator: seed a fork of it for this image
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pixels: Tensor = view(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1))
        return pixels.float() / 255

    return draw


@torch.no_grad()
def _test(tokenizer: TiTok, test: Pictures, head: nn.Module, config: ProbeConfig) -> Figures:
    right = torch.zeros(3, dtype=torch.float64)  # at rank 1, up to rank 5, images
    for _, images, labels in batches(test, config.encode_batch_size):
        if labels is None:
            raise ValueError("linear probing wants test images with classes; these have none")
        pixels = images.permute(0, 3, 1, 2).float() / 255
        logits = head(probe_features(tokenizer, pixels, config.layer))
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu()
        hits = best == labels[:, None]
        right += torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum(), torch.tensor(len(labels))])
    first, fifth, count = sum_over_ranks(right).tolist()
    return {"probe_top1": first / count, "probe_top5": fifth / count}
