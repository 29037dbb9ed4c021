"""Scripts of bench/ for their tests: that folder is no package, its files are neighbours."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.tiny_models import tiny_generator_config, tiny_tokenizer_config

from titok_fast import PRESETS, GeneratorConfig, SamplingConfig, TokenizerConfig
from titok_fast.presets import Preset

BENCH = Path(__file__).resolve().parents[2] / "bench"
SETTINGS = SamplingConfig(3, 4.5, "linear", 3.0, 9.5, True)


def scripts(*names: str) -> list[ModuleType]:
    """The scripts of these names, as they import each other."""
    with _neighbours():
        return [importlib.import_module(name) for name in names]


def script_apart(name: str) -> ModuleType:
    """A script under a name of its own, `bench_<name>`, and apart from what others import."""
    spec = importlib.util.spec_from_file_location(
        f"bench_{name}", BENCH / f"{name.replace('.', '/')}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _neighbours():
        spec.loader.exec_module(module)
    return module


@contextmanager
def _neighbours() -> Iterator[None]:
    sys.path.insert(0, str(BENCH))
    try:
        yield
    finally:
        sys.path.remove(str(BENCH))


def add_tiny(
    monkeypatch: pytest.MonkeyPatch, options: ModuleType, sampling: SamplingConfig = SETTINGS
) -> None:
    """A preset "tiny" for a test, and a device whose peak rate is known without measuring it."""
    tiny = Preset(tiny_tokenizer_config(), tiny_generator_config(), sampling)
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    monkeypatch.setattr(options, "matmul_peak", lambda device, dtype: 1e12)


def small_official(sampling: SamplingConfig | None) -> Preset:
    """The smallest that upstream's classes can be: 64 px, small ViT, and its one pixel decoder."""
    tokenizer = TokenizerConfig(
        num_latent_tokens=8, vit_enc_model_size="small", vit_dec_model_size="small", crop_size=64
    )
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    generator = GeneratorConfig(intermediate_size=128, image_seq_len=8, **shape)
    return Preset(tokenizer, generator, sampling)


def refused(
    capsys: pytest.CaptureFixture[str], script: ModuleType, words: Sequence[str], message: str
) -> None:
    """Assert that a script ends with a usage error that holds `message`."""
    with pytest.raises(SystemExit) as stopped:
        script.main([*words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def recorded(script: ModuleType, path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit status and record of a script that measures on the CPU in two rounds."""
    status = script.main(["--device", "cpu", "--repeats", "2", "--json", str(path), *words])
    return status, json.loads(path.read_text())


def cells(text: str, *wanted: str) -> list[dict[str, str]]:
    """Rows of the first table of `text` that hold all of some words, by column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    split = [[text.strip() for text in line.strip("|").split("|")] for line in lines]
    rows = [dict(zip(split[0], row, strict=True)) for row in split[2:] if len(row) == len(split[0])]
    return [row for row in rows if all(word in row.values() for word in wanted)]
