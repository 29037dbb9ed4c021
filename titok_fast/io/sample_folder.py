"""The folder of a sampling run: whole image files, and a manifest of the settings.

The files themselves say which images are done: no second record could disagree with them. No two
processes write the same file, so any number of them may share a folder, even over a network.
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
_PNG = re.compile(r"(\d{6,})_(\d+)\.png")
_RAW = re.compile(r"(\d{6,})-(\d{6,})\.u8")
# temporary files that write_atomic leaves behind when its process is killed
_PART = re.compile(r"\.(\d{6,}.*\.(png|u8)|manifest\.json\..*\.json)")
_WRITERS = 4  # deflating an image takes longer than drawing one on a fast device


class _Folder:
    """Images of a run in a folder that exists: their side S in pixels and their (n,) labels."""

    def __init__(self, folder: Path, size: int, labels: np.ndarray) -> None:
        self.folder, self.size, self.labels = folder, size, labels


class PngFolder(_Folder):
    """Images as `000000_7.png`: their index and their label."""

    def done(self) -> np.ndarray:
        """(n,) bool: which images are there."""
        done = np.zeros(len(self.labels), bool)
        for match in map(_PNG.fullmatch, (path.name for path in self.folder.iterdir())):
            if match and int(match[1]) < len(done):
                done[int(match[1])] = int(match[2]) == self.labels[int(match[1])]
        return done

    def write(self, indices: np.ndarray, pixels: np.ndarray) -> None:
        """Write images: (B,) ascending indices, (B, S, S, 3) uint8."""
        paths = [self._path(i) for i in indices]
        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(save_png, paths, to_pil(pixels)))  # the list raises what a thread raised

    def read(self) -> Iterator[np.ndarray]:
        """All images in order, each (S, S, 3) uint8.

        Raises:
            ValueError: a file is damaged, or of another size.
            FileNotFoundError: an image is not there.
        """
        for i in range(len(self.labels)):
            pixels = np.asarray(load_image(self._path(i)))
            if pixels.shape != (self.size, self.size, 3):
                raise ValueError(
                    f"{self._path(i)} wants {self.size} x {self.size} pixels; got shape "
                    f"{pixels.shape}: delete it and run again"
                )
            yield pixels

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}_{self.labels[index]}.png"


class RawFolder(_Folder):
    """Runs of images as bytes on their way to an archive: `000008-000016.u8` holds 8..15."""

    def done(self) -> np.ndarray:
        """(n,) bool: which images are there; a file of a wrong length counts as absent."""
        done = np.zeros(len(self.labels), bool)
        for start, stop, _ in self._runs():
            done[start:stop] = True
        return done

    def write(self, indices: np.ndarray, pixels: np.ndarray) -> None:
        """Write images: (B,) ascending indices, (B, S, S, 3) uint8; a file for each run."""
        breaks = np.flatnonzero(np.diff(indices) > 1) + 1
        for run, part in zip(np.split(indices, breaks), np.split(pixels, breaks), strict=True):
            name = f"{run[0]:06d}-{run[-1] + 1:06d}.u8"
            write_atomic(self.folder / name, part.tobytes())

    def read(self) -> Iterator[np.ndarray]:
        """All images in order, each (S, S, 3) uint8.

        Raises:
            FileNotFoundError: an image is not there.
        """
        at, count = 0, len(self.labels)
        for start, stop, path in self._runs():
            if start > at:
                break
            pixels = np.fromfile(path, np.uint8).reshape(-1, self.size, self.size, 3)
            # runs of two batch sizes may hold an image twice: once is enough
            yield from pixels[at - start : count - start]
            at = max(at, stop)
        if at < count:
            raise FileNotFoundError(f"{self.folder} lacks image {at}: run again")

    def _runs(self) -> list[tuple[int, int, Path]]:
        matches = [(_RAW.fullmatch(path.name), path) for path in self.folder.iterdir()]
        runs = [(int(match[1]), int(match[2]), path) for match, path in matches if match]
        size = self.size * self.size * 3
        return sorted(run for run in runs if run[2].stat().st_size == (run[1] - run[0]) * size)


def make_writable(folder: Path) -> None:
    """Make a folder, and check that files can be written there; OSError if not."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def differences(found: dict[str, Any], wanted: dict[str, Any], stem: str = "") -> list[str]:
    """The settings that differ between two manifests, one phrase each; `stem` prefixes names."""
    phrases = []
    for key in sorted(found.keys() | wanted.keys()):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            phrases += differences(a, b, f"{stem}{key}.")
        elif a != b:
            phrases.append(f"{stem}{key} was {a!r}, now {b!r}")
    return phrases


def claim_folder(folder: Path, manifest: dict[str, Any], *, force: bool = False) -> None:
    """Write the manifest into an empty folder, or check that an earlier run wrote the same.

    Args:
        folder: exists.
        manifest: settings that decide the images; plain JSON values.
        force: delete the images of an earlier run with other settings.

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
    else:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("wants a JSON object")
            changed = differences(found, manifest)
        except ValueError as error:
            changed = [f"{path} is damaged: {error}"]
        if not changed:
            return
        if not force:
            raise ValueError(
                f"{folder} was begun with other settings: {'; '.join(changed)}. Repeat those, "
                "choose another folder, or pass --force to replace its images"
            )
        empty_folder(folder)
    write_atomic(path, json.dumps(manifest, indent=2).encode())


def empty_folder(folder: Path) -> None:
    """Delete the images and the manifest of a run, and nothing else."""
    clean(folder)
    for path in folder.iterdir():
        if path.name == MANIFEST or _PNG.fullmatch(path.name) or _RAW.fullmatch(path.name):
            path.unlink()


def clean(folder: Path) -> None:
    """Delete the temporary files of killed writers; nothing may be writing there."""
    for path in folder.iterdir():
        if _PART.fullmatch(path.name):
            path.unlink(missing_ok=True)
