"""Measure implementations of the same work side by side: one row each.

A candidate is one implementation in one precision. It is called once for the first-call time, once
for its memory and once to compare its output with the reference; then the timed rounds alternate.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, TypeVar

import torch
from lib.harness import peak_memory, precision, say, summary, time_interleaved, timed
from torch import Tensor, nn

from titok_fast import TiTokPipeline

ROUND_BUDGET_S = 60  # timed rounds of one group, where --repeats does not say otherwise
MIN_ROUNDS, MAX_ROUNDS = 3, 20
T = TypeVar("T")


class StageClock:
    """Times the stages of calls: with device events on CUDA, the host's clock elsewhere.

    A `with` block is one call; `mark(stage)` ends a stage, the block itself ends `rest`.
    """

    def __init__(self, device: torch.device, rest: str) -> None:
        self._on_cuda, self._rest = device.type == "cuda", rest
        self._calls: list[list[tuple[str, Any]]] = []
        self._open = False

    def __enter__(self) -> "StageClock":
        self._calls.append([("", self._now())])
        self._open = True
        return self

    def __exit__(self, *error: object) -> None:
        self.mark(self._rest)
        self._open = False

    def mark(self, stage: str) -> None:
        """End a stage here; the next one begins."""
        if self._open:
            self._calls[-1].append((stage, self._now()))

    def medians(self, last: int) -> dict[str, float]:
        """Median seconds of each stage over the last calls, all finished on the device."""
        times: dict[str, list[float]] = {}
        for stamps in self._calls[-last:]:
            for (_, begin), (stage, end) in pairwise(stamps):
                times.setdefault(stage, []).append(self._seconds(begin, end))
        return {stage: median(values) for stage, values in times.items()}

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self._on_cuda else end - begin


class Stage(nn.Module):
    """A part of a model that ends a stage, and `before` the one before it; compiled if it was."""

    def __init__(self, inner: nn.Module, clock: StageClock, stage: str, before: str = "") -> None:
        super().__init__()
        self.inner, self._clock, self._stage, self._before = inner, clock, stage, before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the part."""
        if self._before:
            self._clock.mark(self._before)
        result = self.inner(*args, **kwargs)
        self._clock.mark(self._stage)
        return result


def watch(tokenizer: Any, device: torch.device) -> StageClock:
    """Put a clock into the decoders of a tokenizer (ours or upstream's), in place.

    Stages: "generator", with the code look-up; "vit_decoder"; "pixel_decoder", with the pixel
    codebook; "transfer", to uint8 on the host.
    """
    clock = StageClock(device, rest="transfer")
    tokenizer.decoder = Stage(tokenizer.decoder, clock, "vit_decoder", before="generator")
    if hasattr(tokenizer, "pixel_decoder"):
        tokenizer.pixel_decoder = Stage(tokenizer.pixel_decoder, clock, "pixel_decoder")
    return clock


def shared(model: T) -> T:
    """A copy of a pipeline (or upstream's models) on the same tensors, to compile or to watch."""
    memo = {id(t): t for module in _modules(model) for t in _tensors(module)}
    return copy.deepcopy(model, memo)


def in_dtypes(pipe: TiTokPipeline, names: Sequence[str]) -> dict[str, TiTokPipeline]:
    """A pipeline with the weights that each precision wants; in float32 `pipe` itself."""
    low = copy.deepcopy(pipe).to(dtype=torch.bfloat16) if "bf16" in names else None
    return {name: low if low is not None and name == "bf16" else pipe for name in names}


def labels_of(first: int, count: int) -> Tensor:
    """(count,) int64 classes of images first .. first + count - 1: distinct up to 1000."""
    return 37 * torch.arange(first, first + count) % 1000


def fixed_ids(pipe: TiTokPipeline, count: int) -> tuple[Tensor, Tensor]:
    """(count, K) ids that are the same in every run, and the same half masked."""
    assert pipe.generator is not None
    config, seeded = pipe.generator.config, torch.Generator().manual_seed(0)
    shape = (count, config.image_seq_len)
    ids = torch.randint(config.codebook_size, shape, generator=seeded).to(pipe.device)
    even = torch.arange(shape[1], device=pipe.device) % 2 == 0
    return ids, ids.masked_fill(even, config.mask_token_id)


def weight_bytes(model: object) -> int:
    """Bytes of all weights, each counted once; layers tell the size of what oneDNN holds."""
    sizes = {t.data_ptr(): t.nbytes for module in _modules(model) for t in _tensors(module)}
    packed = [getattr(m, "packed_bytes", 0) for model in _modules(model) for m in model.modules()]
    return sum(sizes.values()) + sum(packed)


def _modules(model: Any) -> list[nn.Module]:
    return [m for m in (model.tokenizer, model.generator) if m is not None]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextmanager
def arithmetic(name: str, autocast: str | None = None) -> Iterator[None]:
    """No gradients, the float32 mode of a precision, and bfloat16 autocast on a device type."""
    mixed = torch.autocast(autocast or "cpu", torch.bfloat16, enabled=autocast is not None)
    with torch.no_grad(), precision(name), mixed:
        yield


@dataclass
class Candidate:
    """One implementation in one precision.

    `call` is the work that is timed. `probe` gives its output for fixed inputs, which is compared
    with that of the first candidate: "ids" (integers) and "pixels" (floats), either may be absent.
    Both run in `context`. `weight_bytes` is what it alone would hold. `images` differ from those of
    `measure` where given.
    """

    implementation: str
    dtype: str
    mode: str
    call: Callable[[], object]
    probe: Callable[[], dict[str, Tensor]]
    context: Callable[[], AbstractContextManager[None]]
    weight_bytes: int
    clock: StageClock | None = None
    images: int | None = None

    def __str__(self) -> str:
        return f"{self.implementation} {self.dtype} {self.mode}"

    def run(self) -> object:
        """The timed call."""
        with self.context(), self.clock or nullcontext():
            return self.call()


def candidate(
    implementation: str,
    dtype: str,
    mode: str,
    model: Any,
    call: Callable[[], object],
    probe: Callable[[], dict[str, Tensor]] = dict,
    *,
    context: Callable[[], AbstractContextManager[None]] | None = None,
    clocked: bool = True,
) -> Candidate:
    """A `Candidate` that calls `model`, ours or upstream's; a clock goes into it, in place.

    By default it runs in the arithmetic of its precision: upstream in bfloat16 under autocast.
    """
    device = next(model.tokenizer.parameters()).device
    autocast = device.type if implementation.startswith("upstream") and dtype == "bf16" else None
    context = context or partial(arithmetic, dtype, autocast)
    weights = weight_bytes(model)  # before the clock goes in
    clock = watch(model.tokenizer, device) if clocked else None
    return Candidate(implementation, dtype, mode, call, probe, context, weights, clock)


def measure(
    candidates: Sequence[Candidate],
    *,
    images: int,
    device: torch.device,
    repeats: int | None = None,
    prefix: str = "",
) -> list[dict[str, Any]]:
    """Measure candidates for the same work, alternating, as many rounds as fit ROUND_BUDGET_S.

    Returns:
        A row per candidate, in order. One that ran out of memory or failed to compile has "error",
        the name of the exception, in place of numbers.
    """
    rows: list[dict[str, Any]] = []
    ready: dict[str, Candidate] = {}
    standard: dict[str, Tensor] = {}
    round_s = 0.0
    for c in candidates:
        row: dict[str, Any] = {"implementation": c.implementation, "dtype": c.dtype, "mode": c.mode}
        rows.append(row)
        say(f"{prefix}{c}: first calls")
        try:
            seconds, cold = _first_calls(c, device)
            with c.context():
                outputs = c.probe()
        except (MemoryError, RuntimeError) as error:  # torch's out-of-memory is a RuntimeError
            say(f"{prefix}{c} failed: {error}")
            row["error"] = type(error).__name__
            continue
        standard = standard or outputs
        row.update(cold, agreement=_agreement(outputs, standard))
        ready[str(c)] = c
        round_s += seconds
    if not ready:
        return rows
    fitting = int(ROUND_BUDGET_S / round_s) if round_s > 0 else MAX_ROUNDS
    repeats = repeats or min(MAX_ROUNDS, max(MIN_ROUNDS, fitting))
    say(f"{prefix}{repeats} rounds of about {round_s:.1f} s")
    runs = {name: c.run for name, c in ready.items()}
    times = time_interleaved(runs, repeats=repeats, warmup=0, device=device)
    for row, c in zip(rows, candidates, strict=True):
        if str(c) in times:
            row["seconds"] = times[str(c)]
            row["images_per_s"] = summary([(c.images or images) / s for s in times[str(c)]])
            row["stages_s"] = c.clock.medians(last=repeats) if c.clock else None
    return rows


def _first_calls(c: Candidate, device: torch.device) -> tuple[float, dict[str, Any]]:
    """Seconds of a second call, and the first-call time and memory for the row.

    Memory is the candidate's weights, and what its calls add to all that is loaded.
    """
    idle = peak_memory(lambda: None, device)
    first = timed(c.run, device)
    second: list[float] = []
    peak = peak_memory(lambda: second.append(timed(c.run, device)), device)
    if not second:  # memory cannot be measured here
        second.append(timed(c.run, device))
    added = None if idle is None or peak is None else max(0, peak - idle)
    return second[0], {
        "first_call_s": first,
        "weight_bytes": c.weight_bytes,
        "peak_bytes": None if added is None else c.weight_bytes + added,
    }


def _agreement(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Share of equal ids, and root mean square difference of pixels in [0, 1]."""
    result = {}
    if "ids" in got:
        result["ids_equal"] = float((got["ids"] == wanted["ids"]).double().mean())
    if "pixels" in got:
        difference = got["pixels"].double() - wanted["pixels"].double()
        result["pixel_rms"] = float(difference.square().mean().sqrt())
    return result
