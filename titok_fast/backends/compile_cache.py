"""A folder for compiled code that outlives the process, so that only the first one compiles.

torch.compile's own folder is in the system's temporary one, which a reboot empties. The C++ ops of
cpu_int8_ops.py use the same folder. Triton keeps its kernels in the user's home already.
"""

import os
import platform
import tempfile
import warnings
from pathlib import Path

from titok_fast.processor.description import instruction_sets
from titok_fast.processor.here import cache_folder

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def use_cache_dir(folder: str | Path | None = None) -> Path | None:
    """Let torch.compile keep its results in a folder that outlives processes and reboots.

    Call it before the first compilation, at which torch fixes its folder. A variable that the user
    has set always wins. Files in the folder run as code, so others must not be able to write there.

    Args:
        folder: by default titok_fast/inductor in $XDG_CACHE_HOME or ~/.cache. Each kind of
            processor gets a subfolder: several may share a home, and torch does not distinguish
            them.

    Returns:
        The folder in use, or None for torch's own.

    Warns:
        UserWarning: the folder cannot be written to, or `folder` comes too late to have an effect.
    """
    current = os.environ.get(VARIABLE)
    try:
        path = (_default() if folder is None else Path(folder)).absolute() / _processor()
        if current is not None:
            if folder is not None and Path(current) != path:
                _warn(
                    f"cache_dir {folder} has no effect: {VARIABLE} is {current}, set by the user "
                    "or by an earlier compilation of this process"
                )
            return Path(current)
        _make(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        _warn(
            f"compiled code goes to torch's temporary folder, which a reboot empties: {error}; "
            f"pass a writable cache_dir, or set {VARIABLE}"
        )
        return None
    os.environ[VARIABLE] = str(path)
    return path


def cache_dir() -> Path | None:
    """The folder of `use_cache_dir`, created if absent; None if it cannot be written to."""
    current = os.environ.get(VARIABLE)
    try:
        return _make(_default() / _processor() if current is None else Path(current))
    except (OSError, RuntimeError):
        return None


def _make(path: Path) -> Path:
    """Create a folder; OSError if it cannot be written to."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass
    return path


def _default() -> Path:
    return cache_folder() / "inductor"


def _processor() -> str:
    return "-".join((platform.machine().lower(), *instruction_sets()))


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)  # the caller of TiTokPipeline.compile
