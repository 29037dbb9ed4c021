"""`titok-fast sample`: images of classes, a few or many, on one process or on many.

    titok-fast sample
    titok-fast sample --model titok-l-32 --labels 1,207,980 --num 4 --out samples --grid grid.png
    torchrun --nproc_per_node 8 -m titok_fast sample --model titok-l-32 --count 50000 --out samples

Image i has a label and a seed of its own, so it does not matter which rank draws it. Of the pieces
that are not done, rank r takes r, r + world, ...; what is done is what lies whole in the folder, so
the same command, with any number of ranks, draws what is missing.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from titok_fast.cli.drawing import Drawing
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
from titok_fast.distributed import join
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
from titok_fast.processor.here import adopt, processor
from titok_fast.sampling.network import check_labels
from titok_fast.sampling_config import SamplingConfig

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
    what = "classes such as 1,7,282; may be given several times (default: all in turn)"
    add("--labels", "--label", type=labels, action="extend", metavar="LIST", help=what)
    what = (
        "images of each label (default: 1); without --labels, images in all (default: one of each "
        "class)"
    )
    add("--num", type=positive, metavar="N", help=what)
    add("--count", type=positive, metavar="N", help="images in all, the labels taking turns")
    add("--out", type=Path, metavar="DIR", help="folder for {index}_{label}.png and manifest.json")
    add("--grid", type=Path, metavar="FILE", help="PNG file that shows all images in rows")
    what = "archive for the ADM evaluation; without --out its pieces wait in FILE.parts"
    add("--npz", type=Path, metavar="FILE", help=what)
    add_force(parser)
    what = "how long a process that has finished waits for the others (default: 3600)"
    add("--patience", type=seconds, default=3600.0, metavar="SECONDS", help=what)
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
        if args.fast and ranks.device.type == "cpu":
            adopt(ranks.agree(processor))
        pipe = load_plain(args, sources)
        if ranks.rank == 0:
            say_random_weights(args)
        draw = _into_folder if args.out or args.npz else _into_sheet
        yield from draw(Drawing(args, ranks, pipe, run_labels))


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


def _into_sheet(drawing: Drawing) -> Iterator[str]:
    """All images in memory, then one PNG file."""
    if drawing.ranks.size > 1:
        raise ValueError("--grid on many processes wants --out DIR as well")
    make_fast(drawing.args, drawing.pipe)
    made: list[np.ndarray] = []
    with progress_bar(drawing.args, len(drawing.labels)) as bar:
        for indices in drawing.pieces():
            made.append(drawing.pixels(indices))
            bar.update(len(indices))
    yield drawing.save_sheet(np.concatenate(made))


def _into_folder(drawing: Drawing) -> Iterator[str]:
    """Images as files, then what is made of them: the archive and the sheet."""
    args, ranks = drawing.args, drawing.ranks
    folder = args.out or args.npz.with_name(f"{args.npz.name}.parts")
    kind = PngFolder if args.out else RawFolder
    store = kind(folder, drawing.pipe.tokenizer.config.crop_size, drawing.labels)
    manifest = drawing.manifest()
    # rank 0's word: another rank may have other weights, or look while files come
    first, archived, done = ranks.agree(lambda: _claim(args, store, manifest))
    changed = differences(first, manifest)
    if changed:
        raise ValueError(f"rank {ranks.rank} differs from rank 0: {'; '.join(changed)}")
    todo = [part for part in drawing.pieces() if not done[part].all()]
    try:
        _fill(drawing, store, todo[ranks.rank :: ranks.size], done)
        ranks.wait(lambda: f"another process is gone; {_missing(store)}. {_AGAIN}")
        if not ranks.rank and (missing := _missing(store)):
            raise FileNotFoundError(f"{missing}: all machines want the same folder. {_AGAIN}")
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
        yield drawing.save_sheet(np.stack(list(store.read())))


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


def _fill(
    drawing: Drawing, store: PngFolder | RawFolder, todo: list[np.ndarray], done: np.ndarray
) -> None:
    """Draw this rank's pieces; write one while the next is drawn."""
    if todo:
        make_fast(drawing.args, drawing.pipe)
    total = sum(int((~done[part]).sum()) for part in todo)
    bar = progress_bar(drawing.args, total, show=drawing.ranks.rank == 0)
    with bar, ThreadPoolExecutor(1) as writer:
        pending: list[Future[None]] = []
        for part in todo:
            pixels, new = drawing.pixels(part), ~done[part]
            for future in pending:
                future.result()  # raises what the writer raised
            pending = [writer.submit(store.write, part[new], pixels[new])]
            bar.update(int(new.sum()))
        for future in pending:
            future.result()


def _missing(store: PngFolder | RawFolder) -> str:
    """How many images are not there, in words; empty if none is missing."""
    count = int((~store.done()).sum()) if store.folder.exists() else 0
    return f"{count} of {len(store.labels)} images are missing in {store.folder}" if count else ""
