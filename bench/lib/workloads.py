"""Time our pipelines at other batches, token counts, steps and threads than the preset's.

Shared by scaling.py and the cost model. The workloads of a list take turns; those of one model and
token count share a pipeline.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from lib import candidates
from lib.candidates import Candidate, arithmetic, watch, weight_bytes
from lib.harness import PRECISIONS, say
from lib.options import in_mode
from lib.weights import draw_only

from titok_fast import PRESETS, SamplingConfig, TiTokPipeline
from titok_fast.kernels.lm_head_sample import lm_head_sample
from titok_fast.presets import Preset

HEAD_CALLS = 5  # one takes milliseconds


@dataclass(frozen=True)
class Workload:
    """What is drawn, and on how much of the machine.

    `batch` is that of each of `ranks` processes. `tokens` replace the preset's K (the networks
    stay), `steps` those of its sampler. `threads` None leaves them.
    """

    model: str = "titok-l-32"
    batch: int = 1
    tokens: int | None = None
    steps: int = 8
    threads: int | None = None
    ranks: int = 1

    @property
    def system(self) -> Preset:
        """The preset with the tokens and steps of this workload."""
        known = PRESETS[self.model]
        assert known.generator is not None
        K = self.tokens or known.generator.image_seq_len
        sampling = (known.sampling or SamplingConfig()).updated(num_sample_steps=self.steps)
        tokenizer = replace(known.tokenizer, num_latent_tokens=K)
        return Preset(tokenizer, replace(known.generator, image_seq_len=K), sampling)

    def row(self) -> dict[str, Any]:
        """What identifies it in a record."""
        tokenizer = self.system.tokenizer
        tokens = {"tokens": tokenizer.num_latent_tokens, "side": tokenizer.crop_size}
        return asdict(self) | tokens


def pipeline(workload: Workload, device: torch.device, dtype: str) -> TiTokPipeline:
    """Its pipeline under random weights, without the encoder."""
    return draw_only(workload.system, device, PRECISIONS[dtype])


def draw(workload: Workload, pipe: TiTokPipeline) -> object:
    """Labels to images on the host."""
    labels = torch.arange(workload.batch) % 1000
    settings = asdict(workload.system.sampling)
    return pipe(labels, batch_size=len(labels), output="tensor", **settings)


def run_head(workload: Workload, pipe: TiTokPipeline) -> None:
    """HEAD_CALLS times the head of one guided step and its draw, all tokens masked."""
    generator, B = pipe.generator, workload.batch
    assert generator is not None
    K, head = generator.image_seq_len, generator.lm_head
    like = {"device": head.weight.device, "dtype": head.weight.dtype}
    hidden = torch.randn(2, B * K, head.weight.shape[1], **like)
    rows = torch.arange(B * K, device=head.weight.device)
    for _ in range(HEAD_CALLS):
        lm_head_sample(
            hidden[0],
            hidden[1],
            head.weight,
            head.bias,
            seeds=rows,
            positions=rows % K,
            step=1,
            guidance=1.0,
            softmax_temperature=1.2,
            noise_temperature=5.0,
            rule="logit",
        )


@contextmanager
def settings(workload: Workload, dtype: str) -> Iterator[None]:
    """The arithmetic and the threads that a workload runs in."""
    before = torch.get_num_threads()
    with arithmetic(dtype):
        if workload.threads is not None:
            torch.set_num_threads(workload.threads)
        try:
            yield
        finally:
            if workload.threads is not None:
                torch.set_num_threads(before)


def measure(
    workloads: Sequence[Workload],
    *,
    device: torch.device,
    dtype: str,
    repeats: int,
    mode: str = "eager",
) -> list[dict[str, Any]]:
    """Time workloads of one rank each in turns.

    Returns:
        A row per workload, in order: its fields, "seconds", "images_per_s", "peak_bytes" (weights
        and what a call adds), "stages_s" (medians, with "head" for the head of one step), or
        "error".
    """
    pipes: dict[tuple[str, int | None], tuple[TiTokPipeline, int]] = {}
    made: list[Candidate] = []
    for i, workload in enumerate(workloads):
        key = workload.model, workload.tokens
        if key not in pipes:
            say(f"loading {workload.model}, {workload.row()['tokens']} tokens")
            pipe = pipeline(workload, device, dtype)
            size = weight_bytes(pipe)  # before: packed weights are no parameters
            pipes[key] = in_mode(pipe, mode), size
        pipe, size = pipes[key]
        clock = watch(pipe.tokenizer, device)  # of several on one pipeline the running one counts
        context = partial(settings, workload, dtype)
        for name, work, stages in ((f"{i}", draw, clock), (f"head {i}", run_head, None)):
            call = partial(work, workload, pipe)
            B = workload.batch
            made.append(Candidate(name, dtype, mode, call, dict, context, size, stages, B))
    found = candidates.measure(made, images=1, device=device, repeats=repeats)
    rows = []
    for workload, drawn, head in zip(workloads, found[::2], found[1::2], strict=True):
        row: dict[str, Any] = workload.row() | {"dtype": dtype, "mode": mode}
        rows.append(row)
        failed = next((part["error"] for part in (drawn, head) if "error" in part), None)
        if failed:
            row["error"] = failed
            continue
        row |= {name: drawn[name] for name in ("peak_bytes", "seconds", "images_per_s")}
        row["stages_s"] = drawn["stages_s"] | {"head": median(head["seconds"]) / HEAD_CALLS}
    return rows
