"""Many class-balanced pictures on one or many devices: the samples that FID is measured on.

    torchrun --nproc_per_node 8 -m titok_fast.cli.sample --model titok-l-32 --out samples
    python -m titok_fast.cli.sample --model titok-l-32 --out work --npz samples.npz --no-png

Picture i shows class i % classes and has a seed of its own, so it does not matter who draws it, and
the classes are interleaved, as the Inception Score in ten splits wants them. Started again in the
same folder, with any number of processes, the command draws what is missing.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from titok_fast.backends.techniques import resolve_fast
from titok_fast.cli.sample_options import build_parser, check, load, settings
from titok_fast.config import __version__
from titok_fast.crew import Crew
from titok_fast.io.npz import archive_exists, write_archive
from titok_fast.io.sample_folder import (
    Album,
    PngFiles,
    RawFiles,
    claim_folder,
    clean,
    differences,
)
from titok_fast.models.attention import BackendError
from titok_fast.pipeline import TiTokPipeline
from titok_fast.sampling.unmask import sample_seeds


def main(argv: Sequence[str] | None = None) -> int:
    """Run one process of the command.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        Exit status: 0 done, 2 an error that is reported on stderr, 130 stopped by a signal.
    """
    args, rank = build_parser().parse_args(argv), os.environ.get("RANK", "0")
    # launchers end the others by SIGTERM when one process dies: that deserves a message too
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Crew.join(args.patience) as crew:
            (lead if crew.rank == 0 else follow)(args, crew)
    except KeyboardInterrupt:
        return _fail(rank, f"stopped before the end. {_AGAIN}", 130)
    except ConnectionError as error:
        return _fail(rank, f"error: {error}. {_AGAIN}", 2)
    except (ValueError, OSError, MemoryError, BackendError, torch.OutOfMemoryError) as error:
        return _fail(rank, f"error: {error}", 2)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


_AGAIN = "Pictures written so far stay: run the same command again to draw the rest"


def _fail(rank: str, message: str, status: int) -> int:
    sys.stderr.write(f"\nsample_many: rank {rank}: {message}\n")
    return status


def lead(args: argparse.Namespace, crew: Crew) -> None:
    """Rank 0: check, plan, draw along, wait for the others, finish.

    Raises:
        ValueError: settings that do not fit each other, the weights, or the folder's earlier run.
        OSError: a folder or file that cannot be had.
        ConnectionError: a rank died.
        MemoryError: the batch does not fit.
    """
    try:
        check(args)
        pipe = load(args, crew.rank)
        manifest = describe(args, pipe)
        claim_folder(args.out, manifest)
        archived = args.npz is not None and archive_exists(args.npz, manifest)
        album = _album(args.out, pipe, manifest)
        done = np.full(args.num, archived and args.no_png) | album.done(args.num)
        batch = args.batch_size or pipe.default_batch_size
        # fixed borders: which pictures share a batch depends on its size, not on ranks or resumes
        chunks = [i for i in range(0, args.num, batch) if not done[i : i + batch].all()]
        if args.fast and chunks:
            pipe.compile(args.fast)  # after `describe`, which reads the weights as loaded
    except BaseException:
        with suppress(ConnectionError):  # the first error says more
            crew.publish(None)
        raise
    plan = {"manifest": manifest, "batch": batch, "chunks": chunks}
    crew.publish(plan)

    before = int(done.sum())
    with _bar(args, "sample_many", before) as bar:

        def show() -> None:
            bar.update(before + crew.finished() - bar.n)

        draw(pipe, crew, album, plan, show)
        crew.wait_for_others(show)
    missing = args.num - int((done | album.done(args.num)).sum())
    if missing:
        raise FileNotFoundError(
            f"{missing} of {args.num} pictures were drawn but are not in {args.out}: all machines "
            "want the same folder"
        )
    clean(args.out)
    if args.npz is not None:
        if not archived:
            with _bar(args, "npz") as bar:
                write_archive(args.npz, album.read(args.num), album.size, manifest, bar.update)
        album.remove()
    places = " and ".join(str(p) for p in (None if args.no_png else args.out, args.npz) if p)
    sys.stdout.write(f"{args.num} pictures in {places}, {before} of them from before\n")


def follow(args: argparse.Namespace, crew: Crew) -> None:
    """Other ranks: draw as rank 0 plans.

    Raises:
        ValueError: settings or weights here are not those of rank 0.
        OSError: a file that cannot be had.
        ConnectionError: rank 0 died.
        MemoryError: the batch does not fit.
    """
    plan = crew.plan()
    if plan["chunks"]:
        pipe = load(args, crew.rank)
        manifest = describe(args, pipe)
        changed = differences(plan["manifest"], manifest)
        if changed:
            raise ValueError(f"rank {crew.rank} differs from rank 0: {'; '.join(changed)}")
        if args.fast:
            pipe.compile(args.fast)
        draw(pipe, crew, _album(args.out, pipe, manifest), plan, lambda: None)
    crew.leave()


def draw(
    pipe: TiTokPipeline,
    crew: Crew,
    album: Album,
    plan: dict[str, Any],
    show: Callable[[], object],
) -> None:
    """Take chunks until none is left; write one while the next is drawn.

    Args:
        pipe: loaded, on this rank's device.
        crew: deals out the chunks.
        album: takes those pictures of a chunk that are missing.
        plan: `manifest`, `batch` (pictures per chunk) and `chunks` (first index of each to draw),
            the same on all ranks.
        show: called after each chunk.
    """
    manifest, chunks, batch = plan["manifest"], plan["chunks"], plan["batch"]
    num, done = manifest["num"], album.done(manifest["num"])
    with ThreadPoolExecutor(1) as writer:
        pending: tuple[Future[None], int] | None = None
        while (turn := crew.claim()) < len(chunks) or pending is not None:
            drawn = None
            if turn < len(chunks):
                indices = np.arange(chunks[turn], min(chunks[turn] + batch, num))
                pixels = pipe(
                    torch.from_numpy(indices % manifest["classes"]),
                    seeds=sample_seeds(manifest["seed"], len(indices), first=int(indices[0])),
                    batch_size=batch,
                    output="numpy",
                    **manifest["sampling"],
                )
                assert isinstance(pixels, np.ndarray)
                new = ~done[indices]
                drawn = indices[new], pixels[new]
            if pending is not None:
                pending[0].result()  # raises what the writer raised
                crew.report(pending[1])
                show()
            pending = (writer.submit(album.write, *drawn), len(drawn[0])) if drawn else None


def describe(args: argparse.Namespace, pipe: TiTokPipeline) -> dict[str, Any]:
    """All that decides what the pictures look like, as plain JSON values.

    Raises:
        ValueError: no generator, or a number of pictures that is not the same for each class.
    """
    if pipe.generator is None:
        raise ValueError(f"{args.model} has no generator: pass --generator")
    classes = pipe.generator.config.condition_num_classes
    if args.num % classes:
        above = -(-args.num // classes) * classes
        raise ValueError(
            f"--count wants a multiple of the {classes} classes, such as {above}; got {args.num}"
        )
    manifest = {
        "titok_fast": __version__,
        "model": args.model,
        "random_weights": args.random_weights,
        "weights_sha256": _digest(pipe),
        "tokenizer": asdict(pipe.tokenizer.config),
        "generator": asdict(pipe.generator.config),
        "sampling": asdict(pipe.sampling.updated(**settings(args))),
        "dtype": str(pipe.tokenizer.latent_tokens.dtype).removeprefix("torch."),
        "fast": resolve_fast(args.fast, pipe.device.type),
        "seed": args.seed,
        "num": args.num,
        "classes": classes,
        "files": "raw" if args.no_png else "png",
    }
    return json.loads(json.dumps(manifest))  # as a file gives it back: lists for tuples


def _digest(pipe: TiTokPipeline) -> str:
    """Of names and bytes as loaded: the same whatever file, folder or format they came from."""
    digest = hashlib.sha256()
    for model in (pipe.tokenizer, pipe.generator):
        assert model is not None  # describe refused that
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _album(folder: Path, pipe: TiTokPipeline, manifest: dict[str, Any]) -> Album:
    kind = PngFiles if manifest["files"] == "png" else RawFiles
    return kind(folder, pipe.tokenizer.config.crop_size)


def _bar(args: argparse.Namespace, name: str, initial: int = 0) -> "tqdm[NoReturn]":
    return tqdm(
        total=args.num, initial=initial, unit="image", desc=name, disable=args.quiet,
        file=sys.stderr,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
