"""The images of one `titok-fast sample`: their batches, their pixels, and all that decides them."""

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from titok_fast.cli.options import sampling_changes
from titok_fast.distributed import Ranks
from titok_fast.io.images import grid, save_png, to_pil
from titok_fast.pipeline import TiTokPipeline
from titok_fast.sampling.unmask import sample_seeds
from titok_fast.settings import __version__

_MOST_COLUMNS = 20  # wider sheets do not fit a screen


@dataclass(frozen=True)
class Drawing:
    """What this process draws with, and the (n,) label of each image of the run."""

    args: argparse.Namespace
    ranks: Ranks
    pipe: TiTokPipeline
    labels: np.ndarray

    @property
    def batch_size(self) -> int:
        """Images at once."""
        return self.args.batch_size or self.pipe.default_batch_size

    def pieces(self) -> list[np.ndarray]:
        """Indices of batches with fixed borders, whoever draws them and whatever is there."""
        indices, size = np.arange(len(self.labels)), self.batch_size
        return [indices[first : first + size] for first in range(0, len(indices), size)]

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """(B,) consecutive indices -> (B, S, S, 3) uint8."""
        made = self.pipe(
            torch.from_numpy(self.labels[indices]),
            seeds=sample_seeds(self.args.seed, len(indices), first=int(indices[0])),
            batch_size=self.batch_size,
            output="numpy",
            **sampling_changes(self.args),
        )
        assert isinstance(made, np.ndarray)
        return made

    def save_sheet(self, pixels: np.ndarray) -> str:
        """Write all images (n, S, S, 3) uint8 as one PNG file, and say so."""
        count = len(np.unique(self.labels))
        # where few classes take turns, a column for each
        in_turn = self.args.labels is None and count <= _MOST_COLUMNS
        save_png(self.args.grid, grid(to_pil(pixels), count if in_turn else None))
        return f"{len(self.labels)} images in {self.args.grid}"

    def manifest(self) -> dict[str, Any]:
        """All that decides what the images look like, as plain JSON values."""
        args, pipe = self.args, self.pipe
        assert pipe.generator is not None
        manifest = {
            "titok_fast": __version__,
            "model": args.model,
            "random_weights": args.random_weights,
            "weights_sha256": _digest(pipe),
            "tokenizer": asdict(pipe.tokenizer.config),
            "generator": asdict(pipe.generator.config),
            "sampling": asdict(pipe.sampling.updated(**sampling_changes(args))),
            "dtype": str(pipe.tokenizer.dtype).removeprefix("torch."),
            "fast": pipe.techniques_of(args.fast),
            "seed": args.seed,
            "num": len(self.labels),
            "files": "png" if args.out else "raw",
        }
        if args.labels is None:
            manifest["classes"] = pipe.generator.config.condition_num_classes  # in turn
        else:
            manifest |= {"labels": args.labels, "of_each": None if args.count else args.num or 1}
        return json.loads(json.dumps(manifest))  # as a file gives it back: lists for tuples


def _digest(pipe: TiTokPipeline) -> str:
    """Of names and bytes as loaded: the same whatever file, folder or format they came from."""
    digest = hashlib.sha256()
    for model in (pipe.tokenizer, pipe.generator):
        assert model is not None
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
