"""Predict the time of each stage from its FLOPs and bytes; fitted on a few workloads.

A stage costs the sum of its work, each of KINDS at a rate of its own. The rates are the only free
numbers, the same for all models, batches and stages; relative errors are fitted. The work counted
is that of the published networks (titok_fast/costs.py), without the passes that our sampler skips
because their guidance has weight 0; a rate may pass the machine's own where an exact rewrite saves
work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from lib.harness import table
from lib.workloads import Workload

from titok_fast import PRESETS, costs
from titok_fast.presets import Preset
from titok_fast.sampling.schedules import masked_after, steps

DTYPES = {"bf16": "bfloat16", "tf32": "tf32", "fp32-ieee": "float32"}

# kind of work: unit of its rate, and how many of the counted make one of that unit
KINDS = {
    "gemm_flops": ("GFLOP/s", 1e9),
    "attention_flops": ("GFLOP/s", 1e9),
    "attention_rows": ("Mrow/s", 1e6),
    "conv_flops": ("GFLOP/s", 1e9),
    "weight_bytes": ("GB/s", 1e9),
    "activation_bytes": ("GB/s", 1e9),
    "draws": ("Mlogit/s", 1e6),
    "layer_calls": ("layer/s", 1.0),
}
Work = dict[str, float]


def _transformer(
    cost: costs.Cost, L: int, size: tuple[int, int, int], runs: float, dtype: str, streams: int
) -> Work:
    """Work of `runs` sequences of L tokens, the weights being streamed `streams` times."""
    (D, layers, heads), each = size, costs.DTYPE_BYTES[dtype]
    mixing = layers * costs.attention(L, D).flops
    return {
        "gemm_flops": runs * (cost.flops - mixing),
        "attention_flops": runs * mixing,
        "attention_rows": runs * layers * heads * L,
        "weight_bytes": streams * (cost.weight_bytes(dtype) - cost.lookups * each),
        "activation_bytes": runs * cost.activations * each,
        "layer_calls": streams * layers,
    }


def work(system: Preset, batch: int, dtype: str) -> dict[str, Work]:
    """Work of each stage for a batch, by kind; "head" is head and draw of one step, all masked.

    The "vit_decoder" has the legacy head; the "pixel_decoder", where there is one, the codebook.
    """
    assert system.generator is not None
    assert system.sampling is not None
    g, t, sampling, dtype = system.generator, system.tokenizer, system.sampling, DTYPES[dtype]
    K, N, T = g.image_seq_len, g.codebook_size, sampling.num_sample_steps
    # U-ViT has one block more between its halves
    layers = g.num_hidden_layers if g.model_type == "ViT" else g.num_hidden_layers // 2 * 2 + 1
    size, stages = (g.hidden_size, layers, g.num_attention_heads), costs.tokenizer_costs(t)
    runs = batch * sum(1 if step.guidance == 0 else 2 for step in steps(sampling))
    masked = [K, *masked_after(sampling, K)[:-1]]
    generator = _transformer(costs.generator_cost(g), 1 + K, size, runs, dtype, T)
    generator["draws"] = batch * N * sum(masked)
    L = 1 + t.decoder_grid**2 + t.num_latent_tokens
    found = {
        "generator": generator,
        "vit_decoder": _transformer(stages["vit_decoder"], L, t.decoder_size, batch, dtype, 1),
    }
    if "pixel_decoder" in stages:
        pixels, codebook = stages["pixel_decoder"], stages["pixel_codebook"]
        activations = batch * (pixels.activations + codebook.activations)
        found["pixel_decoder"] = {
            "gemm_flops": batch * codebook.flops,
            "conv_flops": batch * pixels.flops,
            "weight_bytes": pixels.weight_bytes(dtype),
            "activation_bytes": activations * costs.DTYPE_BYTES[dtype],
        }
    head = costs.linear(K, g.hidden_size, N)
    found["head"] = {
        "gemm_flops": batch * head.flops,
        "weight_bytes": head.weight_bytes(dtype),
        "draws": batch * K * N,
    }
    return found


STAGES = ("generator", "vit_decoder", "pixel_decoder", "head")
GOAL = 0.15

# few and small on purpose: each stage at two batches, two widths, short and long sequences
FIT = (
    Workload("titok-l-32", 1),
    Workload("titok-l-32", 4, steps=4),
    Workload("titok-b-64", 2, tokens=256, steps=2),
    Workload("titok-s-128", 1, steps=2),
)
CHECK = (
    Workload("titok-l-32", 2),
    Workload("titok-b-64", 1),
    Workload("titok-b-64", 4, steps=4),
    Workload("titok-b-64", 1, tokens=128, steps=4),
    Workload("titok-s-128", 2, steps=4),
    Workload("titok-l-64-512", 1),
)


# seconds per unit of each kind of work; 0 where the fit found no cost of its own
Machine = Mapping[str, float]


def predict(machine: Machine, stage: Work) -> float:
    """Seconds of a stage."""
    return sum(amount * machine[kind] for kind, amount in stage.items())


def rates(machine: Machine) -> dict[str, str]:
    """The constants as rates, to print."""
    return {
        kind: f"{1 / (machine[kind] * scale):,.3g} {unit}" if machine[kind] else "no cost seen"
        for kind, (unit, scale) in KINDS.items()
    }


def fit(stages: Sequence[Work], seconds: Sequence[float]) -> Machine:
    """The constants, none negative, that make the squares of the relative errors smallest.

    Raises:
        ValueError: fewer stages than constants, or a time that is not positive.
    """
    try:
        from scipy.optimize import nnls
    except ImportError as error:
        raise ImportError("the cost model needs scipy: pip install 'titok_fast[bench]'") from error

    times = np.asarray(seconds, dtype=float)
    if len(stages) < len(KINDS) or len(times) != len(stages) or not (times > 0).all():
        raise ValueError(
            f"fit wants {len(KINDS)} or more stages, each with a positive time; "
            f"got {len(stages)} and {list(seconds)}"
        )
    A = np.array([[stage.get(kind, 0.0) for kind in KINDS] for stage in stages]) / times[:, None]
    scale = A.max(axis=0)
    scale[scale == 0] = 1.0  # a kind that occurs nowhere
    found, _ = nnls(A / scale, np.ones(len(times)))
    return dict(zip(KINDS, (found / scale).tolist(), strict=True))


def _works(row: Mapping[str, Any]) -> dict[str, Work]:
    fields = ("model", "batch", "tokens", "steps", "threads", "ranks")
    workload = Workload(**{name: row[name] for name in fields})
    return work(workload.system, row["batch"], row["dtype"])


def usable(row: Mapping[str, Any]) -> bool:
    """A measured row on the whole machine: other threads or ranks have rates of their own."""
    return "stages_s" in row and row["threads"] is None and row["ranks"] == 1


def fit_rows(rows: Sequence[Mapping[str, Any]], fitted: Sequence[Workload] = FIT) -> Machine:
    """The constants from the rows of the workloads in `fitted`."""
    chosen = [row for row in rows if usable(row) and _is_among(row, fitted)]
    pairs = [(amounts, row["stages_s"][s]) for row in chosen for s, amounts in _works(row).items()]
    return fit([amounts for amounts, _ in pairs], [seconds for _, seconds in pairs])


def _is_among(row: Mapping[str, Any], workloads: Sequence[Workload]) -> bool:
    return any(w.row().items() <= dict(row).items() for w in workloads)


def _with_total(stages: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each stage; "total" is without the head, a part of the others."""
    return {**stages, "total": sum(s for stage, s in stages.items() if stage != "head")}


def compare(
    machine: Machine, rows: Sequence[Mapping[str, Any]], fitted: Sequence[Workload] = FIT
) -> list[dict[str, Any]]:
    """A line per row and stage: measured, predicted, relative error, and whether it was fitted."""
    lines = []
    for row in filter(usable, rows):
        measured = _with_total(row["stages_s"])
        guess = {stage: predict(machine, amounts) for stage, amounts in _works(row).items()}
        for stage, seconds in _with_total(guess).items():
            lines.append(
                {name: row[name] for name in ("model", "batch", "tokens", "side", "steps")}
                | {
                    "stage": stage,
                    "measured_s": measured[stage],
                    "predicted_s": seconds,
                    "error": seconds / measured[stage] - 1,
                    "fitted": _is_among(row, fitted),
                }
            )
    return lines


def comparison_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; an error over GOAL on a workload that was not fitted is marked."""
    shown = []
    for line in lines:
        over = abs(line["error"]) > GOAL and not line["fitted"]
        percent = f"{line['error']:+.1%}{' (over)' if over else ''}"
        shown.append(dict(line) | {"error": percent, "fitted": "yes" if line["fitted"] else "no"})
    columns = ("model", "batch", "tokens", "steps", "stage", "measured_s", "predicted_s")
    return table(shown, (*columns, "error", "fitted"))


def worst(lines: Sequence[Mapping[str, Any]], *, fitted: bool = False) -> dict[str, float | None]:
    """Largest error of each stage among the workloads that were not fitted, or those that were."""
    chosen = [line for line in lines if line["fitted"] == fitted]
    return {
        stage: max((abs(line["error"]) for line in chosen if line["stage"] == stage), default=None)
        for stage in (*STAGES, "total")
    }


def floors(batch: int = 128) -> list[dict[str, Any]]:
    """Least ms per image on A100s and H100s in bfloat16; a batch streams the weights once."""
    rows = []
    for card in (name for name in costs.DEVICES if name.startswith(("a100", "h100"))):
        for name, known in PRESETS.items():
            if known.generator is None:
                continue
            stages = costs.speed_of_light(known, card, "bfloat16", batch)
            ms = {
                s: 1000 * stages[s] / batch for s in stages if s not in ("encoder", "code_search")
            }
            whole = sum(ms.values())
            ends = {"total": whole, "images_per_s": 1000 / whole}
            rows.append({"card": card, "model": name, "batch": batch} | ms | ends)
    return rows


def floors_table(batch: int = 128) -> str:
    """Markdown of `floors`, in ms per image."""
    stages = ("generator", "vit_decoder", "pixel_codebook", "pixel_decoder", "total")
    return table(floors(batch), ("card", "model", *stages, "images_per_s"))


def analysis(rows: Sequence[Mapping[str, Any]], fitted: Sequence[Workload]) -> dict[str, Any]:
    """The cost model of a run, for its record.

    Raises:
        ValueError: too few of the workloads to fit on were measured.
        ImportError: there is no scipy.
    """
    machine = fit_rows(rows, fitted)
    lines = compare(machine, rows, fitted)
    return {
        "seconds_per": machine,
        "rates": rates(machine),
        "fitted_on": [asdict(w) for w in fitted],
        "lines": lines,
        "worst_error_of_unfitted": worst(lines),
    }
