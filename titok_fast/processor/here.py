"""The processor of this process: measured once per machine, then read from the user's cache."""

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch

from titok_fast.processor.description import Processor, cpu_name, instruction_sets
from titok_fast.processor.rates import exact_int8_limit, measured, product_rates

# what keeps oneDNN, PyTorch and MKL from using all that the processor has
LIMITS = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
)
_known: Processor | None = None  # of this process


def processor() -> Processor:
    """This processor; measured once per machine and limit of the environment."""
    global _known
    if _known is None:
        _known = _read(_file()) or measure_processor()
    return _known


def adopt(other: Processor) -> None:
    """Take another rank's rates, so that both choose alike; not those of another kind of processor.

    What is fast there may be wrong here: the limit of 8-bit weights must be this processor's own.
    """
    global _known
    own = processor()
    if replace(own, rates=other.rates) == other:
        _known = other


def measure_processor() -> Processor:
    """Measure one thread now, for about a second, and keep the result for later processes."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # several would wait for one another where the machine is busy
        found = Processor(cpu_name(), instruction_sets(), product_rates(), exact_int8_limit())
    finally:
        torch.set_num_threads(threads)
    _write(_file(), found)
    return found


def cache_folder() -> Path:
    """Folder for what later processes can use again: titok_fast in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        RuntimeError: there is no home.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    # the standard that defines the variable says to ignore a relative path
    cache = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return cache / "titok_fast"


def _file() -> Path | None:
    """Where this processor's rates are kept."""
    key: list[object] = [cpu_name(), instruction_sets(), torch.__version__]
    key += [os.environ.get(name) for name in LIMITS]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    try:
        return cache_folder() / f"processor-{digest}.json"
    except RuntimeError:
        return None


def _read(path: Path | None) -> Processor | None:
    """What `_write` wrote; None where there is none, or nothing that could be it."""
    try:
        found = json.loads(path.read_text()) if path is not None else None
        if not isinstance(found, dict):
            return None
        rates = {str(name): float(rate) for name, rate in found.pop("rates").items()}
        sets = tuple(map(str, found.pop("instruction_sets")))
        read = Processor(rates=rates, instruction_sets=sets, **found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return read if rates.keys() == measured().keys() and read.int8_limit in (64, 127) else None


def _write(path: Path | None, found: Processor) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(found)))  # half of it is no JSON, and measured again
    except OSError:  # a home that cannot be written to: measured again next time
        return
