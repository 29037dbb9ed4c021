"""Doing the work of paper_trends.py's cells: training, reconstructing, drawing, probing, timing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lib.harness import summary, time_interleaved
from paper.cells import CLASSES, VQGAN, Cell, Settings, recipe
from torch import Tensor

from titok_fast import ImageBert, MaskGitVQGAN, TiTok
from titok_fast.cli.pretokenize import pretokenize
from titok_fast.data.sources import ArraySource
from titok_fast.data.token_shards import TokenSource
from titok_fast.distributed import Ranks
from titok_fast.evaluation.generation import Reference, evaluate_generation, measure_pictures
from titok_fast.evaluation.networks import FeatureNetwork
from titok_fast.evaluation.pictures import ArrayPictures, SourcePictures
from titok_fast.evaluation.probe import ProbeConfig, linear_probe
from titok_fast.evaluation.reconstruction import (
    Reconstruct,
    evaluate_reconstruction,
    reconstructor,
)
from titok_fast.evaluation.statistics import Gaussian
from titok_fast.io.images import to_uint8
from titok_fast.sampling.unmask import sample, sample_seeds
from titok_fast.training.loop import FINAL, train
from titok_fast.training.trainer import Trainer

Figures = dict[str, Any]
SIDE = 32
_AT_ONCE = 100  # pictures in a network that is measured


class StoppedError(Exception):
    """A signal ended a training; its checkpoint is written."""


@dataclass
class Bench:
    """What all cells share.

    Attributes:
        settings: of the run.
        work: folder of trained networks and token shards.
        train, test: pictures of 32 x 32 with classes 0..9.
        network: the feature space, and the judge of classes.
        device: where networks run.
    """

    settings: Settings
    work: Path
    train: ArraySource
    test: ArraySource
    network: FeatureNetwork
    device: torch.device

    @property
    def ranks(self) -> Ranks:
        """This process alone."""
        return Ranks(0, 1, self.device)

    @cached_property
    def statistics(self) -> Gaussian:
        """Features of all training pictures, which drawn ones are compared with."""
        pictures = SourcePictures(self.train, SIDE)
        return measure_pictures(pictures, [self.network], batch_size=500)[0].sums.gaussian()

    def load(self, kind: type, cell: Cell) -> Any:
        """The trained network of a cell, in eval mode."""
        return kind.from_pretrained(str(self.work / cell.name / FINAL), device=self.device)

    def judged(self) -> SourcePictures:
        """The first pictures of the evaluation set."""
        count = self.settings.judged
        part = ArraySource(self.test.images[:count], self.test.labels[:count], "test")
        return SourcePictures(part, SIDE)


def train_cell(bench: Bench, cell: Cell) -> None:
    """Train the network of a cell, or go on with it; nothing to do where it is done.

    Raises:
        StoppedError: a signal came; the next call goes on.
    """
    if (bench.work / cell.name / FINAL / "model.safetensors").exists():
        return
    source: Any = tokens(bench, cell) if cell.kind == "generator" else bench.train
    ended = train(recipe(cell, bench.settings, bench.work), bench.ranks, (source, None))
    if not (bench.work / cell.name / FINAL / "model.safetensors").exists():
        raise StoppedError(ended)


def tokens(bench: Bench, cell: Cell) -> TokenSource:
    """All training pictures as the tokens of a generator's tokenizer, from shards made once."""
    first = Cell("tokenizer", cell.size, cell.tokens)
    folder = bench.work / f"{first.name}-ids"
    pretokenize(
        bench.load(TiTok, first), bench.train, folder, augmentation="center",
        batch_size=_AT_ONCE, device=bench.device,
    )  # fmt: skip
    return TokenSource(folder, CLASSES)


def pixels(images: np.ndarray) -> Tensor:
    """Grey (n, S, S) or (n, S, S, 3) uint8 -> (n, 3, S, S) in [0, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
    return x[:, None].expand(-1, 3, -1, -1) if x.ndim == 3 else x.permute(0, 3, 1, 2)


def figures_of(bench: Bench, cell: Cell) -> Figures:
    """Measure a cell whose network, and those it needs, are trained."""
    return _WORK[cell.kind](bench, cell)


def _judge(bench: Bench, reconstruct: Reconstruct, codes: int | None) -> Figures:
    found = evaluate_reconstruction(
        reconstruct, bench.judged(), codebook_size=codes, networks=[bench.network],
        with_ssim=False, floor=True, batch_size=_AT_ONCE,
    )  # fmt: skip
    return _short(found, bench.network)


def _short(found: Figures, network: FeatureNetwork) -> Figures:
    """Figures without the network's name, which the record has once."""
    return {name.removesuffix(f"[{network.name}]"): value for name, value in found.items()}


def _judge_vqgan(bench: Bench, cell: Cell) -> Figures:
    model = bench.load(MaskGitVQGAN, cell)
    return _judge(bench, reconstructor(model), model.config.codebook_size)


def _judge_tokenizer(bench: Bench, cell: Cell) -> Figures:
    """Stage 1 as in the paper's curves: the likeliest proxy codes, drawn by the proxy tokenizer."""
    tokenizer, vqgan = bench.load(TiTok, cell), bench.load(MaskGitVQGAN, VQGAN)

    def through(images: Tensor) -> tuple[Tensor, Tensor]:
        codes, result = tokenizer.encode(images.to(bench.device))
        return vqgan.decode(tokenizer.decode(codes).argmax(dim=1)), result["min_encoding_indices"]

    parameters = sum(p.numel() for p in tokenizer.parameters())
    codes = tokenizer.config.codebook_size
    return {"parameters": parameters} | _judge(bench, through, codes)


def _judge_training(bench: Bench, cell: Cell) -> Figures:
    model = bench.load(TiTok, cell)
    parameters = sum(p.numel() for p in model.parameters())
    found = _judge(bench, reconstructor(model), model.config.codebook_size)
    return {"parameters": parameters} | found


def _draw_and_judge(bench: Bench, cell: Cell) -> Figures:
    generator = bench.load(ImageBert, cell)
    decode = _decoder(bench.load(TiTok, cell.needs()[1]), bench.load(MaskGitVQGAN, VQGAN))
    settings = recipe(cell, bench.settings, bench.work).sampling
    count = bench.settings.drawn
    labels, seeds = torch.arange(count) % CLASSES, sample_seeds(0, count)
    parts = [
        decode(sample(generator, some, own, settings)).cpu()
        for some, own in zip(labels.split(_AT_ONCE), seeds.split(_AT_ONCE), strict=True)
    ]
    pictures = ArrayPictures(torch.cat(parts).numpy(), labels.numpy())
    reference = Reference(statistics=bench.statistics, network=bench.network.name)
    found = evaluate_generation(pictures, reference, [bench.network], batch_size=500)
    return _short(found, bench.network)


def _decoder(tokenizer: TiTok, vqgan: MaskGitVQGAN) -> Callable[[Tensor], Tensor]:
    """(B, K) ids -> (B, S, S, 3) uint8, truncated as samples are, by the likeliest proxy codes."""

    @torch.no_grad()
    def decode(ids: Tensor) -> Tensor:
        return to_uint8(vqgan.decode(tokenizer.decode_tokens(ids).argmax(dim=1)))

    return decode


def _probe(bench: Bench, cell: Cell) -> Figures:
    S = bench.settings
    config = ProbeConfig(
        epochs=S.probe_epochs, warmup_epochs=S.probe_epochs // 10, base_learning_rate=1.0,
        batch_size=512, augment=False,
    )  # fmt: skip
    part = ArraySource(bench.train.images[: S.probed], bench.train.labels[: S.probed], "train")
    tokenizer = bench.load(TiTok, cell.needs()[1])
    return linear_probe(tokenizer, part, SourcePictures(bench.test, SIDE), CLASSES, config)


def _speeds(bench: Bench, cell: Cell) -> Figures:
    """Samples/s of a generator's updates and of drawing, by tokens; weights do not matter."""
    S = bench.settings
    candidates: dict[str, Callable[[], object]] = {}
    for K in S.tokens:
        candidates[f"training-{K}"] = _update(bench, K)
        candidates[f"sampling-{K}"] = _drawing(bench, K)
    seconds = time_interleaved(candidates, repeats=S.repeats, warmup=1, device=bench.device)
    counts = {"training": S.generator_batch, "sampling": S.speed_batch}
    return {
        f"{what}_per_s": {
            str(K): summary([counts[what] / s for s in seconds[f"{what}-{K}"]]) for K in S.tokens
        }
        for what in counts
    }


def _update(bench: Bench, K: int) -> Callable[[], object]:
    S, drawn = bench.settings, torch.Generator().manual_seed(0)
    made = recipe(Cell("generator", "B", K, "arccos"), S, bench.work)
    learner, N = Trainer(made, bench.ranks), 256
    batch = {
        "tokens": torch.randint(N, (S.generator_batch, K), generator=drawn),
        "labels": torch.randint(CLASSES, (S.generator_batch,), generator=drawn),
    }

    def update() -> None:
        learner.gradients(batch)
        learner.apply()

    return update


def _drawing(bench: Bench, K: int) -> Callable[[], object]:
    S = bench.settings
    made = recipe(Cell("generator", "B", K, "arccos"), S, bench.work)
    first = recipe(Cell("tokenizer", "B", K), S, bench.work)
    assert made.generator is not None
    assert first.tokenizer is not None
    generator = ImageBert(made.generator).to(bench.device).eval()
    tokenizer = TiTok(first.tokenizer).to(bench.device).eval()
    decode = _decoder(tokenizer, MaskGitVQGAN(first.tokenizer.pixel).to(bench.device).eval())
    labels, seeds = torch.arange(S.speed_batch) % CLASSES, sample_seeds(0, S.speed_batch)
    return lambda: decode(sample(generator, labels, seeds, made.sampling))


_WORK: dict[str, Callable[[Bench, Cell], Figures]] = {
    "vqgan": _judge_vqgan,
    "tokenizer": _judge_tokenizer,
    "training": _judge_training,
    "generator": _draw_and_judge,
    "probe": _probe,
    "speed": _speeds,
}
