"""Make the candidate of each row of the waterfall, and compare what it draws with our float32."""

import argparse
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from math import log10
from typing import Any
from unittest.mock import patch

import torch
from lib import upstream as official
from lib.candidates import (
    Candidate,
    arithmetic,
    candidate,
    fixed_ids,
    in_dtypes,
    labels_of,
    shared,
)
from lib.harness import say, timed
from lib.options import load
from lib.techniques import TECHNIQUES, applied
from lib.waterfall_rows import Row
from torch import Tensor

from titok_fast import SamplingConfig, TiTokPipeline
from titok_fast.sampling import unmask as sampling
from titok_fast.sampling.reference import generate

IMAGES = 8  # at least: one image has too few tokens for a share
Outputs = dict[str, Tensor]


@contextmanager
def _first_candidates() -> Iterator[list[Tensor]]:
    """Collects the ids drawn in the first step of runs of more than one, before re-masking."""
    seen: list[Tensor] = []
    remask = sampling.remask

    def recorded(candidates: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs["step"] == 0:
            seen.append(candidates.clone())
        return remask(candidates, *args, **kwargs)

    with patch.object(sampling, "remask", recorded):
        yield seen


@torch.no_grad()
def outputs(model: Any, pipe: TiTokPipeline, batch: int, config: SamplingConfig) -> Outputs:
    """A model's outputs, in float32 on the CPU; call it in the model's arithmetic.

    "logits" (batch, K, N) of ids that are half masked; "pixels" (batch, 3, S, S) of fixed ids, in
    [0, 1]; "final" (n, K), ids drawn for IMAGES images or a batch, whichever is more; of ours also
    "step1", those drawn in the first step. `pipe` gives shapes and the device.
    """
    fixed, masked = fixed_ids(pipe, batch)
    labels = labels_of(0, batch).to(pipe.device)
    found = {
        "logits": [model.generator(masked, labels, 0.0).float()],
        "pixels": [model.tokenizer.decode_tokens(fixed).float().clamp(0, 1)],
    }
    for first in range(0, IMAGES, batch):  # the batch that models were compiled for
        for name, ids in _draw(model, pipe, first, batch, config).items():
            found.setdefault(name, []).append(ids)
    return {name: torch.cat(tensors).cpu() for name, tensors in found.items()}


def _draw(
    model: Any, pipe: TiTokPipeline, first: int, batch: int, config: SamplingConfig
) -> Outputs:
    """Ids (batch, K) of images `first` and on."""
    labels = labels_of(first, batch).to(pipe.device)
    if isinstance(model, TiTokPipeline):
        assert model.generator is not None
        seeds = sampling.sample_seeds(0, batch, first)
        with _first_candidates() as seen:
            ids = sampling.sample(model.generator, labels, seeds, config)
        return {"final": ids, "step1": seen[0] if seen else ids}  # one step masks nothing again
    with _global_seed(first):
        return {"final": model.ids(labels, config)}


@torch.no_grad()
def reference_ids(pipe: TiTokPipeline, batch: int, config: SamplingConfig) -> Tensor:
    """(n, K) ids that upstream draws in `outputs` if it makes no rounding error of its own."""
    assert pipe.generator is not None
    drawn = []
    for first in range(0, IMAGES, batch):
        with _global_seed(first):
            labels = labels_of(first, batch).to(pipe.device)
            drawn.append(generate(pipe.generator, labels, config).cpu())
    return torch.cat(drawn)


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def compare(got: Outputs, wanted: Outputs) -> dict[str, float | None]:
    """How far outputs are from those of float32; None where not known.

    "logit_error" is the norm of the difference over that of what is wanted; "psnr_db" is None for
    identical pixels.
    """
    shares = {
        f"{name}_ids_equal": float((got[name] == wanted[name]).double().mean())
        if name in got and name in wanted
        else None
        for name in ("step1", "final")
    }
    logits, pixels = (got[n].double() - wanted[n].double() for n in ("logits", "pixels"))
    rms = float(pixels.square().mean().sqrt())
    return {
        **shares,
        "logit_error": float(logits.norm() / wanted["logits"].double().norm()),
        "pixel_rms": rms,
        "psnr_db": -20 * log10(rms) if rms > 0 else None,
    }


# a row ready to run: its candidate, the model it calls, and the seconds of `compile`
Prepared = tuple[Candidate, Any, float]


class Inputs:
    """Weights, labels, and the float32 outputs that every row is compared with."""

    def __init__(self, args: argparse.Namespace, config: SamplingConfig) -> None:
        self.device, self.batch, self.config = args.device, args.batch_size, config
        # upstream's sampling script turns TF32 on, which only CUDA has
        self.shipped = "tf32" if args.device.type == "cuda" else "fp32-ieee"
        pipe = load(args.model, args.weights, args.device, generate=True)
        self.rival = official.load(args.upstream, pipe.tokenizer, pipe.generator)
        say("outputs in float32")
        with arithmetic("fp32-ieee"):
            self._wanted = outputs(pipe, pipe, self.batch, config)
            self._wanted_of_upstream = dict(self._wanted)
            if self.rival is not None:
                self._wanted_of_upstream["final"] = reference_ids(pipe, self.batch, config)
        self._pipes = {"float32": pipe}
        self._prepared: dict[str, Prepared] = {}

    def enter(self, group: Sequence[Row]) -> None:
        """Load the weights of a group of rows, and free those that it does not use."""
        sets = set().union(*(row.sets for row in group))
        kept = {row.name for row in group}
        self._prepared = {name: row for name, row in self._prepared.items() if name in kept}
        if "bfloat16" in sets and "bfloat16" not in self._pipes:
            self._pipes["bfloat16"] = in_dtypes(self._pipes["float32"], ["bf16"])["bf16"]
        if "float32" not in sets:  # its rows come first, so nothing asks for it again
            self._pipes.pop("float32", None)
            self.rival = None
        gc.collect()

    def make(self, row: Row) -> Prepared:
        """The candidate of a row of the group; one that earlier groups had is not made again."""
        if row.name not in self._prepared:
            self._prepared[row.name] = self._upstream(row) if row.upstream else self._ours(row)
        return self._prepared[row.name]

    def quality(self, row: Row) -> dict[str, float | None]:
        """The outputs of a row of the group, compared with those of float32."""
        (made, model, _), shapes = self.make(row), next(iter(self._pipes.values()))
        with made.context():
            got = outputs(model, shapes, self.batch, self.config)
        return compare(got, self._wanted_of_upstream if row.upstream else self._wanted)

    def _upstream(self, row: Row) -> Prepared:
        assert self.rival is not None
        theirs = shared(self.rival)
        mode = "compiled" if row.name == "upstream-compiled" else "eager"
        if mode == "compiled":
            # their loop calls `forward`, not the module
            theirs.generator.forward = torch.compile(theirs.generator.forward, dynamic=False)
            theirs.tokenizer.decoder.compile(dynamic=False)
            theirs.tokenizer.pixel_decoder.compile(dynamic=False)
        dtype = self.shipped if row.name == "upstream-fp32" else "bf16"
        draw = partial(theirs.draw, labels_of(0, self.batch).to(self.device), self.config)
        return candidate(row.name, dtype, mode, theirs, draw), theirs, 0.0

    def _ours(self, row: Row) -> Prepared:
        low = row.weights != "float32"
        own = shared(self._pipes["bfloat16" if low else "float32"])
        dtype = "bf16" if low else self.shipped
        fast = [name for name in row.techniques if TECHNIQUES[name].kind == "fast"]
        seconds = timed(partial(own.compile, fast), self.device) if fast else 0.0
        draw = partial(
            own,
            labels_of(0, self.batch),
            seeds=sampling.sample_seeds(0, self.batch),
            batch_size=self.batch,
            output="tensor",
            **asdict(self.config),
        )
        mode, context = "compiled" if fast else "eager", partial(_as_row, row, dtype)
        return candidate(row.name, dtype, mode, own, draw, context=context), own, seconds


@contextmanager
def _as_row(row: Row, dtype: str) -> Iterator[None]:
    with arithmetic(dtype), applied(row.techniques):
        yield
