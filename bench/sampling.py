"""Measure samples per second from class labels to uint8 on the host, de-tokenisation included.

    python bench/sampling.py
    python bench/sampling.py --models titok-l-32 --batch 8 --upstream PATH --json bench/results

Ours (eager, fast, int8) takes turns with the plain float32 reference sampler and, with --upstream,
with a checkout of bytedance/1d-tokenizer on the same weights. Each row holds the time of each stage
and of the first call, memory, FLOPs and agreement with float32. Weights are random unless --weights
says otherwise; the speed does not depend on them. The model in the package runs on its own weights,
with the quality that fashion.py measured beside its speed; upstream's classes have no such size.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from lib import upstream as official
from lib.candidates import Candidate, candidate, fixed_ids, in_dtypes, labels_of, shared
from lib.harness import NOT_MEASURED, say
from lib.options import contenders, load, matrix_parser, measure_case, parse_matrix, start_record
from lib.peers.systems import PAPER_A100
from lib.quality_tables import newest_quality
from lib.tables import IN_PACKAGE, sampling_table
from torch import Tensor

from titok_fast import PRESETS, SamplingConfig, TiTokPipeline
from titok_fast.costs import generation_costs
from titok_fast.io.images import to_uint8
from titok_fast.sampling.reference import generate

MODELS = ("titok-l-32", "titok-b-64", "titok-s-128", "fashion-16")


@torch.no_grad()
def reference(pipe: TiTokPipeline, labels: Tensor, config: SamplingConfig) -> Tensor:
    """The definition: reference sampler, then the tokenizer, all eager; (B, S, S, 3) uint8."""
    assert pipe.generator is not None
    ids = generate(pipe.generator, labels, config)
    return to_uint8(pipe.tokenizer.decode_tokens(ids), rounding="truncate").cpu()


def _probe(model: Any, ids: Tensor, masked: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Most likely tokens at half masked positions, and pixels of fixed tokens."""
    logits = model.generator(masked, labels, 0.0)
    pixels = model.tokenizer.decode_tokens(ids)
    return {"ids": logits.argmax(dim=-1).cpu(), "pixels": pixels.float().clamp(0, 1).cpu()}


def candidates(
    pipe: TiTokPipeline,
    by_dtype: Mapping[str, TiTokPipeline],
    rival: official.Upstream | None,
    modes: Sequence[str],
    labels: Tensor,
    config: SamplingConfig,
) -> list[Candidate]:
    """The reference on `pipe`, then ours and upstream in each precision, each with its clock."""
    ids, masked = fixed_ids(pipe, len(labels))
    plain = shared(pipe)
    call: Any = partial(reference, plain, labels, config)
    probe = partial(_probe, ids=ids, masked=masked, labels=labels)
    made = [candidate("reference", "fp32-ieee", "eager", plain, call, partial(probe, plain))]
    for name, dtype, mode, model in contenders(by_dtype, rival, modes):
        if name == "upstream":
            call = partial(model.draw, labels, config)
        else:
            options = {"batch_size": len(labels), "output": "tensor"} | asdict(config)
            call = partial(model, labels.cpu(), **options)
        made.append(candidate(name, dtype, mode, model, call, partial(probe, model)))
    return made


def quality(model: str) -> dict[str, Any] | None:
    """Label agreement (0..1), FID, and FID of real images; None where it is not measured."""
    record = newest_quality(model)
    if record is None:
        return None
    figures = {k: record["figures"][k] for k in ("label_agreement", "fid_samples", "fid_real")}
    return figures | {
        "features": record["protocol"]["features"],
        "commit": record["environment"]["commit"],
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the whole matrix; the JSON, where asked for, is rewritten after every group."""
    record = start_record("sampling", args)
    for name in args.models:
        config = (PRESETS[name].sampling or SamplingConfig()).updated(num_sample_steps=args.steps)
        shipped = PRESETS[name].folder is not None and args.weights is None
        weights = IN_PACKAGE if shipped else record["protocol"]["weights"]
        say(f"{name}: weights {weights}")
        source = "published" if shipped else args.weights
        pipe = load(name, source, args.device, generate=True)
        assert pipe.generator is not None
        classes = pipe.generator.config.condition_num_classes
        rival = official.load(args.upstream, pipe.tokenizer, pipe.generator)
        if args.upstream is not None and rival is None:
            say(f"{name}: {NOT_MEASURED} with upstream, whose classes have other sizes only")
        by_dtype = in_dtypes(pipe, args.dtype)
        costs = generation_costs(pipe.tokenizer.config, pipe.generator.config, config)
        gflop = {stage: cost.flops / 1e9 for stage, cost in costs.items()}
        for batch in args.batch:
            labels = labels_of(0, batch).to(args.device) % classes
            made = candidates(pipe, by_dtype, rival, args.modes, labels, config)
            case = {
                "model": name,
                "batch": batch,
                "sampling": asdict(config),
                "gflop_per_image": gflop,
                "paper_a100_images_per_s": PAPER_A100.get((name, config.num_sample_steps)),
                "weights": weights,
                "quality": quality(name) if shipped and args.steps is None else None,
            }
            measure_case(record, args, case, made)
            del made
    return record


def quality_lines(record: Mapping[str, Any]) -> list[str]:
    """For each model with weights in the package: label agreement, and FID beside its floor."""
    lines = []
    cases = {case["model"]: case for case in record["cases"]}
    for model in (name for name in cases if PRESETS[name].folder is not None):
        q, said = cases[model]["quality"], NOT_MEASURED
        if q is not None:
            said = f"label agreement {q['label_agreement']:.1%}, FID {q['fid_samples']:.3g} beside "
            said += f"{q['fid_real']:.3g} of real test pictures ({q['features']})"
        lines.append(f"{model}: {said}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; status 1 when a candidate failed."""
    p = matrix_parser(__doc__)
    if not torch.cuda.is_available():
        p.set_defaults(models=[MODELS[0], MODELS[-1]])  # one large, and one that takes seconds
    p.add_argument("--steps", type=int, metavar="T", help="default: the model's published setting")
    args = parse_matrix(p, argv, MODELS)
    for name in args.models:
        if PRESETS[name].generator is None:
            p.error(f"{name} has no generator: python bench/reconstruction.py measures tokenizers")
    if args.steps is not None:
        try:
            SamplingConfig(num_sample_steps=args.steps)
        except ValueError as error:
            p.error(f"--steps: {error}")
    record = run(args)
    print("\n".join([sampling_table(record, details=True), *quality_lines(record)]))
    return int(any("error" in case for case in record["cases"]))


if __name__ == "__main__":
    sys.exit(main())
