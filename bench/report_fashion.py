"""The small model's quality in the README and on its card, from the record of fashion.py.

python bench/report_fashion.py           rewrite the table on the card
python bench/report_fashion.py --check   exit status 1 when the card says something else
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.harness import NOT_YET, table
from lib.report_tables import read

from titok_fast.io.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CARD = ROOT / "titok_fast" / "weights" / "README.md"
MODEL = "fashion-16"
_BEGIN, _END = "<!-- results:fashion -->", "<!-- /results:fashion -->"
_SET, _TRAIN, _ORIGINALS = "pictures", "FID to the training set", "FID to the originals"
_COLUMNS = (_SET, "classifier agrees", _TRAIN, _ORIGINALS, "PSNR dB", "precision", "recall")


def fashion_table(record: Mapping[str, Any]) -> str:
    """Markdown for the README: the figures, then the sheets of pictures."""
    sheets = record.get("sheets", {}).items()
    pictures = [f"![{name}](bench/results/{file})" for name, file in sheets]
    return "\n\n".join([figures_table(record), *pictures])


def figures_table(record: Mapping[str, Any]) -> str:
    """Markdown: real pictures, reconstructions and samples beside each other."""
    f, protocol = record["figures"], record["protocol"]
    rows = [
        {
            _SET: "real, test set (the floor)",
            "classifier agrees": f"{f['accuracy_real']:.1%}",
            _TRAIN: f"{f['fid_real']:.3g}",
            _ORIGINALS: "0",
            "PSNR dB": "-",
            "precision": "-",
            "recall": "-",
        },
        {
            _SET: "their reconstructions",
            "classifier agrees": f"{f['accuracy_reconstructions']:.1%}",
            _TRAIN: f"{f['fid_reconstructions']:.3g}",
            _ORIGINALS: f"{f['fid_to_originals']:.3g}",
            "PSNR dB": f"{f['psnr']:.1f}",
            "precision": "-",
            "recall": "-",
        },
        _samples_row(f"{protocol['samples']:,} samples", f),
    ]
    rows += [_samples_row(f"the same, bf16, {m}", found) for m, found in f["fast_modes"].items()]
    sampling = protocol["sampling"]
    near = [f"{found['psnr_to_float32']:.1f} dB ({m})" for m, found in f["fast_modes"].items()]
    note = (
        f"{protocol['model']}, {sampling['num_sample_steps']} steps, guidance "
        f"{sampling['guidance_scale']:g}. Features and classes: {protocol['features']}; no figure "
        f"here compares with an Inception FID. Reference: {protocol['reference']}. Codes in use: "
        f"{f['codebook_usage']:.1%}. Decoded from the same tokens, pictures of the bf16 modes are "
        f"as near to those of float32 as PSNR {', '.join(near)}."
    )
    return f"{table(rows, _COLUMNS)}\n\n{note}"


def _samples_row(name: str, figures: Mapping[str, float]) -> dict[str, str]:
    return {
        _SET: name,
        "classifier agrees": f"{figures['label_agreement']:.1%}",
        _TRAIN: f"{figures['fid_samples']:.3g}",
        _ORIGINALS: "-",
        "PSNR dB": "-",
        "precision": f"{figures['precision']:.3f}",
        "recall": f"{figures['recall']:.3f}",
    }


def newest(model: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The last record of a model on any device, or None where it was not measured.

    Args:
        model: its preset.
        folder: of result files.
    """
    mine = [record for _, record in read(folder) if record["benchmark"] == "fashion"]
    mine = [r for r in mine if r["protocol"]["model"] == model]
    return max(mine, key=lambda r: r["environment"]["date_utc"], default=None)


def quality(model: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """What stands beside a model's speed: label agreement, and FID beside the floor.

    Args:
        model: its preset.
        folder: of result files.

    Returns:
        `label_agreement` (0..1), `fid_samples`, `fid_real`, `features` and the `commit` measured;
        None where it was not.
    """
    record = newest(model, folder)
    if record is None:
        return None
    figures = {k: record["figures"][k] for k in ("label_agreement", "fid_samples", "fid_real")}
    protocol, commit = record["protocol"], record["environment"]["commit"]
    return figures | {"features": protocol["features"], "commit": commit}


def fill_card(card: str, record: Mapping[str, Any] | None) -> str:
    """The model card with its table rewritten.

    Args:
        card: its text, with a pair of markers.
        record: of fashion.py; None where the model was not measured.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"the card wants the markers {_BEGIN} and {_END}")
    text = NOT_YET
    if record is not None:
        environment = record["environment"]
        commit = (environment["commit"] or "unknown")[:10]
        text = f"Measured at commit {commit}, {environment['date_utc'][:10]}.\n\n"
        text += figures_table(record)
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--check", action="store_true", help="compare, write nothing")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    p.add_argument("--card", type=Path, default=CARD, metavar="FILE")
    args = p.parse_args(argv)
    before = args.card.read_text()
    after = fill_card(before, newest(MODEL, args.results))
    if args.check and after != before:
        print(f"{args.card.name} differs from the results: run python bench/report_fashion.py")
        return 1
    if after != before:
        write_atomic(args.card, after.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
