"""Pictures, sources and references by the place that the command line names."""

from pathlib import Path

from titok_fast.data.sources import FolderSource, Source, fashion_mnist
from titok_fast.data.webdataset import WebDatasetSource
from titok_fast.evaluation.generation import Reference
from titok_fast.evaluation.npz import NpzPictures, has_array, read_statistics
from titok_fast.evaluation.pictures import FolderPictures, Pictures, SourcePictures

PLACES = (
    "an .npz file (arr_0), a folder of pictures, a folder of sub-folders (one a class), "
    "fashion-mnist:train, fashion-mnist:eval, or webdataset:PATTERN"
)


def find_source(place: str) -> tuple[Source, int | None] | None:
    """A source of labelled pictures, and its number of classes if that is known.

    Args:
        place: one of the last four `PLACES`.

    Returns:
        None for other places.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged files.
    """
    kind, _, rest = place.partition(":")
    if kind == "fashion-mnist":
        split, _, folder = rest.partition(":")
        return fashion_mnist(split or "eval", folder or None), 10
    if kind == "webdataset":
        return WebDatasetSource(rest), None
    path = Path(place)
    entries = [p for p in path.iterdir() if not p.name.startswith(".")] if path.is_dir() else []
    if not entries or not all(entry.is_dir() for entry in entries):
        return None
    source = FolderSource(path)
    return source, source.num_classes


def open_pictures(place: str, size: int | None = None) -> Pictures:
    """Pictures in a fixed order.

    Args:
        place: one of `PLACES`.
        size: side in pixels to resize and crop to. None takes a flat folder's pictures as they
            are, and is an error where pictures may be of any size.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no pictures there, or an archive of another size.
    """
    if place.lower().endswith(".npz"):
        archive = NpzPictures(place)
        if size is not None and archive.shape[1:3] != (size, size):
            raise ValueError(f"{place} holds {archive.shape[1:3]} pixels; wanted {size} x {size}")
        return archive
    found = find_source(place)
    if found is None:
        return FolderPictures(place, size)
    if place.startswith("fashion-mnist"):
        size = size or 32
    if size is None:
        raise ValueError(f"{place} holds pictures of any size: say which with --size")
    return SourcePictures(found[0], size)


def read_reference(place: str, size: int | None = None) -> Reference:
    """What samples are compared with.

    Args:
        place: an .npz file with `mu` and `sigma`, pictures as `arr_0`, or both, as ADM's; or
            another of `PLACES`.
        size: as in `open_pictures`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a damaged file, or neither statistics nor pictures in it.
    """
    if not place.lower().endswith(".npz") or not has_array(place, "mu"):
        return Reference(open_pictures(place, size))
    statistics, network = read_statistics(place)
    pictures = NpzPictures(place) if has_array(place, "arr_0") else None
    return Reference(pictures, statistics, network)
