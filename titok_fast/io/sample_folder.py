"""Files of a big run: pictures that are whole or absent, and what made them.

What is done is what lies in the folder: there is no second record that could disagree with it.
No two processes write the same file, so any number of them may share a folder, on network file
systems too.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from titok_fast.io.files import write_atomic
from titok_fast.io.images import load_image, save_png, to_pil

MANIFEST = "manifest.json"
_PNG = re.compile(r"(\d{6,})\.png")
_RAW = re.compile(r"(\d{6,})-(\d{6,})\.u8")
# what write_atomic leaves behind when its process is killed
_PART = re.compile(r"\.(\d{6,}.*\.(png|u8)|manifest\.json\..*\.json)")
_WRITERS = 4  # deflating a picture takes longer than drawing one on a fast device


class PngFiles:
    """Pictures as `000000.png`, `000001.png`, ...

    Args:
        folder: where they lie; exists.
        size: side S of a picture in pixels.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size

    def done(self, num: int) -> np.ndarray:
        """(num,) bool: which pictures are there."""
        done = np.zeros(num, bool)
        matches = (_PNG.fullmatch(path.name) for path in self.folder.iterdir())
        indices = np.array([int(match[1]) for match in matches if match], int)
        done[indices[indices < num]] = True
        return done

    def write(self, indices: np.ndarray, pixels: np.ndarray) -> None:
        """Write pictures: (B,) ascending indices, (B, S, S, 3) uint8."""
        paths = [self._path(i) for i in indices]
        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(save_png, paths, to_pil(pixels)))  # the list raises what a thread raised

    def read(self, num: int) -> Iterator[np.ndarray]:
        """Pictures 0..num-1 in order, each (S, S, 3) uint8.

        Raises:
            ValueError: a file is damaged, or of another size.
            FileNotFoundError: a picture is not there.
        """
        for i in range(num):
            pixels = np.asarray(load_image(self._path(i)))
            if pixels.shape != (self.size, self.size, 3):
                raise ValueError(
                    f"{self._path(i)} wants {self.size} x {self.size} pixels; got shape "
                    f"{pixels.shape}: delete it and run again"
                )
            yield pixels

    def remove(self) -> None:
        """Nothing: these pictures are results."""

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"


class RawFiles:
    """Runs of pictures as bytes on their way to an archive: `000008-000016.u8` holds 8..15.

    Args:
        folder: where they lie; exists.
        size: side S of a picture in pixels.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size

    def done(self, num: int) -> np.ndarray:
        """(num,) bool: which pictures are there; a file of a wrong length counts as absent."""
        done = np.zeros(num, bool)
        for start, stop, _ in self._runs():
            done[start:stop] = True
        return done

    def write(self, indices: np.ndarray, pixels: np.ndarray) -> None:
        """Write pictures: (B,) ascending indices, (B, S, S, 3) uint8; a file for each run."""
        breaks = np.flatnonzero(np.diff(indices) > 1) + 1
        for run, part in zip(np.split(indices, breaks), np.split(pixels, breaks), strict=True):
            name = f"{run[0]:06d}-{run[-1] + 1:06d}.u8"
            write_atomic(self.folder / name, part.tobytes())

    def read(self, num: int) -> Iterator[np.ndarray]:
        """Pictures 0..num-1 in order, each (S, S, 3) uint8.

        Raises:
            FileNotFoundError: a picture is not there.
        """
        at = 0
        for start, stop, path in self._runs():
            if start > at:
                break
            pixels = np.fromfile(path, np.uint8).reshape(-1, self.size, self.size, 3)
            # two runs at once in one folder may have written a picture twice: once is enough
            yield from pixels[at - start : num - start]
            at = max(at, stop)
        if at < num:
            raise FileNotFoundError(f"{self.folder} lacks picture {at}: run again")

    def remove(self) -> None:
        """Delete the runs, once the archive holds them."""
        for path in self.folder.iterdir():
            if _RAW.fullmatch(path.name):
                path.unlink()

    def _runs(self) -> list[tuple[int, int, Path]]:
        matches = [(_RAW.fullmatch(path.name), path) for path in self.folder.iterdir()]
        runs = [(int(match[1]), int(match[2]), path) for match, path in matches if match]
        picture = self.size * self.size * 3
        return sorted(run for run in runs if run[2].stat().st_size == (run[1] - run[0]) * picture)


Album = PngFiles | RawFiles


def make_writable(folder: Path) -> None:
    """Make a folder, and see that files can be written there.

    Raises:
        OSError: it cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def differences(found: dict[str, Any], wanted: dict[str, Any], stem: str = "") -> list[str]:
    """What two manifests disagree on, one phrase for each setting.

    Args:
        found: what an earlier run, or another rank, recorded.
        wanted: what is asked now.
        stem: prefix of the names, for nested settings.
    """
    phrases = []
    for key in sorted(found.keys() | wanted.keys()):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            phrases += differences(a, b, f"{stem}{key}.")
        elif a != b:
            phrases.append(f"{stem}{key} was {a!r}, now {b!r}")
    return phrases


def claim_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Record in an empty folder what will fill it, or see that it was begun with the same.

    Args:
        folder: exists.
        manifest: settings that decide what the pictures look like; plain JSON values.

    Raises:
        FileExistsError: other files lie there.
        ValueError: it was begun with other settings, which the message names, or its record is
            damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if others:
            raise FileExistsError(
                f"{folder} holds {others[0]} but no {MANIFEST} of an earlier run: choose an empty "
                "folder"
            )
        write_atomic(path, json.dumps(manifest, indent=2).encode())
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; choose another folder") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} wants a JSON object; choose another folder")
    changed = differences(found, manifest)
    if changed:
        raise ValueError(
            f"{folder} was begun with other settings: {'; '.join(changed)}. Repeat those, or "
            "choose another folder"
        )


def clean(folder: Path) -> None:
    """Delete what killed writers left; nothing may be writing there."""
    for path in folder.iterdir():
        if _PART.fullmatch(path.name):
            path.unlink(missing_ok=True)
