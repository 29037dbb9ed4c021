"""List the rows of the waterfall: the techniques of each, and why one is left out."""

from dataclasses import dataclass, replace

from lib.techniques import TECHNIQUES, Technique

from titok_fast.backends import techniques as fast
from titok_fast.presets import Preset

WEIGHTS_AT_ONCE = 3  # sets of weights in memory


@dataclass(frozen=True)
class Row:
    """One row.

    `name` is that of the technique it adds to its `parent`, "plain", or "upstream-...". `weights`
    is the set that it works on: "float32", "bfloat16", or its own name where `compile` changes
    them. `techniques` are all that are on; `exact` is said of the one it adds.
    """

    name: str
    text: str
    weights: str = "float32"
    techniques: tuple[str, ...] = ()
    parent: str | None = None
    exact: bool = True
    not_measured: str | None = None

    @property
    def upstream(self) -> bool:
        """Whether it is the official code."""
        return self.name.startswith("upstream")

    @property
    def sets(self) -> set[str]:
        """Sets of weights that are in memory while it runs: compiled ones share their origin's."""
        return {self.weights} if self.weights == "float32" else {"bfloat16", self.weights}


UPSTREAM = (
    Row("upstream-fp32", "the official code as shipped, float32"),
    Row("upstream-autocast", "the official code under bfloat16 autocast", exact=False),
    Row("upstream-compiled", "the same through torch.compile", exact=False),
)


def rows(system: Preset, device: str, batch: int, *, upstream: str | None = None) -> list[Row]:
    """All rows in order; `upstream` says why the official code is not measured."""
    made = [replace(row, not_measured=upstream) for row in UPSTREAM]
    made.append(Row("plain", "its arithmetic in our code, float32"))
    parent, weights = made[-1], "float32"
    for t in TECHNIQUES.values():
        weights = "bfloat16" if t.name == "bf16" else weights
        row = Row(
            t.name,
            t.text,
            t.name if t.kind == "fast" else weights,
            (*parent.techniques, t.name),
            parent.name,
            t.exact,
            _left_out(t, system, device, batch),
        )
        made.append(row)
        if row.not_measured is None:
            parent = row
        elif t.kind == "built in":  # it has no effect here, so nothing was replaced
            parent = replace(parent, techniques=row.techniques)
    return made


def _left_out(t: Technique, system: Preset, device: str, batch: int) -> str | None:
    assert system.generator is not None
    assert system.sampling is not None
    decay = system.sampling.guidance_decay
    if device not in t.devices:
        return f"only on {' and '.join(t.devices)}"
    if t.kind == "fast" and t.name not in fast.TECHNIQUES:
        return f"titok_fast.backends.techniques has no technique {t.name!r}"
    if t.name == "skip-zero" and decay != "power-cosine":
        return f"under {decay} guidance upstream does without it as well"
    if t.name == "fused-qkv" and system.generator.model_type == "UViT":
        return "upstream's U-ViT has it as well"
    if t.name == "one-image" and batch == 1:
        return "nothing to do in a batch of one"
    return None


def next_group(waiting: list[Row], anchor: Row | None) -> list[Row]:
    """The anchor and the first of `waiting` that take turns, with at most WEIGHTS_AT_ONCE sets.

    The anchor is a measured row: through it the rates compare with those of earlier groups.
    """
    group = [] if anchor is None else [anchor]
    loaded = set().union(*(row.sets for row in group))
    for i, row in enumerate(waiting):
        if i and len(loaded | row.sets) > WEIGHTS_AT_ONCE:
            break
        loaded |= row.sets
        group.append(row)
    return group


def names() -> list[str]:
    """Keys of all rows, in order."""
    return [r.name for r in UPSTREAM] + ["plain", *TECHNIQUES]
