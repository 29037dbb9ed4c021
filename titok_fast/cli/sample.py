"""`titok-fast sample`: images of classes, a few or many, on one process or on many.

    titok-fast sample
    titok-fast sample --model titok-l-32 --labels 1,207,980 --num 4 --out samples --grid grid.png
    torchrun --nproc_per_node 8 -m titok_fast sample --model titok-l-32 --count 50000 --out samples

Image i has a label and a seed of its own, so it does not matter which rank draws it. Of the pieces
that are not done, rank r takes r, r + world, ...; what is done is what lies whole in the folder, so
the same command, with any number of ranks, draws what is missing.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from titok_fast.backends.techniques import resolve_fast
from titok_fast.cli.options import (
    add_force,
    add_model,
    add_sampling,
    check_outputs,
    labels,
    load_plain,
    make_fast,
    positive,
    progress_bar,
    sampling_changes,
    say_random_weights,
    seconds,
    sources_of,
)
from titok_fast.config import SamplingConfig
from titok_fast.distributed import Ranks, join
from titok_fast.io.images import grid, save_png, to_pil
from titok_fast.io.npz import archive_exists, write_archive
from titok_fast.io.sample_folder import (
    PngFolder,
    RawFolder,
    claim_folder,
    clean,
    differences,
    empty_folder,
    make_writable,
)
from titok_fast.loading import Sources
from titok_fast.pipeline import TiTokPipeline
from titok_fast.sampling.network import check_labels
from titok_fast.sampling.unmask import sample_seeds
from titok_fast.settings import __version__

_MOST_COLUMNS = 20  # wider sheets do not fit a screen
_MODEL, _SHEET = "fashion-16", Path("samples.png")  # of the command without options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments on its parser."""
    parser.description = (
        "Draw images of classes: ImageNet's, or with fashion-16, the default, ten kinds of "
        "clothes. Image i depends on the seed, on i, on its label and on the sampling settings, "
        "never on the batch size or the number of processes. Run the same command again to draw "
        "what is missing in --out. Without --out, --grid and --npz the images go to samples.png."
    )
    add = parser.add_argument
    add(
        "--labels",
        "--label",
        dest="labels",
        type=labels,
        action="extend",
        metavar="LIST",
        help="classes such as 1,7,282; may be given several times (default: all in turn)",
    )
    add(
        "--num",
        type=positive,
        metavar="N",
        help="images of each label (default: 1); without --labels, images in all (default: one of "
        "each class)",
    )
    add("--count", type=positive, metavar="N", help="images in all, the labels taking turns")
    add("--out", type=Path, metavar="DIR", help="folder for {index}_{label}.png and manifest.json")
    add("--grid", type=Path, metavar="FILE", help="PNG file that shows all images in rows")
    add(
        "--npz",
        type=Path,
        metavar="FILE",
        help="archive for the ADM evaluation; without --out its pieces wait in FILE.parts",
    )
    add_force(parser)
    add(
        "--patience",
        type=seconds,
        default=3600.0,
        metavar="SECONDS",
        help="how long a process that has finished waits for the others (default: 3600)",
    )
    add_sampling(parser)
    add_model(parser, generator=True)
    parser.set_defaults(on_stop=_AGAIN)


_AGAIN = "images written so far stay; run the same command again to draw the rest"


def run(args: argparse.Namespace) -> Iterator[str]:
    """Draw, and yield where the images are, on rank 0.

    Raises:
        ValueError: options that do not exist or fit each other, the weights or an earlier run.
        OSError: a folder or file that cannot be had, or that exists.
        RankLostError: another process died; the message says what is missing.
        MemoryError: the batch does not fit.
    """
    if args.model is None and args.tokenizer is None and args.generator is None:
        args.model = _MODEL
    if args.out is None and args.grid is None and args.npz is None:
        args.grid = _SHEET
    changes = sampling_changes(args)
    SamplingConfig().updated(**changes)
    sources = sources_of(args, draws=True)
    run_labels = _labels(args, sources)
    _check_places(args)
    with join(args.device, args.patience) as ranks:
        pipe = load_plain(args, sources)
        if ranks.rank == 0:
            say_random_weights(args)
        draw = _into_folder if args.out or args.npz else _into_sheet
        yield from draw(args, ranks, pipe, run_labels)


def _labels(args: argparse.Namespace, sources: Sources) -> np.ndarray:
    """(n,) label of each image: --num of each label, or labels that take turns."""
    assert sources.generator_config is not None  # sources_of was asked to find it
    classes = sources.generator_config.condition_num_classes
    if args.num and args.count:
        raise ValueError("--num is per label and --count in all: pass one of them")
    cycle = np.arange(classes) if args.labels is None else np.array(args.labels)
    check_labels(torch.from_numpy(cycle), classes, sources.classes)
    if args.labels is not None and args.count is None:
        return np.repeat(cycle, args.num or 1)
    count = args.count or args.num or classes
    if args.npz is not None and args.labels is None and count % classes:
        above = -(-count // classes) * classes
        raise ValueError(
            f"--npz wants a multiple of the {classes} classes, such as {above}; got {count}"
        )
    return np.resize(cycle, count)


def _check_places(args: argparse.Namespace) -> None:
    for option, path, suffix in (("--grid", args.grid, ".png"), ("--npz", args.npz, ".npz")):
        if path is not None and path.suffix.lower() != suffix:
            raise ValueError(f"{option} wants a name ending in {suffix}; got {path}")
    if args.grid is not None and args.out is None and args.npz is not None:
        raise ValueError("--grid beside --npz wants --out DIR as well")
    if args.grid is not None:
        check_outputs([args.grid], force=args.force)
        args.grid.parent.mkdir(parents=True, exist_ok=True)
    for folder in (args.out, args.npz and args.npz.parent):
        if folder is not None:
            make_writable(folder)


def _into_sheet(
    args: argparse.Namespace, ranks: Ranks, pipe: TiTokPipeline, run_labels: np.ndarray
) -> Iterator[str]:
    """All images in memory, then one PNG file."""
    if ranks.size > 1:
        raise ValueError("--grid on many processes wants --out DIR as well")
    make_fast(args, pipe)
    made: list[np.ndarray] = []
    with progress_bar(args, len(run_labels)) as bar:
        for indices in _pieces(args, pipe, len(run_labels)):
            made.append(_draw(args, pipe, run_labels, indices))
            bar.update(len(indices))
    _save_sheet(args, np.concatenate(made), run_labels)
    yield f"{len(run_labels)} images in {args.grid}"


def _into_folder(
    args: argparse.Namespace, ranks: Ranks, pipe: TiTokPipeline, run_labels: np.ndarray
) -> Iterator[str]:
    """Images as files, then what is made of them: the archive and the sheet."""
    folder = args.out or args.npz.with_name(f"{args.npz.name}.parts")
    kind = PngFolder if args.out else RawFolder
    store = kind(folder, pipe.tokenizer.config.crop_size, run_labels)
    manifest = _describe(args, pipe, run_labels)
    # rank 0's word: another rank may have other weights, or look while files come
    first, archived, done = ranks.agree(lambda: _claim(args, store, manifest))
    changed = differences(first, manifest)
    if changed:
        raise ValueError(f"rank {ranks.rank} differs from rank 0: {'; '.join(changed)}")
    todo = [part for part in _pieces(args, pipe, len(done)) if not done[part].all()]
    try:
        _fill(args, ranks, pipe, store, todo[ranks.rank :: ranks.size], done)
        _wait_for_others(ranks, store)
    except KeyboardInterrupt:
        args.on_stop = f"{_missing(store) or 'all images are there'}; {_AGAIN}"
        raise
    if ranks.rank:
        return
    if folder.exists():
        clean(folder)
    if args.npz is not None and not archived:
        with progress_bar(args, len(done), name="npz") as bar:
            write_archive(args.npz, store.read(), store.size, manifest, bar.update)
    if args.out is None and folder.exists():
        empty_folder(folder)
        folder.rmdir()
    places = " and ".join(str(path) for path in (args.out, args.npz) if path)
    earlier = f", {int(done.sum())} of them from before" if done.any() else ""
    yield f"{len(done)} images in {places}{earlier}"
    if args.grid is not None:
        _save_sheet(args, np.stack(list(store.read())), run_labels)
        yield f"{len(done)} images in {args.grid}"


def _claim(
    args: argparse.Namespace, store: PngFolder | RawFolder, manifest: dict[str, Any]
) -> tuple[dict[str, Any], bool, np.ndarray]:
    """Rank 0: the manifest, whether the archive is there already, and (n,) which images are."""
    archived = False
    if args.npz is not None:
        if args.force:
            args.npz.unlink(missing_ok=True)
        archived = archive_exists(args.npz, manifest)
    if archived and args.out is None:
        return manifest, archived, np.ones(len(store.labels), bool)
    make_writable(store.folder)
    claim_folder(store.folder, manifest, force=args.force)
    return manifest, archived, store.done()


def _pieces(args: argparse.Namespace, pipe: TiTokPipeline, count: int) -> Iterator[np.ndarray]:
    """Indices of batches with fixed borders, whoever draws them and whatever is there."""
    size = args.batch_size or pipe.default_batch_size
    for first in range(0, count, size):
        yield np.arange(first, min(first + size, count))


def _draw(
    args: argparse.Namespace, pipe: TiTokPipeline, run_labels: np.ndarray, indices: np.ndarray
) -> np.ndarray:
    """(B,) consecutive indices -> (B, S, S, 3) uint8."""
    pixels = pipe(
        torch.from_numpy(run_labels[indices]),
        seeds=sample_seeds(args.seed, len(indices), first=int(indices[0])),
        batch_size=args.batch_size or pipe.default_batch_size,
        output="numpy",
        **sampling_changes(args),
    )
    assert isinstance(pixels, np.ndarray)
    return pixels


def _fill(
    args: argparse.Namespace,
    ranks: Ranks,
    pipe: TiTokPipeline,
    store: PngFolder | RawFolder,
    todo: list[np.ndarray],
    done: np.ndarray,
) -> None:
    """Draw this rank's pieces; write one while the next is drawn."""
    if todo:
        make_fast(args, pipe)
    total = sum(int((~done[part]).sum()) for part in todo)
    bar = progress_bar(args, total, show=ranks.rank == 0)
    with bar, ThreadPoolExecutor(1) as writer:
        pending: list[Future[None]] = []
        for part in todo:
            pixels, new = _draw(args, pipe, store.labels, part), ~done[part]
            for future in pending:
                future.result()  # raises what the writer raised
            pending = [writer.submit(store.write, part[new], pixels[new])]
            bar.update(int(new.sum()))
        for future in pending:
            future.result()


def _wait_for_others(ranks: Ranks, store: PngFolder | RawFolder) -> None:
    ranks.wait(lambda: f"another process is gone; {_missing(store)}. {_AGAIN}")
    if not ranks.rank and (missing := _missing(store)):
        raise FileNotFoundError(f"{missing}: all machines want the same folder. {_AGAIN}")


def _missing(store: PngFolder | RawFolder) -> str:
    """How many images are not there, in words; empty if none is missing."""
    count = int((~store.done()).sum()) if store.folder.exists() else 0
    return f"{count} of {len(store.labels)} images are missing in {store.folder}" if count else ""


def _save_sheet(args: argparse.Namespace, pixels: np.ndarray, run_labels: np.ndarray) -> None:
    save_png(args.grid, grid(to_pil(pixels), _columns(args, run_labels)))


def _columns(args: argparse.Namespace, run_labels: np.ndarray) -> int | None:
    """Where few classes take turns, a column of the sheet for each."""
    count = len(set(run_labels.tolist()))
    return count if args.labels is None and count <= _MOST_COLUMNS else None


def _describe(
    args: argparse.Namespace, pipe: TiTokPipeline, run_labels: np.ndarray
) -> dict[str, Any]:
    """All that decides what the images look like, as plain JSON values."""
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
        "fast": resolve_fast(args.fast, pipe.device.type),
        "seed": args.seed,
        "num": len(run_labels),
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
