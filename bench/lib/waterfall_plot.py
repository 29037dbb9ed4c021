"""A record of waterfall.py to a picture: a bar per row.

python bench/waterfall_plot.py bench/results/FILE_waterfall.json
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.plots import MEASURED, PAPER, Figure, write  # says how to get matplotlib where it is not

__all__ = ["waterfall", "write"]

ASIDE = "#a9c5e4"


def waterfall(record: Mapping[str, Any]) -> Figure:
    """Samples/s of each measured row, first at the top, with the ratio to upstream's float32.

    Raises:
        ValueError: a record of another benchmark, or without a measured row.
    """
    cases = [case for case in record["cases"] if "images_per_s" in case]
    if record["benchmark"] != "waterfall" or not cases:
        got = f"{record['benchmark']} with {len(cases)} measured cases"
        raise ValueError(f"waterfall wants a record of waterfall.py with measured rows; got {got}")
    figure = Figure(figsize=(8, 0.9 + 0.28 * len(cases)), layout="constrained")
    panel = figure.subplots()
    for y, case in enumerate(reversed(cases)):
        rate = case["images_per_s"]
        spread = [[rate["median"] - rate["p20"]], [rate["p80"] - rate["median"]]]
        colour = PAPER if case["implementation"] == "upstream" else MEASURED
        panel.barh(y, rate["median"], xerr=spread, color=ASIDE if case["aside"] else colour)
        times = case["x_upstream_fp32"]
        text = f" {rate['median']:.3g}" + (f", {times:.2f}x" if times is not None else "")
        panel.text(rate["p80"], y, text, va="center", fontsize=7)
    names = [("+ " if case["aside"] else "") + case["text"] for case in reversed(cases)]
    panel.set_yticks(range(len(cases)), names, fontsize=7)
    panel.margins(x=0.15, y=0.01)
    panel.set_xlabel("samples/s, ratio to the official code in float32; pale: tried, not kept")
    e = record["environment"]
    threads = "" if "driver" in e else f", {e['threads']} threads"
    where = f"{e['device']}{threads}, torch {e['torch']}, {e['date_utc'][:10]}"
    panel.set_title(f"{record['model']}, batch {record['batch']}: {where}", fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: an SVG beside each record."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("records", nargs="+", type=Path, metavar="FILE")
    for path in p.parse_args(argv).records:
        try:
            write(waterfall(json.loads(path.read_text())), path.with_suffix(".svg"))
        except ValueError as error:
            p.error(f"{path}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
