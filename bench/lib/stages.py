"""Time the stages of one call without stopping the device in between."""

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from types import TracebackType
from typing import Any

import torch
from torch import nn


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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
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
    """A part of a model that reports when it begins and ends; compiled if it was."""

    def __init__(
        self, inner: nn.Module, before: Callable[[], None], after: Callable[[], None]
    ) -> None:
        super().__init__()
        self.inner, self._before, self._after = inner, before, after

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the part."""
        self._before()
        result = self.inner(*args, **kwargs)
        self._after()
        return result


def watch(tokenizer: Any, device: torch.device) -> StageClock:
    """Put a clock into the decoders of a tokenizer (ours or upstream's), in place.

    Stages: "generator", with the code look-up; "vit_decoder"; "pixel_decoder", with the pixel
    codebook; "transfer", to uint8 on the host.
    """
    clock = StageClock(device, rest="transfer")

    def ends(stage: str) -> Callable[[], None]:
        return lambda: clock.mark(stage)

    tokenizer.decoder = Stage(tokenizer.decoder, ends("generator"), ends("vit_decoder"))
    if hasattr(tokenizer, "pixel_decoder"):
        tokenizer.pixel_decoder = Stage(
            tokenizer.pixel_decoder, lambda: None, ends("pixel_decoder")
        )
    return clock
