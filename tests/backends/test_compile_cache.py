"""Where compiled code goes: the user's cache folder, the user's own choice, or torch's."""

import json
import os
import warnings
from pathlib import Path

import pytest
from support.processes import python
from support.tiny_models import tiny_generator, tiny_tokenizer
from torch._inductor.runtime.cache_dir_utils import cache_dir

from titok_fast import TiTokPipeline
from titok_fast.backends import compile_cache
from titok_fast.backends.compile_cache import VARIABLE, use_cache_dir
from titok_fast.processor.description import instruction_sets


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No choice made yet, and a home that is empty."""
    monkeypatch.setenv(VARIABLE, "")  # for monkeypatch to put back what it was
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def test_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = use_cache_dir()
    assert place is not None
    assert place.parent == tmp_path / "home" / ".cache" / "titok_fast" / "inductor"
    assert place.is_dir()
    assert place.stat().st_mode & 0o077 == 0  # what lies there is run
    assert list(place.iterdir()) == []
    assert cache_dir() == str(place)  # torch agrees
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert use_cache_dir() == tmp_path / "cache" / "titok_fast" / "inductor" / place.name
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert use_cache_dir() == place


def test_processors_do_not_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = set()
    for limit in ("AVX", "AVX2"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        places.add(use_cache_dir(tmp_path))
        monkeypatch.delenv(VARIABLE)
    assert len(places) == 1 + ("avx2" in instruction_sets())


def test_the_users_own_choice_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_cache_dir() == tmp_path / "mine"
    with pytest.warns(UserWarning, match=rf"cache_dir .*other has no effect: {VARIABLE} is .*mine"):
        assert use_cache_dir(tmp_path / "other") == tmp_path / "mine"
    assert os.environ[VARIABLE] == str(tmp_path / "mine")
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "home").exists()


def test_a_process_keeps_to_its_first_folder(tmp_path: Path) -> None:
    first = use_cache_dir(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_cache_dir(tmp_path / "a") == use_cache_dir() == first
    with pytest.warns(UserWarning, match="no effect"):
        assert use_cache_dir(tmp_path / "b") == first


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="torch's temporary folder, which a reboot .* cache_dir"):
        assert use_cache_dir(tmp_path / "file") is None
    assert VARIABLE not in os.environ

    def no_room(dir: Path) -> None:
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setattr(compile_cache.tempfile, "TemporaryFile", no_room)
    with pytest.warns(UserWarning, match="Read-only file system"):
        assert use_cache_dir() is None
    assert VARIABLE not in os.environ

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(UserWarning, match="Could not determine home"):
        assert use_cache_dir() is None


def test_only_compiling_asks_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pipe() -> TiTokPipeline:
        return TiTokPipeline(tiny_tokenizer(), tiny_generator())

    pipe().compile()
    with pytest.raises(ValueError, match="unknown techniques"):
        pipe().compile(["int8", "fast"], cache_dir=tmp_path / "a")
    assert VARIABLE not in os.environ
    pipe().compile(["products", "int8"], cache_dir=tmp_path / "a")
    assert Path(os.environ[VARIABLE]).parent == tmp_path / "a"
    with pytest.warns(UserWarning, match="no effect") as caught:
        pipe().compile(["products", "int8"], cache_dir=tmp_path / "b")
    assert [Path(w.filename) for w in caught] == [Path(__file__)]  # it names the caller


TWICE = """
import sys
sys.path.insert(0, {tests!r})
import json
from support.tiny_models import tiny_generator, tiny_tokenizer
from titok_fast import TiTokPipeline
pipe = TiTokPipeline(tiny_tokenizer(), tiny_generator())
pipe.compile(["products", "int8"], cache_dir=sys.argv[1])
ids = pipe.sample_tokens([1, 2, 3], seed=5).tolist()
print(json.dumps([ids, "torch._dynamo" in sys.modules]))
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    code = TWICE.format(tests=str(Path(__file__).parents[1]))
    results, libraries = [], []
    for compiler in ("g++", "no-such-compiler"):
        done = python("-W", "error::UserWarning", "-c", code, str(tmp_path), CXX=compiler)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
        libraries.append([(p.name, p.stat().st_mtime_ns) for p in tmp_path.rglob("*.so")])
    assert results[0] == results[1]
    assert not results[0][1]  # importing Dynamo takes two seconds
    assert len(libraries[0]) == 1
    assert libraries[0] == libraries[1]
