"""Checkpoints that are whole or absent, and that resume a run bit for bit.

A checkpoint is a folder `checkpoint-{step}`: tensors as safetensors, written by
torch.distributed.checkpoint, each rank its share; `state.json` with everything else; and
`manifest.json` with the SHA-256 of every file. It is written under a hidden name, synced, and
renamed when complete; then `latest` names it. Reading checks the hashes, and uses an older
checkpoint where one is damaged. Nothing is ever unpickled.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from titok_fast.distributed import Ranks
from titok_fast.io.files import sync, write_atomic

LATEST = "latest"
_MANIFEST, _STATE = "manifest.json", "state.json"
_HIDDEN = ".checkpoint-"  # being written, or being deleted


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files were checked.

    Attributes:
        folder: where it is.
        step: updates done.
        state: what was saved beside the tensors.
    """

    folder: Path
    step: int
    state: dict[str, Any]

    def load(self, tensors: dict[str, Tensor], ranks: Ranks) -> None:
        """Fill tensors, whole or sharded, from those of the same names. Every rank must call it.

        Raises:
            ValueError: a name is missing, or a shape differs.
        """
        reader = dcp.HuggingFaceStorageReader(str(self.folder))
        try:
            with _quiet():
                dcp.load(tensors, storage_reader=reader, no_dist=ranks.size == 1)
        except CheckpointException as error:
            cause = _first_cause(error)
            raise ValueError(f"{self.folder} does not fit this run: {cause}") from error


def write(
    output: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    ranks: Ranks,
    keep: int = 0,
) -> Path:
    """Write a checkpoint. Every rank must call it.

    Args:
        output: folder of the run, which all ranks share.
        step: updates done.
        tensors: by name; sharded ones are written by the ranks that hold them.
        state: plain JSON; rank 0's is written.
        ranks: the processes of the run.
        keep: number of newest checkpoints to keep; 0 keeps all.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: on every rank, if writing failed on one. Older checkpoints are untouched.
    """
    final, part = output / f"checkpoint-{step}", output / f"{_HIDDEN}{step}.part"
    if not ranks.agree(lambda: _make_way(final, part)):
        return final  # a resumed run reaches the same state again
    try:
        _save_tensors(part, dict(tensors), ranks)
        ranks.agree(lambda: _seal(part, final, step, dict(state)))
    except OSError as error:
        if ranks.rank == 0:  # the last log lines may need the room on a full disk
            shutil.rmtree(part, ignore_errors=True)
        reason = error.strerror or error
        raise OSError(error.errno, f"checkpoint {final} was not written: {reason}") from error
    ranks.agree(lambda: _prune(output, keep))
    return final


def _save_tensors(part: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(part), save_distributed=True)
    try:
        with _quiet():
            dcp.save(tensors, storage_writer=writer, no_dist=ranks.size == 1)
    except CheckpointException as error:  # a BaseException, and the same on every rank
        cause = _first_cause(error)
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror) from error
        raise RuntimeError(f"{part}: {type(cause).__name__}: {cause}") from error


def _make_way(final: Path, part: Path) -> bool:
    """Delete leftovers of both names; False if a valid checkpoint is there already."""
    clean(final.parent)
    if final.exists():
        if not _damage(final):
            return False
        _delete(final)
    part.mkdir()
    return True


def _seal(part: Path, final: Path, step: int, state: dict[str, Any]) -> None:
    (part / _STATE).write_text(json.dumps(state, indent=1) + "\n")
    files = {path.name: _fingerprint(path) for path in sorted(part.iterdir())}
    manifest = {"step": step, "files": files}
    (part / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for name in [*files, _MANIFEST]:
        sync(part / name)
    sync(part)
    part.rename(final)
    sync(final.parent)
    write_atomic(final.parent / LATEST, final.name.encode())


def _prune(output: Path, keep: int) -> None:
    for _, folder in found(output)[keep:] if keep else []:
        _delete(folder)


def _delete(folder: Path) -> None:
    """Rename, then delete: a half deleted folder must not look like a checkpoint."""
    hidden = folder.with_name(f"{_HIDDEN}{folder.name.removeprefix('checkpoint-')}.old")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def clean(output: Path) -> None:
    """Delete what a killed run left half written or half deleted."""
    for folder in output.glob(f"{_HIDDEN}*"):
        shutil.rmtree(folder)
    for file in output.glob(f".{LATEST}.*"):
        file.unlink()


def found(output: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints in a run's folder, newest first; not checked."""
    folders = [path for path in output.glob("checkpoint-*") if path.is_dir()]
    steps = [(path.name.removeprefix("checkpoint-"), path) for path in folders]
    return sorted(((int(step), path) for step, path in steps if step.isdigit()), reverse=True)


def newest(output: Path) -> Checkpoint | None:
    """The checkpoint that `latest` names, or else the newest one that is whole.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        ValueError: all checkpoints are damaged. Warns of each damaged one.
    """
    folders = [path for _, path in found(output)]
    try:
        named = output / (output / LATEST).read_text().strip()
        folders.sort(key=lambda path: path != named)  # stable: the others stay newest first
    except FileNotFoundError:
        pass  # killed before `latest` was first written
    for folder in folders:
        damage = _damage(folder)
        if not damage:
            step = json.loads((folder / _MANIFEST).read_text())["step"]
            return Checkpoint(folder, step, json.loads((folder / _STATE).read_text()))
        warnings.warn(f"checkpoint {folder} is damaged: {damage}; not used", stacklevel=2)
    if folders:
        raise ValueError(
            f"all {len(folders)} checkpoints in {output} are damaged: move them away to start anew"
        )
    return None


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files; empty if nothing is wrong."""
    try:
        files = json.loads((folder / _MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable {_MANIFEST} ({type(error).__name__})"
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {wanted['bytes']}"
        if _fingerprint(path) != wanted:
            return f"the content of {name} has changed (SHA-256)"
    return ""


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def _first_cause(error: CheckpointException) -> BaseException:
    return next((cause for cause, _ in error.failures.values()), error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that the run has one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield


def check_writable(output: Path, bytes_needed: int) -> None:
    """Make the run's folder and check that a checkpoint of `bytes_needed` can be written there.

    Raises:
        OSError: the folder cannot be made or written, or the disk is too full.
    """
    probe = output / f"{_HIDDEN}probe"
    try:
        output.mkdir(parents=True, exist_ok=True)
        clean(output)
        probe.mkdir()
        (probe / "file").write_bytes(b"probe")
        sync(probe / "file")
        shutil.rmtree(probe)
        free = shutil.disk_usage(output).free
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write checkpoints to {output} ({error.strerror}): choose another "
            "experiment.output_dir, or make this one writable",
        ) from error
    if free < bytes_needed:
        raise OSError(
            f"{output} has room for {free / 2**20:.0f} MiB, a checkpoint takes "
            f"{bytes_needed / 2**20:.0f} MiB: free some, or choose another experiment.output_dir"
        )
