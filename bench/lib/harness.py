"""Time calls, describe the machine, write JSON and tables: shared by all benchmarks.

Times are wall-clock seconds between device synchronisations: what a caller waits for, host work
included. Device events would leave out the launch of the first kernel and everything after the
last one, such as the copy of finished pictures to the host.
"""

import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from tqdm import tqdm

from titok_fast.io.files import write_atomic
from titok_fast.processor.description import cpu_name, instruction_sets

NOT_MEASURED = "not measured"
NOT_YET = f"{NOT_MEASURED.capitalize()} yet."  # in place of a whole table
PRECISIONS = {"fp32-ieee": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
RATES = "matmul_flop_per_s"  # in a record: of the device, by dtype, measured in the same run


def environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """Describe what a result depends on; no host name, user or path.

    None stands for what could not be found out.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    commit = command_output("git", "rev-parse", "HEAD")
    # result files are the only change a run itself makes
    changes = command_output(
        "git", "status", "--porcelain", "--", ":/", ":(top,exclude)bench/results"
    )
    record: dict[str, Any] = {
        "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": None if commit is None or changes is None else bool(changes),
        "device": cpu_name(),
        "cpu": cpu_name(),
        "instruction_sets": list(instruction_sets()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": np.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        fields = "--query-gpu=driver_version,power.limit"
        csv = command_output(
            "nvidia-smi", f"--id=GPU-{properties.uuid}", fields, "--format=csv,noheader"
        )
        driver, power_limit = (csv or ",").split(",", 1)
        record |= {
            "device": properties.name,
            "device_memory_bytes": properties.total_memory,
            "driver": driver.strip() or None,
            "power_limit": power_limit.strip() or None,
            "cuda": torch.version.cuda,
        }
    return record


def command_output(*command: str) -> str | None:
    """What a command prints, run in this file's folder; None when it cannot be run or fails."""
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def synchronize(device: torch.device | str) -> None:
    """Wait until the device is idle; nothing to do on the CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(fn: Callable[[], object], device: torch.device | str) -> float:
    """Wall-clock seconds of one call, the device idle before and after.

    The result is dropped after the clock has stopped.
    """
    synchronize(device)
    start = time.perf_counter()
    result = fn()
    synchronize(device)
    seconds = time.perf_counter() - start
    del result
    return seconds


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    device: torch.device | str,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, in turns: drifting clocks meet all of them alike.

    Each round calls every candidate once and begins one further along than the round before.

    Raises:
        ValueError: no candidate, repeats below 1 or warmup below 0.
    """
    names = list(candidates)
    if not names or repeats < 1 or warmup < 0:
        got = f"{names}, {repeats}, {warmup}"
        raise ValueError(f"time_interleaved wants candidates, repeats >= 1, warmup >= 0; got {got}")
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()  # a collection inside one candidate's turn may clean up after another
    try:
        for i in tqdm(range(warmup + repeats), desc="rounds", leave=False, disable=None):
            gc.collect()
            first = i % len(names)
            for name in names[first:] + names[:first]:
                seconds = timed(candidates[name], device)
                if i >= warmup:
                    times[name].append(seconds)
    finally:
        if collecting:
            gc.enable()
    return times


def summary(times: Sequence[float]) -> dict[str, float | int]:
    """{median, p20, p80, repeats} of one or more times, in their unit; percentiles are linear."""
    if len(times) == 0:
        raise ValueError("summary wants one or more times; got none")
    p20, median, p80 = np.percentile(times, [20, 50, 80]).tolist()
    return {"median": median, "p20": p20, "p80": p80, "repeats": len(times)}


def spread(s: Mapping[str, float | int], scale: float = 1.0) -> str:
    """Times or rates of `summary` for a table, times `scale`: "median (p20-p80)"."""
    median, p20, p80 = (scale * s[name] for name in ("median", "p20", "p80"))
    return f"{median:.3g} ({p20:.3g}-{p80:.3g})"


def gib(count: int | None) -> str | None:
    """Bytes as GiB for a table; None where they are not known."""
    return None if count is None else f"{count / 2**30:.2f}"


def matmul_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """Best matmul rate of a device in FLOP/s, under the float32 mode in force.

    Inputs are random: matmuls of zeros draw less power and reach clocks that no model sees.
    """
    on_gpu = torch.device(device).type == "cuda"
    sizes, calls = ((2048, 4096, 8192), 10) if on_gpu else ((512, 1024, 2048), 1)
    return max(_matmul_rate(n, calls, device, dtype) for n in sizes)


def _matmul_rate(n: int, calls: int, device: torch.device | str, dtype: torch.dtype) -> float:
    a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))

    def matmuls() -> None:
        for _ in range(calls):  # several to one synchronisation: that hides the launch latency
            torch.mm(a, b, out=out)

    timed(matmuls, device)  # warm-up
    return calls * 2 * n**3 / min(timed(matmuls, device) for _ in range(5))


def peak_memory(fn: Callable[[], object], device: torch.device | str) -> int | None:
    """Most bytes in use while one call runs, with everything that was resident before it.

    On CUDA those of torch's allocator, else the resident set. None where the system cannot tell
    (CPU other than Linux); fn has then not run.
    """
    device = torch.device(device)
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        timed(fn, device)
        return torch.cuda.max_memory_allocated(device)
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else pages freed by an earlier candidate count again
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    # some sandboxes accept the write and ignore it
    if resident("VmHWM") > 1.05 * resident("VmRSS"):
        return None
    timed(fn, device)
    return resident("VmHWM")


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status; 0 where the system has none."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """Set the float32 mode of matmuls and convolutions; yields the dtype for weights and inputs.

    In "bf16" whatever stays float32 is computed as in "fp32-ieee".

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision wants one of {sorted(PRECISIONS)}; got {name!r}")
    # torch refuses to read these back once its newer fp32_precision switches were set as well
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield PRECISIONS[name]
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def write_json(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write or replace a file whole or not at all; NaN and infinity are refused."""
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Format rows as Markdown, by default all their columns; absent or None: "not measured"."""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    texts = [list(columns)] + [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in texts) for i in range(len(columns))]
    texts.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in texts)
    return "\n".join(f"| {line} |" for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")
