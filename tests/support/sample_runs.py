"""What the tests of `titok-fast sample` share: models, options, and looks at its folder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from support.tiny_models import (
    rebuilt,
    tiny_generator_config,
    tiny_tokenizer,
)

from titok_fast import ImageBert, TiTokPipeline
from titok_fast.cli import main as cli
from titok_fast.sampling.unmask import sample_seeds

NUM, CLASSES = 20, 5
GENERATOR = replace(tiny_generator_config(), condition_num_classes=CLASSES)
NAMES = [*(f"{i:06d}_{i % CLASSES}.png" for i in range(NUM)), "manifest.json"]
AGAIN = "images written so far stay; run the same command again to draw the rest"


def main(arguments: list[str]) -> int:
    return cli.main(["sample", *arguments])


def saved(folder: Path) -> Path:
    """A tokenizer, a generator and another one in a folder, which is returned."""
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    rebuilt(ImageBert(GENERATOR)).save_pretrained(folder / "generator")
    torch.manual_seed(1)
    ImageBert(GENERATOR).save_pretrained(folder / "other")
    return folder


def wanted_pixels(weights: Path) -> np.ndarray:
    """(NUM, S, S, 3) uint8 that every way of drawing must give."""
    pipe = TiTokPipeline.from_pretrained(
        tokenizer=str(weights / "tokenizer"), generator=str(weights / "generator")
    )
    labels, seeds = torch.arange(NUM) % CLASSES, sample_seeds(7, NUM)
    pixels = pipe(labels, seeds=seeds, batch_size=NUM, output="numpy", num_sample_steps=4)
    assert isinstance(pixels, np.ndarray)
    assert len({picture.tobytes() for picture in pixels}) == NUM
    return pixels


def options(weights: Path, out: Path, *more: object) -> list[str]:
    models = [f"--tokenizer={weights / 'tokenizer'}", f"--generator={weights / 'generator'}"]
    run = [f"--out={out}", f"--count={NUM}", "--seed=7", "--steps=4", "--device=cpu", "--quiet"]
    return [*models, *run, *map(str, more)]


def pictures(folder: Path) -> np.ndarray:
    """All PNG files of a folder, which must hold them and the manifest and nothing else."""
    names = sorted(path.name for path in folder.iterdir())
    count = len(names) - 1
    assert names == [*(f"{i:06d}_{i % CLASSES}.png" for i in range(count)), "manifest.json"]
    return np.stack([np.asarray(Image.open(folder / name)) for name in names[:-1]])


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> inode and time of each visible file: a file written again gets others."""
    found = [(path.name, path.stat()) for path in folder.glob("[!.]*")]
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}
