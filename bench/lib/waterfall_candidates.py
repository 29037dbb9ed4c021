"""Make the candidate of each row of the waterfall, on weights and inputs that all rows share."""

import argparse
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from lib import upstream as official
from lib.candidates import Candidate, arithmetic, candidate, in_dtypes, shared
from lib.harness import say, timed
from lib.options import load
from lib.techniques import TECHNIQUES, applied
from lib.waterfall_quality import compare, labels_of, outputs, reference_ids
from lib.waterfall_rows import Row

from titok_fast import SamplingConfig
from titok_fast.sampling.unmask import sample_seeds


@dataclass
class Prepared:
    """A row ready to run: its candidate, the model it calls, and the seconds of `compile`."""

    candidate: Candidate
    model: Any
    prepare_s: float


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
        made, shapes = self.make(row), next(iter(self._pipes.values()))
        with made.candidate.context():
            got = outputs(made.model, shapes, self.batch, self.config)
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
        return Prepared(candidate(row.name, dtype, mode, theirs, draw), theirs, 0.0)

    def _ours(self, row: Row) -> Prepared:
        low = row.weights != "float32"
        own = shared(self._pipes["bfloat16" if low else "float32"])
        dtype = "bf16" if low else self.shipped
        fast = [name for name in row.techniques if TECHNIQUES[name].kind == "fast"]
        seconds = timed(partial(own.compile, fast), self.device) if fast else 0.0
        draw = partial(
            own,
            labels_of(0, self.batch),
            seeds=sample_seeds(0, self.batch),
            batch_size=self.batch,
            output="tensor",
            **asdict(self.config),
        )
        mode, context = "compiled" if fast else "eager", partial(_as_row, row, dtype)
        return Prepared(candidate(row.name, dtype, mode, own, draw, context=context), own, seconds)


@contextmanager
def _as_row(row: Row, dtype: str) -> Iterator[None]:
    with arithmetic(dtype), applied(row.techniques):
        yield
