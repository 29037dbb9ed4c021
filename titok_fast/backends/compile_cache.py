"""Where compiled code is kept between processes, so that only the first one waits for a compiler.

torch.compile keeps its results in a folder of the system's temporary one, which a reboot empties.
passes.py keeps its library in the same place as they.
Triton keeps its own kernels in the user's home already.
"""

import os
import platform
import tempfile
import warnings
from pathlib import Path

import torch

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def keep_compiled(folder: str | Path | None = None) -> Path | None:
    """Let torch.compile keep its results in a folder that outlives processes and reboots.

    Call it before anything is compiled: torch sets the same variable at its first compilation, and
    the process then keeps to that. A variable that the user has set always wins. What lies in the
    folder is run as code, so others must not be able to write there.

    Args:
        folder: by default titok_fast/inductor in $XDG_CACHE_HOME or ~/.cache. Each kind of
            processor gets a folder of its own inside: a home may be shared by several, and torch
            does not tell them apart.

    Returns:
        The folder in force, or None for torch's own.

    Warns:
        UserWarning: the folder cannot be written to, or `folder` comes too late to have an effect.
    """
    given = os.environ.get(VARIABLE)
    try:
        place = (_default() if folder is None else Path(folder)).absolute() / _processor()
        if given is not None:
            if folder is not None and Path(given) != place:
                _warn(
                    f"cache_dir {folder} has no effect: {VARIABLE} is {given}, by the user or an "
                    "earlier compilation of this process"
                )
            return Path(given)
        _make(place)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        _warn(
            f"compiled code goes to torch's temporary folder, which a reboot empties: {error}; "
            f"pass a writable cache_dir, or set {VARIABLE}"
        )
        return None
    os.environ[VARIABLE] = str(place)
    return place


def folder_of_compiled() -> Path | None:
    """Where this process keeps its compiled code, made if need be; None if that cannot be.

    `keep_compiled`'s folder, else the user's, else the default one.
    """
    given = os.environ.get(VARIABLE)
    try:
        return _make(_default() / _processor() if given is None else Path(given))
    except (OSError, RuntimeError):
        return None


def _make(place: Path) -> Path:
    """A folder that can be written to; OSError otherwise."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=place):
        pass
    return place


def _default() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    # a relative one is to be ignored, by the standard that defines the variable
    cache = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return cache / "titok_fast" / "inductor"


def _processor() -> str:
    return f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}".lower()


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)  # whoever called TiTokPipeline.compile
