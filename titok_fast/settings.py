"""Frozen settings that check themselves, and the official files they are read from."""

from collections.abc import Mapping
from dataclasses import field, fields
from math import inf, isfinite
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

__version__ = "0.1.0"

Official = str | Path | Mapping[str, Any] | DictConfig


def among(default: Any, *choices: Any) -> Any:
    """A field that takes one of a few values."""
    return field(default=default, metadata={"choices": choices})


def within(default: Any, least: float = -inf, most: float = inf) -> Any:
    """A finite number with bounds, both included; an integer where the default is one."""
    whole = isinstance(default, int)
    return field(default=default, metadata={"bounds": (least, most), "whole": whole})


def require(ok: bool, name: str, wanted: str, got: object) -> None:
    """Raise ValueError with what a setting wants and what it got, unless `ok`."""
    if not ok:
        raise ValueError(f"{name} wants {wanted}; got {got!r}")


class Settings:
    """Base of frozen dataclasses: checks every field against its `among` or `within`."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value, name = getattr(self, f.name), f"{type(self).__name__}.{f.name}"
            choices, bounds = f.metadata.get("choices"), f.metadata.get("bounds")
            if choices:
                require(value in choices, name, f"one of {', '.join(choices)}", value)
            if bounds and value is not None:
                # written so that NaN fails too
                fits = isfinite(value) and bounds[0] <= value <= bounds[1]
                fits = fits and (isinstance(value, int) or not f.metadata["whole"])
                require(fits, name, _range(*bounds, whole=f.metadata["whole"]), value)


def _range(least: float, most: float, *, whole: bool) -> str:
    if (least, most) == (-inf, inf):
        return "a finite number"
    if most == inf:
        return f"at least {least}"
    return f"{'an integer' if whole else 'a number'} from {least} to {most}"


def read_official(source: Official) -> dict[str, Any]:
    """An official configuration (YAML or JSON file, or mapping) with `${...}` resolved.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it holds no configuration, or a `${...}` points nowhere.
    """
    if isinstance(source, str | Path):
        if not Path(source).is_file():
            raise FileNotFoundError(f"no configuration file at {source}")
        try:
            config: Any = OmegaConf.load(source)  # YAML is a superset of JSON
        except Exception as error:
            raise ValueError(f"{source} is not readable as YAML or JSON: {error}") from error
    else:
        config = source if isinstance(source, DictConfig) else OmegaConf.create(dict(source))
    try:
        resolved: Any = OmegaConf.to_container(config, resolve=True)
    except Exception as error:
        raise ValueError(f"configuration has an unresolved reference: {error}") from error
    if not isinstance(resolved, dict) or "model" not in resolved:
        raise ValueError("configuration wants the top-level key 'model' of upstream's files")
    return resolved


def known_fields(cls: type, section: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an official section that are fields of `cls`."""
    names = {f.name for f in fields(cls)}
    return {k: v for k, v in section.items() if k in names}
