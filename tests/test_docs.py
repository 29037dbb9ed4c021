"""The documents: their code blocks run as a newcomer would paste them, and what they name exists.

The blocks of a document run in order, in one folder and one namespace, with the words that stand
there, on small models under the published names and on data made on the spot.
"""

import ast
import io
import re
import runpy
import shlex
import shutil
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from support.records import encoded, write_fashion, write_tar
from support.tiny_models import rebuilt

from titok_fast import (
    GeneratorConfig,
    ImageBert,
    SamplingConfig,
    TiTok,
    TokenizerConfig,
    VQGANConfig,
)
from titok_fast.cli.main import main
from titok_fast.presets import PRESETS, Preset
from titok_fast.training import loop

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").rglob("*.md")))
CARDS = tuple(ROOT / "titok_fast" / name / "README.md" for name in ("recipes", "weights"))
# page: package of an extra that its blocks import
EXTRAS = {
    "docs/evaluation.md": "torchmetrics",
    "docs/kernels.md": "vector_quantize_pytorch",
    "docs/results/paper_trends.md": "matplotlib",
}
LANGUAGES = {"bash", "python", "diff", "text"}
COMMANDS = (
    *("sample", "tokenize", "detokenize", "reconstruct", "info"),
    *("train", "pretokenize", "convert", "eval"),
)
RESULTS = (
    *("headline", "fast-modes", "training-minutes"),
    *("fashion", "sampling", "reconstruction", "waterfall", "first_call", "scaling", "cost-model"),
    *("peers", "kernels", "recipe-times", "training", "paper-trends"),
)

# shell lines that do not run, by how they begin, and why
NOT_RUN = {
    "pip ": "installs packages: CI does that",
    "pytest": "is this very run",
    "TITOK_UPSTREAM=": "wants a checkout of upstream",
}
# those of which only the words are checked, by a part of them, and why
WORDS_ONLY = {
    "python bench/": "benchmarks have tests of their own, on small models",
    "inception=": "Inception's weights are in no package",
}
# images and epochs of a real run, and what stands in for them
SMALLER = {"50000": "20", "100": "20", "90": "12"}
SHARDS = ("{0000..0252}", "{0000..0000}")
SPLITS = ("train", "eval")
TRAIN = loop.train

TOKENIZER = TokenizerConfig(
    vit_enc_model_size=(64, 2, 2),
    vit_dec_model_size=(64, 2, 2),
    pixel=VQGANConfig(32, (1, 1, 1, 1, 1), num_res_blocks=1, z_channels=16, codebook_size=48),
)
GENERATOR = GeneratorConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
)


@dataclass(frozen=True)
class Block:
    """A fenced block; `source` is PATH:FUNCTION where the block shows a function of a file."""

    language: str
    code: str
    source: str | None


def blocks_of(page: Path) -> Iterator[Block]:
    fence = r"(?:<!-- source:(\S+) -->\n\n)?^( *)```(\w*)\n(.*?)^\2```$"
    text = page.read_text(encoding="utf-8")
    for source, _, language, code in re.findall(fence, text, flags=re.S | re.M):
        yield Block(language, dedent(code), source or None)


def shell_lines(page: Path) -> list[str]:
    blocks = [block.code for block in blocks_of(page) if block.language == "bash"]
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents take for granted: folders, images, data, weights of published names."""
    from skimage import data

    folder = tmp_path_factory.mktemp("docs")
    (folder / "photos").mkdir()
    Image.fromarray(data.astronaut()).save(folder / "photo.jpg")
    for name, image in (("cat", data.chelsea()), ("coffee", data.coffee())):
        Image.fromarray(image).save(folder / "photos" / f"{name}.png")
    tokenizer, generator = rebuilt(TiTok(TOKENIZER)), rebuilt(ImageBert(GENERATOR))
    tokenizer.save_pretrained(folder / "yucornetto" / "tokenizer_titok_l32_imagenet")
    tokenizer.save_pretrained(folder / "l32" / "tokenizer")
    generator.save_pretrained(folder / "l32" / "generator")
    weights = load_file(folder / "l32" / "generator" / "model.safetensors")
    torch.save(weights, folder / "generator_titok_l32.bin")
    OmegaConf.save(OmegaConf.create(GENERATOR.to_official()), folder / "titok_l32.yaml")
    (folder / "fashion").mkdir()
    write_fashion(folder / "fashion")
    members = [("0.png", encoded(data.coffee())), ("0.cls", b"7")]
    write_tar(folder / "imagenet-train-0000.tar", members)
    shutil.copytree(ROOT / "bench" / "fashion-16", folder / "bench" / "fashion-16")
    (folder / "bench" / "results").mkdir()
    (folder / "PATH" / "modeling").mkdir(parents=True)  # enough to pass for a clone of upstream
    (folder / "PATH" / "modeling" / "titok.py").touch()
    return folder


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    sampling = SamplingConfig(num_sample_steps=3, guidance_scale=2.0)
    tiny = Preset(TOKENIZER, GENERATOR, sampling, folder=tmp_path / "l32")
    monkeypatch.setitem(PRESETS, "titok-l-32", tiny)
    monkeypatch.setattr(loop, "train", train_small)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train_small(recipe: Any, *args: Any, **kwargs: Any) -> str:
    """Train the recipes of fashion; those of ImageNet have been read, and that is all."""
    if "fashion" in recipe.experiment.output_dir:
        return TRAIN(recipe, *args, **kwargs)
    return "not trained: too large for a test"


def run_blocks(page: Path, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks_of(page):
        if block.language == "python" and block.source is None:
            exec(compile(block.code, str(page), "exec"), names)
            assert_comments_true(block.code, names)
        if block.language == "bash":
            for line in block.code.splitlines():
                run_line(line, workspace, capsys)


def run_line(line: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in line.split("  #")[0].split("&&"):
        command = part.strip()
        if command.startswith(tuple(NOT_RUN)):
            continue
        if any(word in command for word in WORDS_ONLY):
            assert_words_known(command, capsys)
            continue
        words = shrink(program_words(command), workspace)
        try:
            status = main(words)
        except SystemExit as end:  # --help
            status = int(end.code or 0)
        assert status == 0, f"{command}: {capsys.readouterr().err}"


def program_words(command: str) -> list[str]:
    """The words after `titok-fast`, also where torchrun starts it: here it is one process."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
        assert words[0] == "titok_fast", command
    else:
        assert words[0] == "titok-fast", f"a line that no rule covers: {command}"
    return words[1:]


def shrink(words: list[str], workspace: Path) -> list[str]:
    """The same command on less data and for fewer updates."""
    data = workspace / "fashion"
    if "50000" in words:  # a multiple of titok-l-32's 1000 classes, none of 20
        words = [word.replace("titok-l-32", "fashion-16") for word in words]
    words = [SMALLER.get(word, word).replace(*SHARDS) for word in words]
    words = [f"{word}:{data}" if word.startswith("fashion-mnist:") else word for word in words]
    if words[0] == "pretokenize" and "fashion-mnist" in words:
        words += ["--path", str(data)]
    if words[0] == "train" and words[1].startswith("fashion/"):
        words += ["training.max_train_steps=2", "training.per_gpu_batch_size=4"]
        if words[1] != "fashion/generator":  # which reads tokens
            words += [f"dataset.params.{part}_shards_path_or_url={data}" for part in SPLITS]
    return words


def assert_words_known(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Values are accepted, and every option stands in the program's help."""
    words = shlex.split(command)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        ask_for_help(words)
    said = capsys.readouterr()
    assert not end.value.code, f"{command}: {said.err}"
    for option in [word for word in words if word.startswith("--")]:
        assert re.search(rf"{option}\b", said.out), f"{command}: no option {option}"


def ask_for_help(words: list[str]) -> None:
    if words[0] != "python":
        main([*words[1:], "--help"])
        return
    script = ROOT / words[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [*words[1:], "--help"])
        patch.syspath_prepend(str(script.parent))
        runpy.run_path(str(script), run_name="__main__")


def assert_comments_true(code: str, names: dict[str, Any]) -> None:
    """Shapes and sizes that stand behind an assignment are those of its result."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    for node in ast.parse(code).body:
        comment = comments.get(node.end_lineno or 0, "")
        if not isinstance(node, ast.Assign) or not comment:
            continue
        target = node.targets[0]
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
        shapes = re.findall(r"\((\d+(?:, \d+)*),?\)", comment)
        for name, shape in zip(targets, shapes, strict=False):
            value = names[name.id] if isinstance(name, ast.Name) else None
            assert tuple(value.shape) == tuple(map(int, shape.split(", "))), ast.unparse(node)
        for width, height in re.findall(r"(\d+) x (\d+)$", comment):
            assert {image.size for image in names[targets[0].id]} == {(int(width), int(height))}


def pages_to_run(*, extras: bool) -> list[Any]:
    pages = [(page, str(page.relative_to(ROOT))) for page in (*PAGES[1:], *CARDS)]
    return [pytest.param(page, id=name) for page, name in pages if (name in EXTRAS) == extras]


def test_the_readme_runs(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_blocks(README, workspace, capsys)
    columns, rows = np.array(Image.open("samples.png").size) // 32
    assert columns * rows >= 10  # one image of each class
    assert Image.open("back.png").size == Image.open("goldfish.png").size == (256, 256)


@pytest.mark.parametrize("page", pages_to_run(extras=False))
def test_blocks_run(page: Path, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_blocks(page, workspace, capsys)


@pytest.mark.parametrize("page", pages_to_run(extras=True))
def test_extra_blocks_run(page: Path, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(EXTRAS[str(page.relative_to(ROOT))])
    run_blocks(page, workspace, capsys)


def test_all_commands_are_documented() -> None:
    lines = [line for page in PAGES for line in shell_lines(page)]
    for command in COMMANDS:
        assert any(f"titok-fast {command}" in line for line in lines), command
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for script in (ROOT / "bench").glob("*.py"):
        assert f"python bench/{script.name}" in text, script.name


def test_the_main_job_and_the_tests_are_one_line_each() -> None:
    lines = shell_lines(README)
    assert "pip install -e . && python bench/sampling.py" in lines
    assert "pip install -e '.[test]' && pytest" in lines


def test_every_block_has_a_rule() -> None:
    for page in (*PAGES, *CARDS):
        text = page.read_text(encoding="utf-8")
        blocks = list(blocks_of(page))
        assert 2 * len(blocks) == len(re.findall(r"^ *```", text, flags=re.M)), page
        assert {block.language for block in blocks} <= LANGUAGES, page


EXCERPTS = [
    pytest.param(block.source, block.code, id=block.source)
    for page in PAGES
    for block in blocks_of(page)
    if block.source
]


@pytest.mark.parametrize(("source", "code"), EXCERPTS)
def test_shown_functions_are_those_of_the_source(source: str, code: str) -> None:
    path, _, name = source.partition(":")
    assert code == without_docstring((ROOT / path).read_text(encoding="utf-8"), name)


def test_the_loop_is_shown() -> None:
    assert "titok_fast/sampling/unmask.py:unmask" in [case.values[0] for case in EXCERPTS]


def without_docstring(source: str, name: str) -> str:
    """A function of a file as text, comments included."""
    node = next(n for n in ast.parse(source).body if getattr(n, "name", "") == name)
    assert isinstance(node, ast.FunctionDef)
    first = min([node.lineno, *[d.lineno for d in node.decorator_list]]) - 1
    lines = source.splitlines(keepends=True)
    if ast.get_docstring(node) is None:
        return "".join(lines[first : node.end_lineno])
    docstring = node.body[0]
    return "".join(
        lines[first : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    )


def test_readme_is_short() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 180
    first = next(i for i, line in enumerate(lines) if line.startswith("## Models"))
    assert first <= 65  # the first screen: three things that run


def test_each_result_has_one_place() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    opened = re.findall(r"<!-- results:(\S+) -->", text)
    closed = re.findall(r"<!-- /results:(\S+) -->", text)
    assert sorted(opened) == sorted(closed) == sorted(RESULTS)


LINKS = [
    pytest.param(page, target, id=f"{page.relative_to(ROOT)}->{target}")
    for page in (*PAGES, *CARDS, ROOT / "CHANGELOG.md")
    if page.is_file()
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    if not target.startswith("http")
]


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_every_link_leads_somewhere(page: Path, target: str) -> None:
    path, _, heading = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    assert there.exists()
    if heading:
        titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), flags=re.M)
        assert heading in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "design.md"], ids=["README", "design"])
def test_the_tree_is_there(page: Path) -> None:
    (tree,) = (b.code for b in blocks_of(page) if b.code.startswith("titok_fast/"))
    for line in tree.splitlines():
        start = re.match(r"(  )?((?:\w+(?:\.py|/) *)+)", line)
        assert start, line
        for name in start[2].split():
            assert (ROOT / ("titok_fast" if start[1] else "") / name).exists(), name


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name == "README.md" or f"]({name})" in index, name


def test_every_file_that_is_named_exists() -> None:
    for page in (*PAGES, *CARDS):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:bench|tests|kernels|titok_fast)/[\w./-]*)`", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
