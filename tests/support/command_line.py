"""What the tests of commands share: configurations of their models, calls and looks at files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from support.tiny_models import (
    tiny_generator_config,
    tiny_tokenizer_config,
)

from titok_fast.cli import main as cli
from titok_fast.sampling_config import SamplingConfig

TOKENIZER, VAE = tiny_tokenizer_config(), tiny_tokenizer_config("vae")
GENERATOR = replace(tiny_generator_config(), condition_num_classes=10)
SAMPLING = SamplingConfig(3, 2.0, "linear", softmax_temperature_annealing=True)


def both(weights: Path) -> list[str]:
    return [f"--tokenizer={weights / 'tokenizer'}", f"--generator={weights / 'generator'}"]


def run(*arguments: object) -> int:
    return cli.main([*map(str, arguments), "--quiet", "--device=cpu"])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden and temporary files too."""
    return sorted(path.name for path in folder.iterdir())
