"""Upstream's recipe files: the key of each setting; finding, reading and checking files.

`Table` maps a dotted official key to a section and field of recipe.py and to the field's type.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

Table = dict[str, tuple[str, str, Any]]
RECIPES = Path(__file__).parents[2] / "recipes"

# section of ours -> official prefix of its fields
PREFIXES = {
    "experiment": "experiment",
    "tokenizer": "model.vq_model",
    "tokenizer.pixel": "model.vq_model.pixel",
    "generator": "model.generator",
    "sampling": "model.generator",
    "vqgan": "model.pixel",
    "losses": "losses",
    "data": "dataset.preprocessing",
    "optimizer": "optimizer.params",
    "lr_scheduler": "lr_scheduler.params",
    "training": "training",
}
# fields under another key in official files
RENAMED = {
    "experiment.pretrained_tokenizer_weight": "model.vq_model.pretrained_tokenizer_weight",
    "sampling.num_sample_steps": "model.generator.num_steps",
    "data.kind": "dataset.params.kind",
    "data.train": "dataset.params.train_shards_path_or_url",
    "data.eval": "dataset.params.eval_shards_path_or_url",
    "data.workers": "dataset.params.num_workers_per_gpu",
    "data.max_bad_share": "dataset.params.max_bad_share",
    "optimizer.name": "optimizer.name",
    "lr_scheduler.scheduler": "lr_scheduler.scheduler",
    "training.clustering_vq": "model.vq_model.clustering_vq",
}
# fields filled from the key of another field
DERIVED = ("tokenizer.crop_size", "tokenizer.pixel", "generator.codebook_size")

# official keys that change nothing here, and why
MEANINGLESS = {
    "experiment.logging_dir": "logs are in experiment.output_dir",
    "dataset.params.dataset_with_class_label": "a label is read where a record has one",
}
# official keys of which we support one value
FIXED = {
    "dataset.params.dataset_with_text_label": (False, "models that read text are out of scope"),
    "dataset.preprocessing.res_ratio_filtering": (False, "images are not filtered by shape"),
}
# official keys read by recipe.py itself
SPECIAL = {
    "stage": str,
    "dataset.params.pretokenization": str,
    "lr_scheduler.params.learning_rate": float,
    "training.enable_wandb": bool,
}


def official_name(section: str, name: str) -> str:
    """Dotted official key of a field."""
    return RENAMED.get(f"{section}.{name}", f"{PREFIXES[section]}.{name}")


def table(classes: Mapping[str, type]) -> Table:
    """Every official key that fills a field of one of the `classes`, given by section."""
    found: Table = {}
    for section, cls in classes.items():
        types = get_type_hints(cls)
        for f in fields(cls):
            if f"{section}.{f.name}" not in DERIVED:
                found[official_name(section, f.name)] = (section, f.name, types[f.name])
    return found


def find(name_or_path: str | Path) -> Path:
    """The file of a recipe: an existing file, or a name of `titok_fast/recipes`: "fashion/stage1".

    Raises:
        FileNotFoundError: neither; names the recipes most like it.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    files = (file.relative_to(RECIPES) for file in RECIPES.rglob("*.yaml") if file.stem != "base")
    names = sorted(file.with_suffix("").as_posix() for file in files)
    name = str(name_or_path)
    if name in names:
        return RECIPES / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, n=3) or names
    raise FileNotFoundError(f"no recipe file or name {name!r}; known: {', '.join(near)}")


def load(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe file merged over its `base:`, then overrides, with `${...}` resolved.

    Args:
        path: YAML or JSON file. Its key `base` names a file, relative to its folder, that gives the
            keys this file does not; a base has no base of its own.
        overrides: "dotted.key=value", values in YAML.

    Returns:
        Nested dictionary without `base`.

    Raises:
        FileNotFoundError: no such file, or no such base.
        ValueError: unreadable, a base with a base, a malformed override, an unresolved reference.
    """
    config = _load_file(path)
    base = config.pop("base", None)
    if base is not None:
        base_path = path.parent / str(base)
        below = _load_file(base_path)
        if "base" in below:
            raise ValueError(f"{base_path} is the base of {path} and wants none of its own")
        config = OmegaConf.merge(below, config)  # type: ignore[assignment]
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise ValueError(f"an override wants the form key=value; got {override!r}")
    try:
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))  # type: ignore[assignment]
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except Exception as error:
        raise ValueError(f"{path} with {list(overrides)}: {error}") from error


def _load_file(path: Path) -> DictConfig:
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}")
    try:
        config = OmegaConf.load(path)
    except Exception as error:
        raise ValueError(f"{path} is not readable as YAML or JSON: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} wants keys and values; got a {type(config).__name__}")
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries -> {"dotted.key": value}; empty ones vanish."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        at = nested
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return nested


def check_names(flat: Iterable[str], known: Table) -> None:
    """Refuse keys that nothing reads.

    Raises:
        ValueError: names each with the known keys most like it.
    """
    names = [*known, *SPECIAL, *MEANINGLESS, *FIXED]
    problems = []
    for key in flat:
        if key in names:
            continue
        last = key.rpartition(".")[2]
        near = [name for name in names if name.rpartition(".")[2] == last]
        near += difflib.get_close_matches(key, names, n=3, cutoff=0.75)
        near += [name for name in names if name.startswith(f"{key}.")][:3]
        likely = ", ".join(dict.fromkeys(near)) or "nothing"
        problems.append(f"{key} (near it: {likely})")
    if problems:
        raise ValueError("unknown keys in the recipe:\n  " + "\n  ".join(problems))


# not OmegaConf.structured: it refuses 1e6 for an int, takes 1 for a bool, any number for a str and
# "5" for an int, and makes "False" of a plain no
def convert(value: Any, wanted: Any, name: str) -> Any:
    """A YAML value as a field's type.

    Converts whole floats to int, int to float, lists to tuples, and null ("key=") to "".

    Raises:
        ValueError: the value is of another kind; the message has `name`.
    """
    kinds = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    for kind in (get_origin(kind) or kind for kind in kinds):
        if kind is float and number:
            return float(value)
        if kind is int and number and float(value).is_integer():
            return int(value)
        if kind is tuple and isinstance(value, list | tuple):
            return tuple(convert(part, int, name) for part in value)
        if kind in (bool, str, NoneType) and isinstance(value, kind):
            return value
        if kind is str and (value is None or value is False):
            return "" if value is None else "no"  # YAML reads a plain no as False
    readable = wanted.__name__ if isinstance(wanted, type) else str(wanted)
    raise ValueError(f"{name} wants {readable}; got {value!r}")
