"""How tokens are drawn: one frozen configuration, which reads upstream's YAML."""

from dataclasses import dataclass, fields, replace
from typing import Any

from titok_fast.settings import (
    Official,
    Settings,
    among,
    known_fields,
    read_official,
    require,
    within,
)

SCHEDULES = ("arccos", "cosine", "linear", "sqrt")
GUIDANCE_DECAYS = ("constant", "linear", "power-cosine")
MAX_STEPS = 1024


@dataclass(frozen=True)
class SamplingConfig(Settings):
    """How tokens are drawn. Defaults are upstream's `generate` defaults.

    Attributes:
        num_sample_steps: T, 1..1024.
        guidance_scale: strength; what it means depends on the decay, see schedules.py.
        guidance_decay: "constant", "linear" or "power-cosine" (upstream's word: the last two grow).
        guidance_scale_pow: exponent of "power-cosine".
        randomize_temperature: scale of the Gumbel noise at the first step; falls to 0.
        softmax_temperature_annealing: divide logits by 1.3 falling to 0.5.
        schedule: share still masked against time: "arccos" (TiTok), "cosine", "linear", "sqrt".
        confidence: "logit" (TiTok: raw guided logit, noise on tokens falls to 0) or "probability"
            (MaskGIT: log-probability, tokens at temperature 1).
        guidance_interval: (low, high), the share of the run in which guidance acts: steps s with
            low <= s / T < high. The others run without an unconditional pass. Diffusion models
            draw better so, at middle noise levels alone (arXiv 2404.07724).
    """

    num_sample_steps: int = within(8, 1, MAX_STEPS)
    guidance_scale: float = within(3.0)
    guidance_decay: str = among("constant", *GUIDANCE_DECAYS)
    guidance_scale_pow: float = within(3.0)
    randomize_temperature: float = within(4.5, 0)
    softmax_temperature_annealing: bool = False
    schedule: str = among("arccos", *SCHEDULES)
    confidence: str = among("logit", "logit", "probability")
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = "(low, high) with 0 <= low < high <= 1"
        match self.guidance_interval:
            case [int() | float() as low, int() | float() as high] if 0 <= low < high <= 1:
                # files give lists; a tuple of floats compares and hashes
                object.__setattr__(self, "guidance_interval", (float(low), float(high)))
            case other:
                require(False, "guidance_interval", wanted, other)

    @classmethod
    def from_official(cls, source: Official) -> "SamplingConfig":
        """The settings of upstream's sampling script for a config: annealing on, power 3."""
        section = read_official(source)["model"].get("generator") or {}
        known = known_fields(cls, section)
        if "num_steps" in section:
            known["num_sample_steps"] = section["num_steps"]
        return cls(softmax_temperature_annealing=True, **known)

    def updated(self, **changes: Any) -> "SamplingConfig":
        """A copy with changed settings; None leaves a setting as it is."""
        changes = {k: v for k, v in changes.items() if v is not None}
        names = [f.name for f in fields(self)]
        unknown = sorted(set(changes) - set(names))
        require(not unknown, "sampling setting", f"one of {names}", unknown)
        return replace(self, **changes)
