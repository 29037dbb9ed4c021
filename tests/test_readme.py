"""The README's Python blocks run, in order, as a newcomer would paste them, on small models."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.tiny_models import photographs, tiny_generator, tiny_tokenizer

from titok_fast import ImageBert, TiTok, TiTokPipeline
from titok_fast.cli.main import build_parser
from titok_fast.training.recipe.recipe import read_recipe

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from skimage import data

    tokenizer, generator = tiny_tokenizer(), tiny_generator()
    pipe = TiTokPipeline(tokenizer, generator)
    asked: list[Any] = []

    def loads(result: object) -> Any:
        def load(*args: Any, **kwargs: Any) -> object:
            asked.append((args, kwargs))
            return result

        return load

    monkeypatch.setattr(TiTokPipeline, "from_pretrained", loads(pipe))
    monkeypatch.setattr(TiTok, "from_pretrained", loads(tokenizer))
    monkeypatch.setattr(ImageBert, "from_pretrained", loads(generator))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(data.astronaut()).save("photo.jpg")
    names: dict[str, Any] = {"images": photographs(32), "labels": torch.tensor([1, 7, 282])}
    found = blocks("python")
    assert len(found) == 5
    for block in found:
        exec(compile(block, "README.md", "exec"), names)
    assert (names["ids"].shape, names["pixels"].shape) == ((3, 8), (3, 3, 32, 32))
    assert names["codes"].shape == (1000,)
    assert Image.open("back.png").size == Image.open("goldfish.png").size == (32, 32)
    assert asked[0] == (("titok-l-32",), {"device": "cpu"})


def test_commands_parse() -> None:
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("titok-fast ")]
    assert {command[0] for command in commands} == {
        "sample", "tokenize", "detokenize", "reconstruct", "info", "train", "pretokenize",
        "convert", "eval",
    }  # fmt: skip
    for command in commands:
        if command[-1] == "--help":
            with pytest.raises(SystemExit, match="0"):
                build_parser(command[0]).parse_args(command)
            continue
        args = build_parser(command[0]).parse_args(command)
        if command[0] == "train":
            read_recipe(Path(__file__).parents[1] / args.recipe, args.overrides)


def test_every_file_it_names_exists() -> None:
    root = Path(__file__).parents[1]
    package = [p.name for p in root.glob("titok_fast/*.py")]
    for name in re.findall(r"`((?:bench|tests|kernels|titok_fast|recipes)/[\w./]*)`", README):
        assert (root / name).exists(), name
    for name in re.findall(r"`([a-z_]+\.py)`", README):
        assert name in package, name
