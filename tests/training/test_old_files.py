"""Files that commit daa1696 wrote are still read: a checkpoint, token shards, files of ids.

A tiny generator was trained there for 6 updates on `tokens`; `run` has its checkpoint of update 4
and its whole log.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.tiny_runs import ALONE, K, N

from titok_fast.data.token_shards import TokenSource
from titok_fast.io.token_files import read_ids
from titok_fast.training.logs import read_log
from titok_fast.training.loop import train
from titok_fast.training.recipe.recipe import read_recipe

FILES = Path(__file__).parent / "files_daa1696"
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_checkpoint_resumes_where_the_old_code_went_on(tmp_path: Path) -> None:
    shutil.copytree(FILES / "run", tmp_path / "run")
    paths = {
        "experiment.output_dir": tmp_path / "run",
        "dataset.params.train_shards_path_or_url": FILES / "tokens",
    }
    recipe = read_recipe(FILES / "recipe.json", [f"{key}={path}" for key, path in paths.items()])
    assert "6 updates done" in train(recipe, ALONE, bar=False)
    old, new = (read_log(folder / "run" / "log.jsonl") for folder in (FILES, tmp_path))
    assert new[:4] == old[:4]
    assert [line["step"] for line in new] == [1, 2, 3, 4, 5, 6]
    for was, now in zip(old[4:], new[4:], strict=True):
        assert was.keys() == now.keys()
        for name in ("loss", "grad_norm", "accuracy", "lr", "epoch", "bad_steps"):
            assert now[name] == pytest.approx(was[name], rel=1e-5), name


def test_token_shards_and_files_of_ids_hold_the_same_tokens() -> None:
    source = TokenSource(FILES / "tokens", classes=3)
    assert source.tokens.shape == (24, K)
    assert source.about["codebook_size"] == N
    assert source.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert len(np.unique(source.tokens)) > 3
    for suffix in ("npz", "json"):
        found = read_ids(FILES / f"ids.{suffix}")  # of the pictures of classes 0 and 1
        assert np.array_equal(found.ids, source.tokens[:16])
        assert found.codebook_size == N
        assert found.files[0] == "pictures/0/0.png"
