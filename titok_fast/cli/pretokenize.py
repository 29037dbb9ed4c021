r"""Pictures to shards of tokens, once, by any number of processes.

    torchrun --nproc_per_node 8 -m titok_fast.cli.pretokenize --model titok-l-32 \
        --data webdataset --path "train-{0000..0252}.tar" --out tokens

A shard holds the views of a fixed run of records, encoded in fixed batches, so its bytes do not
depend on who makes it. Started again in the same folder, the command makes what is missing.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from titok_fast.crew import Crew
from titok_fast.data.config import DataConfig
from titok_fast.data.crops import VIEWS
from titok_fast.data.loader import open_source
from titok_fast.data.reader import BadRecords
from titok_fast.data.sources import Source
from titok_fast.data.token_shards import TokenSource, shards_to_jsonl
from titok_fast.data.tokenize_shards import ShardMaker, tokenizer_fingerprint
from titok_fast.io.sample_folder import claim_folder, differences, make_writable
from titok_fast.loading import load_tokenizer
from titok_fast.models.tokenizer import TiTok
from titok_fast.presets import PRESETS
from titok_fast.settings import __version__

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pretokenize(
    tokenizer: TiTok,
    source: Source,
    out_dir: str | Path,
    *,
    augmentation: str = "center_flip",
    batch_size: int = 128,
    shard_size: int = 4000,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    workers: int = 4,
    max_bad_share: float = 0.01,
    crew: Crew | None = None,
    quiet: bool = True,
) -> int:
    """Encode every view of every picture; call it on all ranks with the same arguments.

    Args:
        tokenizer: of kind "vq"; is moved to `device` and `dtype`.
        source: of pictures.
        out_dir: folder for the shards: empty, or of an earlier run with the same arguments.
        augmentation: "center" (1 view), "center_flip" (2) or "ten_crop" (10), see `augment.views`.
        batch_size: views encoded at once; part of what decides the bytes.
        shard_size: pictures of a shard, likewise.
        device: of this rank.
        dtype: of the weights while encoding.
        workers: threads that read pictures.
        max_bad_share: share of damaged records, which are left out, above which the run stops.
        crew: the ranks that share the work; None is this process alone.
        quiet: show no progress bar.

    Returns:
        Rows in the folder: pictures times views, less the damaged.

    Raises:
        ValueError: an argument that does not exist, settings other than those of the earlier run or
            of rank 0, or too many damaged records.
        FileExistsError: the folder holds other files.
        OSError: it cannot be had or written to.
        ConnectionError: a rank died.
    """
    crew = crew or Crew(dist.HashStore())
    with _failure_told(crew):
        sizes = {"batch_size": batch_size, "shard_size": shard_size, "workers": workers}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"pretokenize wants {name} of 1 or more; got {size}")
        if augmentation not in VIEWS:
            raise ValueError(f"augmentation wants one of {', '.join(VIEWS)}; got {augmentation!r}")
        if tokenizer.config.quantize_mode != "vq":
            raise ValueError("a VAE tokenizer has no token ids: pretokenize wants one of kind vq")
        if isinstance(source, TokenSource):
            raise ValueError("pretokenize wants pictures; these data are tokens already")
        manifest = {
            "kind": "tokens",
            "titok_fast": __version__,
            "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
            "codebook_size": tokenizer.config.codebook_size,
            "augmentation": augmentation,
            "views": list(VIEWS[augmentation]),
            "source": source.describe(),
            "shard_size": shard_size,
            "shards": -(-len(source) // shard_size),
            "batch_size": batch_size,
            "dtype": str(dtype).removeprefix("torch."),
        }
        maker = ShardMaker(tokenizer.to(device, dtype).eval(), source, Path(out_dir), manifest)
    bad = BadRecords(max_bad_share, len(source))
    with ThreadPoolExecutor(workers) as pool:
        return (_lead if crew.rank == 0 else _follow)(maker, crew, pool, bad, quiet)


@contextmanager
def _failure_told(crew: Crew) -> Iterator[None]:
    """Rank 0 lets the others know at once that no plan will come."""
    try:
        yield
    except BaseException:
        if crew.rank == 0:
            with suppress(ConnectionError):  # the first error says more
                crew.publish(None)
        raise


def _lead(
    maker: ShardMaker, crew: Crew, pool: ThreadPoolExecutor, bad: BadRecords, quiet: bool
) -> int:
    """Rank 0: plan, work along, wait for the others, look at the whole."""
    with _failure_told(crew):
        make_writable(maker.folder)
        claim_folder(maker.folder, maker.manifest)
        todo = [n for n in range(maker.manifest["shards"]) if not maker.is_done(n)]
    crew.publish({"manifest": maker.manifest, "shards": todo})
    total = len(maker.source)
    before = total - sum(len(maker.records(number)) for number in todo)
    with tqdm(
        total=total, initial=before, unit="image", desc="pretokenize", disable=quiet,
        file=sys.stderr,
    ) as bar:  # fmt: skip

        def show() -> None:
            bar.update(before + crew.finished() - bar.n)

        _work(maker, crew, pool, bad, todo, show)
        crew.wait_for_others(show)
    return maker.count_rows(bad.max_share)


def _follow(
    maker: ShardMaker, crew: Crew, pool: ThreadPoolExecutor, bad: BadRecords, quiet: bool
) -> int:
    """Other ranks: work as rank 0 plans."""
    plan = crew.plan()
    changed = differences(plan["manifest"], maker.manifest)
    if changed:
        raise ValueError(f"rank {crew.rank} differs from rank 0: {'; '.join(changed)}")
    _work(maker, crew, pool, bad, plan["shards"], lambda: None)
    crew.leave()
    return 0


def _work(
    maker: ShardMaker,
    crew: Crew,
    pool: ThreadPoolExecutor,
    bad: BadRecords,
    todo: Sequence[int],
    show: Callable[[], object],
) -> None:
    while (turn := crew.claim()) < len(todo):
        maker.make(todo[turn], pool, bad)
        crew.report(len(maker.records(todo[turn])))
        show()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Turn a data set into shards of token ids, every view of every picture, on every process "
        "that torchrun starts. Run the same command again to make what is missing."
    )
    parser.add_argument(
        "--data", choices=("fashion-mnist", "webdataset", "folder"), required=True,
        help="what --path is: a folder with Fashion-MNIST's four files (default: where Debian's "
        "package puts them), a pattern of tar shards, or a folder with a sub-folder for each class",
    )  # fmt: skip
    parser.add_argument("--path", default="", help="folder, or a pattern such as t-{000..252}.tar")
    parser.add_argument(
        "--split", choices=("train", "eval"), default="train", help="of Fashion-MNIST"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the shards")
    parser.add_argument("--jsonl", type=Path, metavar="FILE", help="also write the official format")
    parser.add_argument("--model", choices=tuple(PRESETS), metavar="NAME", help="published model")
    parser.add_argument(
        "--tokenizer", metavar="WEIGHTS",
        help="directory, weight file or hub repository, in place of the published weights",
    )  # fmt: skip
    parser.add_argument(
        "--augmentation", choices=tuple(VIEWS), default="center_flip",
        help="the center alone, it and its mirror image, or five crops and theirs "
        "(default: center_flip)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=128, help="views at once (default: 128)")
    parser.add_argument(
        "--shard-size", type=int, default=4000, help="pictures of a shard (default: 4000)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32", help="of the weights")
    parser.add_argument("--workers", type=int, default=4, help="reading threads (default: 4)")
    parser.add_argument(
        "--max-bad-share", type=float, default=0.01,
        help="share of damaged pictures above which the run stops (default: 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=float, default=60.0, metavar="SECONDS",
        help="a process that is silent for so long is taken for dead (default: 60)",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


def run(args: argparse.Namespace) -> Iterator[str]:
    """Do what the options say; yields lines for stdout on rank 0.

    Raises:
        ValueError, OSError, MemoryError: see `pretokenize`.
    """
    if args.model is None and args.tokenizer is None:
        raise ValueError("name a published model with --model, or weights with --tokenizer")
    if args.jsonl is not None:
        make_writable(args.jsonl.parent)
    with Crew.join(args.patience) as crew:
        with _failure_told(crew):
            data = DataConfig(kind=args.data, **{args.split: args.path})
            source = open_source(data, args.split)
            device = _device(args.device, crew.rank)
            tokenizer = load_tokenizer(args.model, args.tokenizer, {})
        rows = pretokenize(
            tokenizer, source, args.out, augmentation=args.augmentation,
            batch_size=args.batch_size, shard_size=args.shard_size, device=device,
            dtype=_DTYPES[args.dtype], workers=args.workers, max_bad_share=args.max_bad_share,
            crew=crew, quiet=args.quiet,
        )  # fmt: skip
        if crew.rank == 0:
            yield f"{rows} x {tokenizer.config.num_latent_tokens} ids in {args.out}"
            if args.jsonl is not None:
                yield f"{shards_to_jsonl(args.out, args.jsonl)} lines in {args.jsonl}"


def _device(name: str | None, rank: int) -> torch.device:
    """This process's own device."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    local = int(os.environ.get("LOCAL_RANK", rank % max(count, 1)))
    if local >= count:
        raise ValueError(
            f"process {local + 1} on this machine has no CUDA device of its own: torch sees "
            f"{count}; start one process per device, or pass --device cpu"
        )
    return torch.device("cuda", local)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one process of the command; exit status 0, 2 after an error, 130 when stopped."""
    parser = argparse.ArgumentParser(prog="pretokenize")
    add_arguments(parser)
    args, rank = parser.parse_args(argv), os.environ.get("RANK", "0")
    # launchers end the others by SIGTERM when one process dies: that deserves a message too
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for line in run(args):
            sys.stdout.write(f"{line}\n")
    except KeyboardInterrupt:
        sys.stderr.write(f"\npretokenize: rank {rank}: stopped; run it again to make the rest\n")
        return 130
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        sys.stderr.write(f"\npretokenize: rank {rank}: error: {error}\n")
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
