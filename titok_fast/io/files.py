"""Write files atomically, read tensor files without executing code, and find weights."""

import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")


def write_atomic(path: str | Path, content: bytes | Callable[[Path], Any]) -> None:
    """Write to a temporary file beside `path`, sync it, and rename it over `path`.

    Args:
        path: final name; its directory must exist.
        content: the bytes, or a function that writes the file it is given.

    Raises:
        OSError: the write failed; a file already at `path` is untouched.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        sync(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would hide the file from others
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        sync(path.parent)  # the rename itself


def sync(path: Path) -> None:
    """Wait until a file, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` or `.bin` / `.pt` / `.pth` file, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated or damaged, holds objects other than tensors (never executed), or is
            not a flat dictionary from names to tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} refused: it is damaged, or holds Python objects beside tensors, which are "
            f"never executed. Save it as safetensors. ({str(error).splitlines()[0]})"
        ) from error
    except (PermissionError, MemoryError):
        raise  # not the file's fault
    except Exception as error:  # damaged files make the unpickler raise a dozen types
        raise ValueError(f"{path} is truncated or not a torch file: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} wants a flat dictionary from names to tensors")
    return state


def fetch(
    source: str | Path, filename: str | None = None, revision: str | None = None
) -> tuple[Path, Path | None]:
    """Find the weight file, and `config.json` or None, of a source.

    The source is a directory, a weight file, or a hub repository "owner/name"; `filename` names the
    weight file inside the directory or repository.

    Raises:
        FileNotFoundError: nothing there; for a repository also: offline and not in the cache.
    """
    path = Path(source)
    if path.is_file():
        return path, None
    names = (filename,) if filename else WEIGHT_NAMES
    if path.is_dir():
        config = path / "config.json"
        for name in names:
            if (path / name).is_file():
                return path / name, config if config.is_file() else None
        raise FileNotFoundError(f"{path} holds none of {', '.join(names)}")
    text = str(source)
    if text.count("/") != 1 or path.is_absolute() or text.startswith("."):
        raise FileNotFoundError(
            f"{source} is neither a directory, nor a file, nor a hub repository 'owner/name'"
        )
    return _fetch_from_hub(text, names, revision)


def _fetch_from_hub(
    repository: str, names: tuple[str, ...], revision: str | None
) -> tuple[Path, Path | None]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def get(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except LocalEntryNotFoundError:
            raise  # a kind of EntryNotFoundError, but it says nothing about the repository
        except EntryNotFoundError:
            return None

    try:
        for name in names:
            weights = get(name)
            if weights is not None:
                return weights, get("config.json")
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{repository} is no directory here, and cannot be had from the hub (offline? "
            f"HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', 'unset')}): {error}"
        ) from error
    raise FileNotFoundError(f"hub repository {repository} holds none of {', '.join(names)}")
