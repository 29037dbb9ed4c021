"""Time short calls, and find out what the device can do at best.

The harness times whole images with the wall clock. A kernel takes microseconds: here the device's
own events time it, caches are flushed before each call, and the order of a round is random.
"""

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lib.harness import matmul_peak, synchronize, timed

from titok_fast.costs import DEVICES

# More than the last cache. On CUDA it is also 0.2 ms of work on an H200, in which the host can
# issue some thirty launches; what needs more is timed with its gaps, as its user meets it.
FLUSH_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
MIN_ROUNDS, MAX_ROUNDS = 5, 100
DATA_SHEETS = {  # torch's name of a card: key of DEVICES
    "NVIDIA A100-SXM4-40GB": "a100-sxm-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-sxm-80gb",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H200": "h200-sxm",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
}
Calls = Mapping[str, Callable[[], object]]
Seconds = dict[str, list[float]]


def time_calls(calls: Calls, device: torch.device, budget_s: float) -> tuple[Seconds, Seconds]:
    """`time_shuffled` with as many rounds as the budget allows, 5 to 100; {}, {} for no calls."""
    if not calls:
        return {}, {}
    began = time.perf_counter()
    time_shuffled(calls, 0, device)
    one_round = time.perf_counter() - began
    repeats = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget_s / one_round)))
    gc.disable()  # a collection inside one turn may clean up after another
    try:
        return time_shuffled(calls, repeats, device)
    finally:
        gc.enable()


def time_shuffled(calls: Calls, repeats: int, device: torch.device) -> tuple[Seconds, Seconds]:
    """Seconds of calls in rounds of random order, with cold caches, after a round of warm-up.

    Order matters on the CPU: a fixed neighbour leaves its data in the cache, or evicts it. The
    second result, on CUDA only, has the seconds that the host spent on issuing each call.
    """
    flush = torch.empty(FLUSH_BYTES[device.type], dtype=torch.int8, device=device)
    order, shuffle = list(calls), random.Random(0).shuffle
    seconds: Seconds = {name: [] for name in order}
    on_host: Seconds = {name: [] for name in order}
    for i in range(1 + repeats):
        shuffle(order)
        for name in order:
            synchronize(device)
            flush.zero_()  # on CUDA the host issues the call meanwhile
            if device.type == "cuda":
                time_s, host_s = _device_time(calls[name])
            else:
                time_s = host_s = timed(calls[name], device)
            if i > 0:
                seconds[name].append(time_s)
                on_host[name].append(host_s)
    return seconds, on_host if device.type == "cuda" else {}


def _device_time(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds between events around a call on the current stream, and seconds on the host."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    began = time.perf_counter()
    result = call()
    host = time.perf_counter() - began
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1e3, host


def peaks(device: torch.device) -> dict[str, Any]:
    """GB/s, and TFLOP/s by dtype: from the data sheet of a known card, else measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if name in DATA_SHEETS:
        card = DEVICES[DATA_SHEETS[name]]
        return {"source": "data sheet", "gbps": card.gbps, "tflops": dict(card.tflops)}
    source = torch.ones(1 << 26, device=device)  # 256 MiB
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(5))
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    rates = {name: matmul_peak(device, dtype) / 1e12 for name, dtype in dtypes.items()}
    return {"source": "measured", "gbps": 2 * source.nbytes / seconds / 1e9, "tflops": rates}
