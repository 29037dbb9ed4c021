"""The tables of `titok-fast info`: the cost model in words."""

import argparse
from collections.abc import Iterator, Sequence

from titok_fast.cli.options import positive
from titok_fast.costs import (
    DEVICES,
    DTYPE_BYTES,
    Cost,
    decoding_costs,
    dtype_size,
    generator_cost,
    generator_passes,
    parameters,
    preset_costs,
    speed_of_light,
)
from titok_fast.presets import PRESETS, Preset, preset
from titok_fast.processor.description import Processor
from titok_fast.processor.here import measure_processor
from titok_fast.processor.rates import FORMATS

_MIB = 2**20
_NONE = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command's arguments on its parser."""
    parser.description = (
        "Show parameters, FLOPs, bytes and the least time per image on some cards, computed from "
        "the models' shapes; nothing is downloaded. Without MODEL also what this processor does "
        "best, which takes a second to measure."
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"models to show stage by stage (default: a line for each of {', '.join(PRESETS)})",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPE_BYTES),
        default="bfloat16",
        help="number format of weights and arithmetic (default: bfloat16)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=32,
        metavar="N",
        help="images at once, for the least times (default: 32)",
    )


def run(args: argparse.Namespace) -> Iterator[str]:
    """Yield the tables."""
    yield info(args.models, dtype=args.dtype, batch=args.batch_size)
    if not args.models:
        yield "\n" + describe(measure_processor())


def describe(own: Processor) -> str:
    """A processor's instruction sets, its rates, and the modes that are fastest on it."""
    names = ("float32", "bfloat16", "int8")
    rows = [["GFLOP/s of a thread", *names]]
    for kind in ("linear", "convolution"):
        rows.append([kind, *(f"{own.best(kind, name) / 1e9:,.0f}" for name in names)])
    attention = (own.best("attention", name) for name in names[:2])
    rows.append(["attention", *(f"{rate / 1e9:,.0f}" for rate in attention), _NONE])
    dtype = FORMATS[own.dtype]
    wide, narrow, int8 = (own.best("linear", name) for name in names)
    return (
        f"This processor: {own.name}: {', '.join(own.instruction_sets)}\n\n{table(rows)}\n\n"
        f"Take --dtype {dtype} --fast: bfloat16 has {narrow / wide:.2g} times the rate of float32; "
        f"--fast int8 has {int8 / max(wide, narrow):.2g} times\nthe faster of the two, at a small "
        "loss of precision."
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first being the heading, as aligned text; numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def info(names: Sequence[str], *, dtype: str, batch: int) -> str:
    """All presets side by side, or each named one stage by stage.

    Args:
        names: presets; none means all, in one table.
        dtype: of weights and activations, a key of DTYPE_BYTES.
        batch: images at once, for the speed of light.

    Raises:
        ValueError: unknown preset or dtype, or a batch below 1.
    """
    known = {name: preset(name) for name in names}
    dtype_size(dtype)
    if batch < 1:
        raise ValueError(f"batch wants at least 1; got {batch}")
    if not known:
        return _overview(dtype, batch)
    return "\n\n".join(_details(name, one, dtype, batch) for name, one in known.items())


def _weight_bytes(known: Preset, dtype: str) -> int:
    latents = Cost(parameters=parameters(known.tokenizer)["latent_tokens"])
    return sum(cost.weight_bytes(dtype) for cost in [latents, *preset_costs(known).values()])


def _giga(costs: dict[str, Cost], *stages: str) -> str:
    return f"{sum(costs[s].flops for s in stages if s in costs) / 1e9:,.1f}"


def _drawing_stages(known: Preset) -> list[str]:
    return ["generator", *decoding_costs(known.tokenizer)]


def _overview(dtype: str, batch: int) -> str:
    heading = ["model", "tokens", "tokenizer", "generator", "weights", "encode", "decode", "draw"]
    units = ["", "per image", "M param.", "M param.", "MiB", *["GFLOP/image"] * 3]
    rows = [[*heading, *DEVICES], [*units, *["images/s"] * len(DEVICES)]]
    for name, known in PRESETS.items():
        costs, draws = preset_costs(known), known.generator is not None
        row = [
            name,
            str(known.tokenizer.num_latent_tokens),
            f"{sum(parameters(known.tokenizer).values()) / 1e6:.1f}",
            f"{costs['generator'].parameters / 1e6:.1f}" if draws else _NONE,
            f"{_weight_bytes(known, dtype) / _MIB:,.0f}",
            _giga(costs, "encoder", "code_search"),
            _giga(costs, *decoding_costs(known.tokenizer)),
            _giga(costs, *_drawing_stages(known)) if draws else _NONE,
        ]
        for device in DEVICES:
            seconds = speed_of_light(known, device, dtype, batch)
            stages = _drawing_stages(known) if draws else list(costs)
            row.append(f"{batch / sum(seconds[s] for s in stages):,.0f}")
        rows.append(row)
    first, second, *rest = table(rows).splitlines()
    note = (
        f"\n{dtype}, batch {batch}. One multiply-add is 2 FLOPs, as in the published networks. "
        "draw: class to picture with the\npublished settings, decoding included. images/s: what "
        "the card's data sheet allows at most, for drawing, or for\nencoding and decoding where "
        "there is no generator. Details: titok-fast info MODEL"
    )
    return "\n".join([first, rest[0], second, *rest[1:], note])


def _details(name: str, known: Preset, dtype: str, batch: int) -> str:
    costs = preset_costs(known)
    seconds = {device: speed_of_light(known, device, dtype, batch) for device in DEVICES}
    heading = ["stage", "parameters", "weights MiB", "GFLOP/image", "least MiB", "by layer MiB"]
    rows = [[*heading, *(f"{device} us" for device in DEVICES)]]
    for stage, cost in costs.items():
        row = [
            stage,
            f"{cost.parameters:,}",
            f"{cost.weight_bytes(dtype) / _MIB:,.1f}",
            f"{cost.flops / 1e9:,.2f}",
            f"{cost.minimal_bytes(dtype, batch) / batch / _MIB:,.2f}",
            f"{cost.layerwise_bytes(dtype, batch) / batch / _MIB:,.1f}",
        ]
        rows.append([*row, *(f"{1e6 * seconds[d][stage] / batch:,.1f}" for d in DEVICES)])
    cfg, counts = known.tokenizer, parameters(known.tokenizer)
    lines = [
        f"{name}: {cfg.crop_size} px to {cfg.num_latent_tokens} tokens"
        + (f" of {cfg.codebook_size} codes" if cfg.quantize_mode == "vq" else " (VAE)"),
        f"tokenizer {sum(counts.values()):,} parameters: "
        + ", ".join(f"{part} {count:,}" for part, count in counts.items()),
    ]
    if known.generator is not None and known.sampling is not None:
        once, sampling = generator_cost(known.generator), known.sampling
        lines.append(
            f"generator {once.parameters:,} parameters, {once.flops / 1e9:.2f} GFLOP a pass, "
            f"{generator_passes(sampling)} passes in {sampling.num_sample_steps} steps"
        )
    if known.classes:
        named = ", ".join(f"{label} {name}" for label, name in enumerate(known.classes))
        lines.append(f"classes: {named}")
    lines += [
        f"{dtype}, batch {batch}; bytes and times per image. least: weights, input and output "
        "once; by layer: activations too.",
        "Times are what the card's data sheet allows at best: FLOPs over peak, or least bytes over "
        "bandwidth.",
    ]
    return "\n".join([*lines, "", table(rows)])
