r"""`titok-fast pretokenize`: a data set to shards of token ids.

torchrun --nproc_per_node 8 -m titok_fast pretokenize --model titok-l-32 \
        --data webdataset --path "train-{0000..0252}.tar" --out tokens
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from titok_fast.cli.options import add_quiet, add_weights, seconds
from titok_fast.config import FLOAT_DTYPES
from titok_fast.data.config import DataConfig
from titok_fast.data.crops import VIEWS
from titok_fast.data.loader import open_source
from titok_fast.data.token_shards import shards_to_jsonl
from titok_fast.data.tokenize_shards import pretokenize
from titok_fast.distributed import join
from titok_fast.io.sample_folder import make_writable
from titok_fast.loading import load, resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments on its parser."""
    parser.description = (
        "Turn a data set into shards of token ids, every view of every image, on every process "
        "that torchrun starts. Run the same command again to make the missing shards."
    )
    add = parser.add_argument
    kinds = ("fashion-mnist", "webdataset", "folder")
    what = (
        "what --path is: a folder with Fashion-MNIST's four files (default: where Debian's package "
        "puts them), a pattern of tar files, or a folder with one sub-folder per class"
    )
    add("--data", choices=kinds, required=True, help=what)
    add("--path", default="", help="folder, or a pattern such as t-{000..252}.tar")
    add("--split", choices=("train", "eval"), default="train", help="of Fashion-MNIST")
    add("--out", type=Path, required=True, metavar="DIR", help="for the shards")
    add("--jsonl", type=Path, metavar="FILE", help="also write the official format")
    add_weights(parser)
    what = (
        "the center alone, it and its mirror image, or five crops and theirs (default: center_flip)"
    )
    add("--augmentation", choices=tuple(VIEWS), default="center_flip", help=what)
    add("--batch-size", type=int, default=128, help="views at once (default: 128)")
    add("--shard-size", type=int, default=4000, help="images per shard (default: 4000)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--dtype", choices=FLOAT_DTYPES, default="float32", help="of the weights")
    add("--workers", type=int, default=4, help="reading threads (default: 4)")
    what = "share of damaged images above which the run stops (default: 0.01)"
    add("--max-bad-share", type=float, default=0.01, help=what)
    what = "how long a finished process waits for the others (default: 3600)"
    add("--patience", type=seconds, default=3600.0, metavar="SECONDS", help=what)
    add_quiet(parser)
    parser.set_defaults(on_stop="run the same command again to make the missing shards")


def run(args: argparse.Namespace) -> Iterator[str]:
    """Make the shards; yields lines for stdout on rank 0.

    Raises:
        ValueError: no model named, data that cannot be used, or as `pretokenize`.
        OSError: a file is missing or a folder cannot be written; RankLostError among them.
        MemoryError: a batch does not fit.
    """
    if args.jsonl is not None:
        make_writable(args.jsonl.parent)
    sources = resolve(args.model, args.tokenizer, draws=False)
    with join(args.device, args.patience) as ranks:
        source = open_source(DataConfig(kind=args.data, **{args.split: args.path}), args.split)
        tokenizer = load(sources).tokenizer
        names = ("augmentation", "batch_size", "shard_size", "workers", "max_bad_share", "quiet")
        options = {name: getattr(args, name) for name in names}
        dtype = getattr(torch, args.dtype)
        rows = pretokenize(tokenizer, source, args.out, dtype=dtype, ranks=ranks, **options)
    if ranks.rank == 0:
        yield f"{rows} x {tokenizer.config.num_latent_tokens} ids in {args.out}"
        if args.jsonl is not None:
            yield f"{shards_to_jsonl(args.out, args.jsonl)} lines in {args.jsonl}"
