"""Write the Markdown of measured quality: the small model's figures, and the paper's curves."""

from collections.abc import Mapping, Sequence
from typing import Any

from lib.harness import NOT_YET, table
from lib.tables import Files, Record, read

_SET, _AGREES = "pictures", "classifier agrees"
_TRAIN, _ORIGINALS = "FID to the training set", "FID to the originals"
_COLUMNS = (_SET, _AGREES, _TRAIN, _ORIGINALS, "PSNR dB", "precision", "recall")
_NONE = dict.fromkeys(_COLUMNS, "-")


def figures_table(record: Mapping[str, Any]) -> str:
    """A row each for real pictures, reconstructions and samples, then how they were measured."""
    f, protocol = record["figures"], record["protocol"]
    floor = {
        _SET: "real, test set (the floor)",
        _AGREES: f"{f['accuracy_real']:.1%}",
        _TRAIN: f"{f['fid_real']:.3g}",
        _ORIGINALS: "0",
    }
    reconstructions = {
        _SET: "their reconstructions",
        _AGREES: f"{f['accuracy_reconstructions']:.1%}",
        _TRAIN: f"{f['fid_reconstructions']:.3g}",
        _ORIGINALS: f"{f['fid_to_originals']:.3g}",
        "PSNR dB": f"{f['psnr']:.1f}",
    }
    samples = {f"{protocol['samples']:,} samples": f}
    samples |= {f"the same, bf16, {mode}": found for mode, found in f["fast_modes"].items()}
    drawn = [
        {
            _SET: name,
            _AGREES: f"{found['label_agreement']:.1%}",
            _TRAIN: f"{found['fid_samples']:.3g}",
            "precision": f"{found['precision']:.3f}",
            "recall": f"{found['recall']:.3f}",
        }
        for name, found in samples.items()
    ]
    sampling = protocol["sampling"]
    near = [f"{found['psnr_to_float32']:.1f} dB ({m})" for m, found in f["fast_modes"].items()]
    note = (
        f"{protocol['model']}, {sampling['num_sample_steps']} steps, guidance "
        f"{sampling['guidance_scale']:g}. Features and classes: {protocol['features']}; no figure "
        f"here compares with an Inception FID. Reference: {protocol['reference']}. Codes in use: "
        f"{f['codebook_usage']:.1%}. Decoded from the same tokens, pictures of the bf16 modes are "
        f"as near to those of float32 as PSNR {', '.join(near)}."
    )
    rows = [_NONE | row for row in (floor, reconstructions, *drawn)]
    return f"{table(rows, _COLUMNS)}\n\n{note}"


def newest_quality(model: str, files: Files | None = None) -> Record | None:
    """The last record of fashion.py on a model, of any device; None where there is none."""
    records = [record for _, record in (read() if files is None else files)]
    fashion = [r for r in records if r["benchmark"] == "fashion"]
    mine = [r for r in fashion if r["protocol"]["model"] == model]
    return max(mine, key=lambda r: r["environment"]["date_utc"], default=None)


_TITLES = {
    "reconstruction-tokens": "reconstruction",
    "generation-tokens": "generation",
    "probe-tokens": "linear probe",
    "proxy-codes": "training of the tokenizer",
    "schedules": "masking schedule",
    "speed": "speed of",
}
_VERDICTS = {
    "agrees": "The small scale has the paper's order in every pair for",
    "mostly agrees": "It has it in most pairs for",
    "not told apart": "Differences here are nil, or smaller than those between seeds, for",
    "does not agree": "It does not have it for",
}


def trends_table(record: Mapping[str, Any]) -> str:
    """How it was measured, a row per curve beside the paper's, and where the two agree."""
    found = record["comparisons"]
    if not found:
        return NOT_YET
    rows = []
    for curve in found:
        places = zip(curve["x"], curve["paper_x"], strict=True)
        rows.append(
            {
                "curve": title(curve),
                "metric": f"{curve['metric_here']} (paper: {curve['metric']})",
                "against": ", ".join(str(a) if a == b else f"{a} ({b})" for a, b in places),
                "here": _values(curve["ours"]),
                "paper": _values(curve["paper"]),
                "pairs in the paper's order": f"{curve['alike']} of {curve['pairs']}",
            }
        )
        if "rank_correlation" in curve:
            rho = curve["rank_correlation"]
            rows[-1]["rank correlation"] = "none" if rho is None else f"{rho:.2f}"
    return "\n\n".join([record["protocol"]["summary"], table(rows), statement(found)])


def title(curve: Mapping[str, Any]) -> str:
    """What a curve shows, in words."""
    name, line = _TITLES[curve["group"]], curve["line"]
    if line.endswith("tokens"):
        return f"{name} against model size, {line}"
    if curve["group"] == "speed":
        return f"{name} {line} against tokens"
    return f"{name}{' against tokens' if curve['group'].endswith('tokens') else ''}, {line}"


def statement(found: Sequence[Mapping[str, Any]]) -> str:
    """Sentences that say where the small scale agrees with the paper and where it does not."""
    titles = {v: [title(curve) for curve in found if curve["verdict"] == v] for v in _VERDICTS}
    return "\n".join(f"{_VERDICTS[v]}: {'; '.join(names)}." for v, names in titles.items() if names)


def _values(values: Sequence[float]) -> str:
    return ", ".join(f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values)
