"""`titok-fast convert`: models that training wrote, as one small folder to ship.

The folder holds those of `tokenizer`, `generator` and `classifier` that were named, as safetensors.
Half precision halves their size; loading gives float32 again.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from titok_fast.config import FLOAT_DTYPES
from titok_fast.io.files import fetch, read_tensors, write_atomic, write_tensors
from titok_fast.loading import generator_config_of
from titok_fast.models.classifier import FashionClassifier
from titok_fast.models.generator import generator_class
from titok_fast.models.tokenizer import TiTok
from titok_fast.models.weights import check_tensors
from titok_fast.pipeline import TiTokPipeline

PARTS = ("tokenizer", "generator", "classifier")
# small differences of distances decide ids, so codebooks stay as they were trained
_FLOAT32 = "quantize.embedding.weight"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments on its parser."""
    parser.description = (
        "Put the models of training runs (their folders `final`) into one folder, in half "
        "precision. It appears whole or not at all."
    )
    add = parser.add_argument
    for part in PARTS:
        add(f"--{part}", type=Path, metavar="DIR", help=f"folder of the trained {part}")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    what = "number format in the files; codebooks stay float32 (default: float16)"
    add("--dtype", choices=FLOAT_DTYPES, default="float16", help=what)
    add("--force", action="store_true", help="replace the folder if it exists")


def run(args: argparse.Namespace) -> Iterator[str]:
    """Convert, and yield a line with the size.

    Raises:
        ValueError, OSError: see `convert`.
    """
    sources = {part: getattr(args, part) for part in PARTS if getattr(args, part) is not None}
    size = convert(sources, args.out, dtype=getattr(torch, args.dtype), force=args.force)
    yield f"{', '.join(sources)} in {args.out}: {size / 1e6:.2f} MB"


def convert(
    sources: dict[str, Path], out: Path, *, dtype: torch.dtype = torch.float16, force: bool = False
) -> int:
    """Write the models of some folders as one folder, atomically.

    Args:
        sources: names from PARTS to folders with `config.json` and weights.
        out: folder to make; its parent exists.
        dtype: of the weights in the files.
        force: replace a folder that is there.

    Returns:
        Bytes of all files written.

    Raises:
        ValueError: no part, tensors that do not fit their configuration or do not fit the dtype,
            or a tokenizer and a generator of different tokens.
        FileExistsError: `out` exists, without `force`; or it is no folder.
        OSError: a source is missing, or `out` cannot be written.
    """
    if not sources:
        raise ValueError(f"convert wants at least one of {', '.join(f'--{p}' for p in PARTS)}")
    if out.exists() and not (force and out.is_dir()):
        raise FileExistsError(f"{out} exists already; pass --force to replace a folder")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {out.parent} for {out.name}: create it first")
    _check(sources)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        new = Path(scratch) / "new"
        for part, source in sources.items():
            _convert(source, new / part, dtype)
        _swap(new, out, Path(scratch) / "old")
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _check(sources: dict[str, Path]) -> None:
    """Load the models as users will: wrong folders are refused now."""
    generator = None
    if "generator" in sources:
        config = generator_config_of(str(sources["generator"]))
        generator = generator_class(config).from_pretrained(sources["generator"])
    if "tokenizer" in sources:
        TiTokPipeline(TiTok.from_pretrained(sources["tokenizer"]), generator)
    if "classifier" in sources:
        FashionClassifier.from_pretrained(sources["classifier"])


def _convert(source: Path, target: Path, dtype: torch.dtype) -> None:
    weights, config = fetch(source)
    assert config is not None  # _check read it
    tensors = {
        name: tensor.float() if name.endswith(_FLOAT32) else tensor.to(dtype).contiguous()
        for name, tensor in read_tensors(weights).items()
    }
    check_tensors(tensors, tensors, f"{source} as {dtype}")
    target.mkdir(parents=True)
    write_tensors(target / "model.safetensors", tensors)
    text = json.dumps(json.loads(config.read_text(encoding="utf-8")), indent=4) + os.linesep
    write_atomic(target / "config.json", text.encode())


def _swap(new: Path, out: Path, old: Path) -> None:
    """Rename a folder into place; the one that was there goes only after that."""
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
