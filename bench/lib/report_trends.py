"""The README's section on the paper's curves in small, from a record of paper/trends.py."""

from collections.abc import Mapping
from typing import Any

from lib.harness import NOT_YET, table

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
    """Markdown: how it was measured, a row per curve beside the paper's, and what they say."""
    found = record["comparisons"]
    if not found:
        return NOT_YET
    rows = [
        {
            "curve": title(curve),
            "metric": f"{curve['metric_here']} (paper: {curve['metric']})",
            "against": ", ".join(_places(curve)),
            "here": _values(curve["ours"]),
            "paper": _values(curve["paper"]),
            "pairs in the paper's order": f"{curve['alike']} of {curve['pairs']}",
            "rank correlation": _correlation(curve["rank_correlation"]),
        }
        for curve in found
    ]
    lines = table(rows, list(rows[0]))
    return "\n\n".join([record["protocol"]["summary"], lines, statement(found)])


def title(curve: Mapping[str, Any]) -> str:
    """What a curve shows, in words."""
    name, line = _TITLES[curve["group"]], curve["line"]
    if line.endswith("tokens"):
        return f"{name} against model size, {line}"
    if curve["group"] == "speed":
        return f"{name} {line} against tokens"
    return f"{name}{' against tokens' if curve['group'].endswith('tokens') else ''}, {line}"


def statement(found: list[Mapping[str, Any]]) -> str:
    """Sentences that say where the small scale agrees and where it does not."""
    sentences = []
    for verdict, words in _VERDICTS.items():
        titles = [title(curve) for curve in found if curve["verdict"] == verdict]
        if titles:
            sentences.append(f"{words}: {'; '.join(titles)}.")
    return "\n".join(sentences)


def _places(curve: Mapping[str, Any]) -> list[str]:
    """Ours, with the paper's in brackets where they differ."""
    pairs = zip(curve["x"], curve["paper_x"], strict=True)
    return [str(own) if own == theirs else f"{own} ({theirs})" for own, theirs in pairs]


def _values(values: list[float]) -> str:
    return ", ".join(f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values)


def _correlation(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
