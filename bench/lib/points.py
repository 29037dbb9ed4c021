"""Points of a measurement: one of our systems at a batch, token count, steps and threads.

Shared by scaling.py and cost_model.py. All points of a list take turns; the pipeline of one model
serves all its points.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from lib.cases import arithmetic, say, weight_bytes
from lib.harness import peak_memory, summary, time_interleaved
from lib.options import in_mode
from lib.stages import StageClock, watch
from lib.weights import draw_only

from titok_fast import PRESETS, SamplingConfig, TiTokPipeline
from titok_fast.kernels.lm_head_sample import lm_head_sample
from titok_fast.presets import Preset

HEAD_CALLS = 5  # one takes milliseconds


@dataclass(frozen=True)
class Point:
    """What is drawn, and on how much of the machine.

    Attributes:
        model: a preset with a generator.
        batch: pictures at once, in each rank.
        tokens: K in place of the preset's; the networks stay.
        steps: of the sampler, the rest of the settings being the preset's.
        threads: of the CPU; None leaves them.
        ranks: processes that draw at the same time.
    """

    model: str = "titok-l-32"
    batch: int = 1
    tokens: int | None = None
    steps: int = 8
    threads: int | None = None
    ranks: int = 1

    @property
    def system(self) -> Preset:
        """The preset with this point's tokens and steps."""
        known = PRESETS[self.model]
        assert known.generator is not None
        K = self.tokens or known.generator.image_seq_len
        sampling = (known.sampling or SamplingConfig()).updated(num_sample_steps=self.steps)
        return Preset(
            replace(known.tokenizer, num_latent_tokens=K),
            replace(known.generator, image_seq_len=K),
            sampling,
        )

    def row(self) -> dict[str, Any]:
        """What identifies it in a record."""
        tokenizer = self.system.tokenizer
        tokens = {"tokens": tokenizer.num_latent_tokens, "side": tokenizer.crop_size}
        return asdict(self) | tokens


class Prepared:
    """A point ready to run, on a pipeline that other points use as well.

    Each puts a stage clock of its own round the same parts; only the one that draws takes times.
    """

    def __init__(self, point: Point, pipe: TiTokPipeline, dtype: str) -> None:
        self.point, self.dtype, self.pipe = point, dtype, pipe
        self.clock: StageClock = watch(pipe.tokenizer, pipe.device)
        self.labels = torch.arange(point.batch) % 1000
        self.head: Callable[[], object] = partial(_head, self.pipe, point.batch)

    def draw(self) -> object:
        """Labels to pictures on the host, on this point's threads."""
        settings = asdict(self.point.system.sampling)
        B = self.point.batch
        with self._arithmetic(), _threads(self.point.threads), self.clock:
            return self.pipe(self.labels, batch_size=B, output="tensor", **settings)

    def run_head(self) -> None:
        """HEAD_CALLS times the head and the draw of one guided step, all tokens masked."""
        with self._arithmetic(), _threads(self.point.threads):
            for _ in range(HEAD_CALLS):
                self.head()

    def _arithmetic(self) -> AbstractContextManager[None]:
        return arithmetic(self.dtype)


def _head(pipe: TiTokPipeline, B: int) -> object:
    generator = pipe.generator
    assert generator is not None
    K, weight = generator.image_seq_len, generator.lm_head.weight
    hidden = torch.randn(2, B * K, weight.shape[1], device=weight.device, dtype=weight.dtype)
    rows = torch.arange(B * K, device=weight.device)
    return lm_head_sample(
        hidden[0],
        hidden[1],
        weight,
        generator.lm_head.bias,
        seeds=rows,
        positions=rows % K,
        step=1,
        guidance=1.0,
        softmax_temperature=1.2,
        noise_temperature=5.0,
        rule="logit",
    )


class _Threads:
    def __init__(self, count: int) -> None:
        self.count, self.before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)


def _threads(count: int | None) -> AbstractContextManager[None]:
    return nullcontext() if count is None else _Threads(count)


def measure(
    points: Sequence[Point],
    *,
    device: torch.device,
    dtype: str,
    repeats: int,
    mode: str = "eager",
    memory: bool = True,
) -> list[dict[str, Any]]:
    """Time points in turns.

    Args:
        points: of one rank each.
        device: where they run.
        dtype: a precision that harness.precision knows.
        repeats: timed rounds.
        mode: of options.in_mode.
        memory: also the peak of each, one more call.

    Returns:
        A row per point, in order: its fields, "seconds", "images_per_s", "peak_bytes" (weights and
        what a call adds), "stages_s" (medians, with "head" for the head of one step), or "error".
    """
    weights = torch.bfloat16 if dtype == "bf16" else torch.float32
    pipes: dict[tuple[str, int | None], tuple[TiTokPipeline, int]] = {}
    rows: list[dict[str, Any]] = []
    ready: dict[str, Prepared] = {}
    for point in points:
        row: dict[str, Any] = point.row() | {"dtype": dtype, "mode": mode}
        rows.append(row)
        key = point.model, point.tokens
        if key not in pipes:
            say(f"loading {point.model}, {row['tokens']} tokens")
            pipe = draw_only(point.system, device, weights)
            size = weight_bytes(pipe)  # before: packed weights are no parameters
            pipes[key] = in_mode(pipe, mode), size
        pipe, size = pipes[key]
        prepared = Prepared(point, pipe, dtype)
        try:
            prepared.draw()
            row["peak_bytes"] = _peak(prepared, size, device) if memory else None
            ready[str(len(rows) - 1)] = prepared
        except (MemoryError, RuntimeError) as error:  # torch's out-of-memory is a RuntimeError
            say(f"{point} failed: {error}")
            row["error"] = type(error).__name__
    if not ready:
        return rows
    calls: dict[str, Callable[[], object]] = {name: p.draw for name, p in ready.items()}
    calls |= {f"head {name}": p.run_head for name, p in ready.items()}
    times = time_interleaved(calls, repeats=repeats, warmup=0, device=device)
    for name, prepared in ready.items():
        seconds, batch = times[name], prepared.point.batch
        stages = prepared.clock.medians(last=repeats)
        head = summary(times[f"head {name}"])["median"] / HEAD_CALLS
        rows[int(name)] |= {
            "seconds": seconds,
            "images_per_s": summary([batch / s for s in seconds]),
            "stages_s": stages | {"head": head},
        }
    return rows


def _peak(prepared: Prepared, weights: int, device: torch.device) -> int | None:
    idle = peak_memory(lambda: None, device)
    peak = peak_memory(prepared.draw, device)
    added = None if idle is None or peak is None else max(0, peak - idle)
    return None if added is None else weights + added
