"""Do the work of an experiment: train, reconstruct, sample, probe, time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lib.harness import summary, time_interleaved
from paper.experiments import CLASSES, VQGAN, Experiment, Settings, recipe
from torch import Tensor

from titok_fast import ImageBert, MaskGitVQGAN, TiTok
from titok_fast.data.sources import ArraySource
from titok_fast.data.token_shards import TokenSource
from titok_fast.data.tokenize_shards import pretokenize
from titok_fast.distributed import Ranks
from titok_fast.evaluation.generation import Reference, evaluate_generation, measure_pictures
from titok_fast.evaluation.networks import FeatureNetwork
from titok_fast.evaluation.pictures import ArrayPictures, SourcePictures
from titok_fast.evaluation.probe import ProbeConfig, linear_probe
from titok_fast.evaluation.reconstruction import Reconstruct, evaluate_reconstruction, reconstructor
from titok_fast.evaluation.statistics import Gaussian
from titok_fast.io.images import to_uint8
from titok_fast.sampling.unmask import sample, sample_seeds
from titok_fast.training.loop import FINAL, train
from titok_fast.training.trainer import Trainer

Figures = dict[str, Any]
SIDE = 32
_BATCH = 100  # images per batch in a measurement


class StoppedError(Exception):
    """A signal ended a training; its checkpoint is written."""


@dataclass
class Setup:
    """What all experiments share; `work` holds trained networks and token shards.

    Images are 32 x 32 with classes 0..9. `network` is the feature space and classifies samples.
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
        """Features of all training images, the reference of generated ones."""
        images = SourcePictures(self.train, SIDE)
        return measure_pictures(images, [self.network], batch_size=500)[0].sums.gaussian()

    def final(self, e: Experiment) -> Path:
        """Folder of an experiment's trained network."""
        return self.work / e.name / FINAL

    def load(self, kind: type, e: Experiment) -> Any:
        """The trained network of an experiment, in eval mode."""
        return kind.from_pretrained(str(self.final(e)), device=self.device)

    def recipe(self, e: Experiment) -> Any:
        """The training recipe of an experiment."""
        return recipe(e, self.settings, self.work)


def train_network(setup: Setup, e: Experiment) -> None:
    """Train the network of an experiment, or resume it; return at once where it is done.

    Raises:
        StoppedError: a signal came; the next call resumes.
    """
    weights = setup.final(e) / "model.safetensors"
    if weights.exists():
        return
    source: Any = tokens(setup, e) if e.kind == "generator" else setup.train
    ended = train(setup.recipe(e), setup.ranks, (source, None))
    if not weights.exists():
        raise StoppedError(ended)


def tokens(setup: Setup, e: Experiment) -> TokenSource:
    """All training images as ids of a generator's tokenizer, from shards that are written once."""
    tokenizer = e.needs()[1]
    folder = setup.work / f"{tokenizer.name}-ids"
    model = setup.load(TiTok, tokenizer)
    options: Any = {"augmentation": "center", "batch_size": _BATCH, "ranks": setup.ranks}
    pretokenize(model, setup.train, folder, **options)
    return TokenSource(folder, CLASSES)


def measure(setup: Setup, e: Experiment) -> Figures:
    """Measure an experiment; its network and those it needs must be trained."""
    return _MEASURES[e.kind](setup, e)


def _reconstruction(setup: Setup, reconstruct: Reconstruct, codes: int | None) -> Figures:
    count = setup.settings.judged
    part = ArraySource(setup.test.images[:count], setup.test.labels[:count], "test")
    found = evaluate_reconstruction(
        reconstruct,
        SourcePictures(part, SIDE),
        codebook_size=codes,
        networks=[setup.network],
        with_ssim=False,
        floor=True,
        batch_size=_BATCH,
    )
    return _short(found, setup)


def _short(found: Figures, setup: Setup) -> Figures:
    """Figures without the network's name, which the record has once."""
    return {name.removesuffix(f"[{setup.network.name}]"): value for name, value in found.items()}


def _parameters(model: torch.nn.Module) -> Figures:
    return {"parameters": sum(p.numel() for p in model.parameters())}


def _measure_vqgan(setup: Setup, e: Experiment) -> Figures:
    model = setup.load(MaskGitVQGAN, e)
    return _reconstruction(setup, reconstructor(model), model.config.codebook_size)


def _measure_tokenizer(setup: Setup, e: Experiment) -> Figures:
    """Stage 1 as in the paper's curves: the proxy tokenizer decodes the likeliest proxy codes."""
    tokenizer, vqgan = setup.load(TiTok, e), setup.load(MaskGitVQGAN, VQGAN)

    def through(images: Tensor) -> tuple[Tensor, Tensor]:
        codes, result = tokenizer.encode(images.to(setup.device))
        return vqgan.decode(tokenizer.decode(codes).argmax(dim=1)), result["min_encoding_indices"]

    found = _reconstruction(setup, through, tokenizer.config.codebook_size)
    return _parameters(tokenizer) | found


def _measure_training(setup: Setup, e: Experiment) -> Figures:
    model = setup.load(TiTok, e)
    found = _reconstruction(setup, reconstructor(model), model.config.codebook_size)
    return _parameters(model) | found


def _measure_generator(setup: Setup, e: Experiment) -> Figures:
    generator, tokenizer = setup.load(ImageBert, e), setup.load(TiTok, e.needs()[1])
    decode = _decoder(tokenizer, setup.load(MaskGitVQGAN, VQGAN))
    settings, count = setup.recipe(e).sampling, setup.settings.drawn
    labels, seeds = torch.arange(count) % CLASSES, sample_seeds(0, count)
    parts = [
        decode(sample(generator, *batch, settings)).cpu()
        for batch in zip(labels.split(_BATCH), seeds.split(_BATCH), strict=True)
    ]
    images = ArrayPictures(torch.cat(parts).numpy(), labels.numpy())
    reference = Reference(statistics=setup.statistics, network=setup.network.name)
    found = evaluate_generation(images, reference, [setup.network], batch_size=500)
    return _short(found, setup)


def _decoder(tokenizer: TiTok, vqgan: MaskGitVQGAN) -> Callable[[Tensor], Tensor]:
    """(B, K) ids -> (B, S, S, 3) uint8, truncated as samples are, by the likeliest proxy codes."""

    @torch.no_grad()
    def decode(ids: Tensor) -> Tensor:
        return to_uint8(vqgan.decode(tokenizer.decode_tokens(ids).argmax(dim=1)))

    return decode


def _measure_probe(setup: Setup, e: Experiment) -> Figures:
    S = setup.settings
    config = ProbeConfig(
        epochs=S.probe_epochs,
        warmup_epochs=S.probe_epochs // 10,
        base_learning_rate=1.0,
        batch_size=512,
        augment=False,
    )
    part = ArraySource(setup.train.images[: S.probed], setup.train.labels[: S.probed], "train")
    tokenizer = setup.load(TiTok, e.needs()[1])
    return linear_probe(tokenizer, part, SourcePictures(setup.test, SIDE), CLASSES, config)


def _measure_speed(setup: Setup, e: Experiment) -> Figures:
    """Samples/s of a generator's training and sampling, by tokens; weights do not matter."""
    S = setup.settings
    candidates: dict[str, Callable[[], object]] = {}
    for K in S.tokens:
        candidates[f"training-{K}"] = _training_step(setup, K)
        candidates[f"sampling-{K}"] = _sampling(setup, K)
    seconds = time_interleaved(candidates, repeats=S.repeats, warmup=1, device=setup.device)
    counts = {"training": S.generator_batch, "sampling": S.speed_batch}
    return {
        f"{work}_per_s": {
            str(K): summary([count / s for s in seconds[f"{work}-{K}"]]) for K in S.tokens
        }
        for work, count in counts.items()
    }


def _training_step(setup: Setup, K: int) -> Callable[[], object]:
    B, random = setup.settings.generator_batch, torch.Generator().manual_seed(0)
    trainer = Trainer(setup.recipe(Experiment("generator", "B", K, "arccos")), setup.ranks)
    batch = {
        "tokens": torch.randint(256, (B, K), generator=random),
        "labels": torch.randint(CLASSES, (B,), generator=random),
    }

    def update() -> None:
        trainer.gradients(batch)
        trainer.apply()

    return update


def _sampling(setup: Setup, K: int) -> Callable[[], object]:
    made = setup.recipe(Experiment("generator", "B", K, "arccos"))
    first = setup.recipe(Experiment("tokenizer", "B", K)).tokenizer
    generator, tokenizer, vqgan = (
        model.to(setup.device).eval()
        for model in (ImageBert(made.generator), TiTok(first), MaskGitVQGAN(first.pixel))
    )
    decode, B = _decoder(tokenizer, vqgan), setup.settings.speed_batch
    labels, seeds = torch.arange(B) % CLASSES, sample_seeds(0, B)
    return lambda: decode(sample(generator, labels, seeds, made.sampling))


_MEASURES: dict[str, Callable[[Setup, Experiment], Figures]] = {
    "vqgan": _measure_vqgan,
    "tokenizer": _measure_tokenizer,
    "training": _measure_training,
    "generator": _measure_generator,
    "probe": _measure_probe,
    "speed": _measure_speed,
}
