"""Many images from one or more processes: the same bytes whoever draws, resumes or dies."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_models import (
    rebuilt,
    tiny_generator_config,
    tiny_tokenizer,
    tiny_tokenizer_config,
)

from titok_fast import ImageBert, SamplingConfig, TiTokPipeline
from titok_fast.cli import main as cli
from titok_fast.io.npz import write_archive
from titok_fast.io.sample_folder import RawFolder
from titok_fast.presets import PRESETS, Preset
from titok_fast.sampling.unmask import sample_seeds

pytestmark = pytest.mark.usefixtures("one_thread_for_all")  # as torchrun sets it
NUM, CLASSES = 20, 5
GENERATOR = replace(tiny_generator_config(), condition_num_classes=CLASSES)
NAMES = [*(f"{i:06d}_{i % CLASSES}.png" for i in range(NUM)), "manifest.json"]
AGAIN = "images written so far stay; run the same command again to draw the rest"


def main(arguments: list[str]) -> int:
    return cli.main(["sample", *arguments])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    rebuilt(ImageBert(GENERATOR)).save_pretrained(folder / "generator")
    torch.manual_seed(1)
    ImageBert(GENERATOR).save_pretrained(folder / "other")
    return folder


@pytest.fixture(scope="module")
def wanted(weights: Path) -> np.ndarray:
    pipe = TiTokPipeline.from_pretrained(
        tokenizer=str(weights / "tokenizer"), generator=str(weights / "generator")
    )
    labels, seeds = torch.arange(NUM) % CLASSES, sample_seeds(7, NUM)
    pixels = pipe(labels, seeds=seeds, batch_size=NUM, output="numpy", num_sample_steps=4)
    assert isinstance(pixels, np.ndarray)
    assert len({picture.tobytes() for picture in pixels}) == NUM
    return pixels


def options(weights: Path, out: Path, *more: object) -> list[str]:
    models = [f"--tokenizer={weights / 'tokenizer'}", f"--generator={weights / 'generator'}"]
    run = [f"--out={out}", f"--count={NUM}", "--seed=7", "--steps=4", "--device=cpu", "--quiet"]
    return [*models, *run, *map(str, more)]


def torchrun(arguments: list[str], *program: str) -> "subprocess.Popen[str]":
    """Two ranks of `titok-fast sample`."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    return process([*start, *(program or ("-m", "titok_fast")), "sample", *arguments])


def free_port() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return str(unused.getsockname()[1])


def process(command: list[str], **environment: str) -> "subprocess.Popen[str]":
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    own |= {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=own)


def pictures(folder: Path) -> np.ndarray:
    """All PNG files of a folder, which must hold them and the manifest and nothing else."""
    names = sorted(path.name for path in folder.iterdir())
    count = len(names) - 1
    assert names == [*(f"{i:06d}_{i % CLASSES}.png" for i in range(count)), "manifest.json"]
    return np.stack([np.asarray(Image.open(folder / name)) for name in names[:-1]])


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> inode and time of each visible file: a file written again gets others."""
    found = [(path.name, path.stat()) for path in folder.glob("[!.]*")]
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}


def test_two_ranks_and_another_batch_size_give_the_same_bytes(
    tmp_path: Path, weights: Path, wanted: np.ndarray
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--batch-size=3", f"--npz={tmp_path / 'two.npz'}", f"--grid={tmp_path / 'two.png'}"]
    process = torchrun(options(weights, two, *more))
    assert main(options(weights, one, f"--npz={tmp_path / 'one.npz'}")) == 0
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert np.array_equal(pictures(one), wanted)
    for name in NAMES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert np.asarray(Image.open(tmp_path / "two.png")).shape == (4 * 34 + 2, 5 * 34 + 2, 3)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_killed_rank_ends_the_run_and_a_rerun_draws_the_rest(tmp_path: Path, weights: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    slow = ["--count=10", "--steps=250"]  # long enough to be in the middle of
    process = torchrun(options(weights, out, *slow, "--batch-size=1"))
    try:
        wait_for(lambda: len(list(out.glob("[!.]*.png"))) >= 2, process)
        os.kill(rank_of(process.pid, 1), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    before = stamps(out)
    left = 10 - (len(before) - 1)
    assert 0 < left <= 8
    assert "titok-fast: rank 0: interrupted; " in errors
    assert f"of 10 images are missing in {out}; {AGAIN}" in errors
    assert main(options(weights, out, *slow)) == 0
    assert before.items() <= stamps(out).items()  # nothing was drawn twice
    assert main(options(weights, whole, *slow)) == 0
    assert np.array_equal(pictures(out), pictures(whole))


def test_rank_without_a_launcher_says_what_is_missing(tmp_path: Path, weights: Path) -> None:
    """Such as mpirun without abort: rank 0 finishes its pieces, and names those of the dead."""
    out = tmp_path / "out"
    slow = options(weights, out, "--count=10", "--steps=250", "--batch-size=1")
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "titok_fast", "sample", *slow]
    ranks = [process(command, RANK=str(rank), **where) for rank in range(2)]
    try:
        wait_for(lambda: (out / "000001_1.png").exists(), ranks[1])
        ranks[1].kill()
        _, errors = ranks[0].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode == 2, errors
    assert "titok-fast: rank 0: error: another process is gone; " in errors
    assert f"of 10 images are missing in {out}. {AGAIN}" in errors
    there = {path.name for path in out.glob("[!.]*.png")}
    assert {f"{i:06d}_{i % CLASSES}.png" for i in range(0, 10, 2)} <= there
    before = stamps(out)
    assert main(slow) == 0
    assert before.items() <= stamps(out).items()
    assert len(pictures(out)) == 10


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)


def rank_of(launcher: int, rank: int) -> int:
    """Process id of a rank among a launcher's children."""
    for thread in Path(f"/proc/{launcher}/task").iterdir():
        for child in (thread / "children").read_text().split():
            if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
                return int(child)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.parametrize("batch", [3, 8])
def test_holes_are_filled_and_the_rest_left_alone(
    tmp_path: Path, weights: Path, wanted: np.ndarray, batch: int
) -> None:
    arguments = options(weights, tmp_path, f"--batch-size={batch}")
    assert main(arguments) == 0
    for i in (0, 4, 5, 19):
        (tmp_path / NAMES[i]).unlink()
    (tmp_path / ".000004_4.png.k1ll3d.png").write_bytes(b"half")  # as a killed writer leaves it
    before = stamps(tmp_path)
    assert main(arguments) == 0
    assert before.items() <= stamps(tmp_path).items()
    assert np.array_equal(pictures(tmp_path), wanted)


def test_nothing_to_draw(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, npz = tmp_path / "out", tmp_path / "new" / "all.npz"
    assert main(options(weights, out)) == 0
    before = stamps(out)
    assert main(options(weights, out)) == 0
    assert main(options(weights, out, f"--npz={npz}")) == 0  # the archive may be asked for later
    assert np.array_equal(np.load(npz)["arr_0"], pictures(out))
    written = stamps(npz.parent)
    assert main(options(weights, out, f"--npz={npz}")) == 0
    assert (stamps(out), stamps(npz.parent)) == (before, written)
    assert capsys.readouterr().out.splitlines() == [
        f"{NUM} images in {out}",
        f"{NUM} images in {out}, {NUM} of them from before",
        *[f"{NUM} images in {out} and {npz}, {NUM} of them from before"] * 2,
    ]


def test_archive_without_png_files(
    tmp_path: Path, weights: Path, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    npz, parts = tmp_path / "all.npz", tmp_path / "all.npz.parts"
    arguments = [*options(weights, tmp_path, f"--npz={npz}")]
    arguments.remove(f"--out={tmp_path}")
    write = RawFolder.write

    def fail_late(store: RawFolder, indices: np.ndarray, pixels: np.ndarray) -> None:
        if indices[0] >= 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(store, indices, pixels)

    monkeypatch.setattr(RawFolder, "write", fail_late)
    assert main([*arguments, "--batch-size=4"]) == 2
    monkeypatch.setattr(RawFolder, "write", write)
    runs = ["000000-000004.u8", "000004-000008.u8", "000008-000012.u8"]
    assert sorted(path.name for path in parts.iterdir()) == [*runs, "manifest.json"]
    assert not npz.exists()
    (parts / runs[1]).write_bytes(b"cut short by a copy")
    assert main([*arguments, "--batch-size=5"]) == 0
    with np.load(npz) as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["all.npz"]
    before = stamps(tmp_path)
    assert main(arguments) == 0  # the archive itself says that all is done
    assert stamps(tmp_path) == before
    assert main([*arguments, "--force"]) == 0
    assert stamps(tmp_path) != before
    assert np.array_equal(np.load(npz)["arr_0"], wanted)


def test_raw_runs_that_overlap_count_once(tmp_path: Path) -> None:
    store = RawFolder(tmp_path, 2, np.zeros(8, np.int64))
    pixels = np.arange(8 * 12, dtype=np.uint8).reshape(8, 2, 2, 3)
    for indices in ([0, 1, 2, 5], [1, 2, 3], [4, 5, 6, 7]):
        store.write(np.array(indices), pixels[indices])
    assert store.done().all()
    assert np.array_equal(np.stack(list(store.read())), pixels)
    (tmp_path / "000001-000004.u8").unlink()
    assert store.done().tolist() == [True] * 3 + [False] + [True] * 4
    with pytest.raises(FileNotFoundError, match="lacks image 3"):
        list(store.read())


def test_damaged_picture_is_named_and_leaves_no_archive(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, npz = tmp_path / "out", tmp_path / "all.npz"
    assert main(options(weights, out)) == 0
    Image.new("RGB", (16, 16)).save(out / NAMES[3])
    assert main(options(weights, out, f"--npz={npz}")) == 2
    assert "000003_3.png wants 32 x 32 pixels" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_archive_takes_the_memory_of_a_few_pictures(tmp_path: Path) -> None:
    pictures = (np.full((256, 256, 3), i, np.uint8) for i in range(100))  # 20 MB
    tracemalloc.start()
    write_archive(tmp_path / "a.npz", pictures, 256, {"num": 100}, lambda count: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    with np.load(tmp_path / "a.npz") as archive:
        assert archive["arr_0"][:, 0, 0, 0].tolist() == list(range(100))
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (["--seed=8"], "seed was 7, now 8"),
        (["--steps=5", "--guidance=1"], "guidance_scale was 3.0, now 1.0; sampling.num_sample_s"),
        (["--annealing"], "sampling.softmax_temperature_annealing was False, now True"),
        (["--count=25"], "num was 20, now 25"),
        (["--dtype=bfloat16"], "dtype was 'float32', now 'bfloat16'"),
        (["--generator={other}"], "weights_sha256 was '"),
        (["--labels=1,2"], "classes was 5, now None; labels was None, now [1, 2]"),
    ],
)
def test_other_settings_are_refused_by_name(
    begun: Path, weights: Path, capsys: pytest.CaptureFixture[str], change: list[str], phrase: str
) -> None:
    before = stamps(begun)
    change = [text.format(other=weights / "other") for text in change]
    assert main(options(weights, begun, *change)) == 2
    message = capsys.readouterr().err
    assert f"{begun} was begun with other settings: " in message
    assert phrase in message
    assert stamps(begun) == before


def test_force_begins_anew(tmp_path: Path, weights: Path) -> None:
    assert main(options(weights, tmp_path)) == 0
    first = pictures(tmp_path)
    assert main(options(weights, tmp_path, "--seed=8", "--count=10", "--force")) == 0
    assert len(pictures(tmp_path)) == 10
    assert not np.array_equal(pictures(tmp_path), first[:10])


def test_labels_take_turns(tmp_path: Path, weights: Path, wanted: np.ndarray) -> None:
    assert main(options(weights, tmp_path, "--labels=0,1,2,3,4,0,1", "--count=9")) == 0
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == [f"{i:06d}_{label}.png" for i, label in enumerate([0, 1, 2, 3, 4, 0, 1, 0, 1])]
    made = np.stack([np.asarray(Image.open(tmp_path / name)) for name in names])
    assert np.array_equal(made[:7], wanted[:7])
    assert not np.array_equal(made[7:], wanted[7:9])


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    out = tmp_path_factory.mktemp("begun")
    assert main(options(weights, out)) == 0
    (out / NAMES[2]).unlink()
    return out


def test_weights_are_known_by_content(begun: Path, weights: Path, tmp_path: Path) -> None:
    rebuilt(ImageBert(GENERATOR)).save_pretrained(tmp_path / "moved")
    try:
        assert main(options(weights, begun, f"--generator={tmp_path / 'moved'}")) == 0
    finally:
        (begun / NAMES[2]).unlink()


def test_bad_requests(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("x")
    other.mkdir()
    (other / "000000.png").write_text("not ours")
    np.savez(tmp_path / "taken.npz", arr_0=np.zeros(3))
    cases = [
        ([f"--out={file}"], "File exists"),
        ([f"--out={file / 'below'}"], "Not a directory"),
        ([f"--out={other}"], "holds 000000.png but no manifest.json of an earlier run"),
        ([f"--npz={tmp_path / 'taken.npz'}"], "taken.npz exists and is not of this run"),
    ]
    for change, message in cases:
        assert main(options(weights, tmp_path / "out", *change)) == 2, change
        error = capsys.readouterr().err
        assert error.startswith("titok-fast: error: "), error
        assert message in error
    assert not list((tmp_path / "out").glob("*.png"))


def test_broken_manifest(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in (("{", "manifest.json is damaged"), ("[]", "wants a JSON object")):
        (tmp_path / "manifest.json").write_text(content)
        assert main(options(weights, tmp_path)) == 2
        assert message in capsys.readouterr().err


def test_random_weights_of_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingConfig(3, 2.0, "linear", softmax_temperature_annealing=True)
    monkeypatch.setitem(PRESETS, "tiny", Preset(tiny_tokenizer_config(), GENERATOR, sampling))
    monkeypatch.setitem(PRESETS, "tiny-vq", Preset(tiny_tokenizer_config("vq")))
    arguments = ["--random-weights", "--count=5", "--device=cpu", "--quiet", "--dtype=bfloat16"]
    assert main([*arguments, "--model=tiny", f"--out={tmp_path / 'a'}"]) == 0
    drawn = TiTokPipeline.random("tiny", dtype="bfloat16")(range(5), output="numpy")
    assert isinstance(drawn, np.ndarray)
    assert np.array_equal(pictures(tmp_path / "a"), drawn)
    assert main([*arguments, "--model=tiny-vq", f"--out={tmp_path / 'b'}"]) == 2


def test_rank_with_other_weights_is_refused(tmp_path: Path, weights: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "rank.py").write_text(
        "import os, sys; from titok_fast.cli.main import main\n"
        f"other = '--generator={weights / 'other'}'\n"
        "sys.exit(main(sys.argv[1:] + [other] * int(os.environ['RANK'])))\n"
    )
    run = torchrun(options(weights, out), str(tmp_path / "rank.py"))
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "rank 1: error: rank 1 differs from rank 0: weights_sha256 was " in errors


def test_nobody_to_join(
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rank = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (rank | {"MASTER_PORT": free_port()}).items():
        monkeypatch.setenv(name, value)
    assert main(options(weights, tmp_path, "--patience=1")) == 2
    error = capsys.readouterr().err
    assert "titok-fast: rank 1: error: the other processes cannot be reached" in error
    monkeypatch.delenv("MASTER_ADDR")
    assert main(options(weights, tmp_path)) == 2
    assert "MASTER_ADDR" in capsys.readouterr().err
