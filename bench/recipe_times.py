"""How long recipes took on this machine, by the logs of their runs.

    python bench/recipe_times.py runs/fashion --json bench/results

A run's time is that from the first line of its log to the last, pauses included; the updates before
the first line count as much as the others. What has no log is left out: making tokens, converting.
The commit recorded is that of the reading: the runs may be older.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.harness import environment, table
from lib.options import save

from titok_fast.training.logs import LOG_NAME


def times_of(runs: Path) -> list[dict[str, Any]]:
    """Each run in a folder, in the order they began.

    Args:
        runs: folder with a folder for each run.

    Returns:
        `run`, `updates`, `minutes` and `started`, in seconds since 1970.

    Raises:
        ValueError: there is no run, or a log holds fewer than two updates.
    """
    found = []
    for path in runs.glob(f"*/{LOG_NAME}"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        steps = lines[-1]["step"] - lines[0]["step"] if lines else 0
        if steps < 1:
            raise ValueError(f"{path} holds no two updates: this run has not begun")
        first, last = lines[0], lines[-1]
        each = (last["time"] - first["time"]) / steps
        found.append({
            "run": path.parent.name,
            "updates": last["step"],
            "minutes": each * last["step"] / 60,
            "started": first["time"] - each * first["step"],
        })  # fmt: skip
    if not found:
        raise ValueError(f"{runs} wants folders with a {LOG_NAME} in each; there is none")
    return sorted(found, key=lambda run: run["started"])


def recipe_times_table(record: dict[str, Any]) -> str:
    """Markdown, a line per run and one for all."""
    runs = record["cases"]
    total = {"run": "all", "minutes": sum(run["minutes"] for run in runs)}
    total["updates"] = sum(run["updates"] for run in runs)
    rows = [run | {"minutes": f"{run['minutes']:.1f}"} for run in (*runs, total)]
    return table(rows, ("run", "updates", "minutes"))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", type=Path, help="folder of the runs: runs/fashion")
    p.add_argument("--json", metavar="FILE", help="write it there; a folder: name it after the run")
    args = p.parse_args(argv)
    try:
        cases = times_of(args.runs)
    except ValueError as error:
        p.error(str(error))
    record = {
        "benchmark": "recipe-times",
        "environment": environment("cpu"),
        "protocol": {"timing": "first line of each run's log to the last, pauses included"},
        "cases": cases,
    }
    save(args.json, record)
    print(recipe_times_table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
