"""Many pictures from one or more processes: the same bytes whoever draws, resumes or dies."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from support.tiny_models import (
    rebuilt,
    tiny_generator_config,
    tiny_tokenizer,
    tiny_tokenizer_config,
)

from titok_fast import ImageBert, SamplingConfig, TiTokPipeline
from titok_fast.cli.sample import follow, lead, main
from titok_fast.cli.sample_options import build_parser
from titok_fast.crew import Crew
from titok_fast.io.npz import write_archive
from titok_fast.io.sample_folder import PngFiles, RawFiles
from titok_fast.presets import PRESETS, Preset
from titok_fast.sampling.unmask import sample_seeds

pytestmark = pytest.mark.usefixtures("one_thread_for_all")  # as torchrun sets it
NUM, CLASSES = 20, 5
GENERATOR = replace(tiny_generator_config(), condition_num_classes=CLASSES)
NAMES = ["manifest.json", *(f"{i:06d}.png" for i in range(NUM))]


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
    """The pictures, as the pipeline draws them in one batch."""
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


def torchrun(ranks: int, arguments: list[str]) -> "subprocess.Popen[str]":
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command = [*start, "--standalone", "-m", "titok_fast.cli.sample", *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**environment, "OMP_NUM_THREADS": "1"}
    )


def pictures(folder: Path) -> np.ndarray:
    """All PNG files of a folder, which must hold them and the manifest and nothing else."""
    names = sorted(path.name for path in folder.iterdir())
    count = len(names) - 1
    assert names == [*(f"{i:06d}.png" for i in range(count)), "manifest.json"]
    return np.stack([np.asarray(Image.open(folder / name)) for name in names[:-1]])


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> inode and time of each visible file: a file written again gets others."""
    found = [(path.name, path.stat()) for path in folder.glob("[!.]*")]
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}


def test_two_ranks_and_another_batch_size_give_the_same_bytes(
    tmp_path: Path, weights: Path, wanted: np.ndarray
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    process = torchrun(2, options(weights, two, "--batch-size=3", f"--npz={tmp_path / 'two.npz'}"))
    assert main(options(weights, one, f"--npz={tmp_path / 'one.npz'}")) == 0
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert np.array_equal(pictures(one), wanted)
    for name in NAMES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_killed_rank_ends_the_run_and_a_rerun_draws_the_rest(tmp_path: Path, weights: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    slow = ["--count=10", "--steps=250"]  # long enough to be in the middle of
    process = torchrun(2, options(weights, out, *slow, "--batch-size=1"))
    try:
        wait_for(lambda: len(list(out.glob("[!.]*.png"))) >= 2, process)
        os.kill(rank_of(process.pid, 1), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "rank 0: stopped before the end. Pictures written so far stay: run the same" in errors
    before = stamps(out)
    assert 2 <= len(before) - 1 < 10
    assert main(options(weights, out, *slow)) == 0
    assert before.items() <= stamps(out).items()  # nothing was drawn twice
    assert main(options(weights, whole, *slow)) == 0
    assert np.array_equal(pictures(out), pictures(whole))


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
        (tmp_path / f"{i:06d}.png").unlink()
    (tmp_path / ".000004.png.k1ll3d.png").write_bytes(b"half")  # as a killed writer leaves it
    before = stamps(tmp_path)
    assert main(arguments) == 0
    assert before.items() <= stamps(tmp_path).items()
    assert np.array_equal(pictures(tmp_path), wanted)


def test_nothing_left_to_draw(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
        f"{NUM} pictures in {out}, 0 of them from before",
        f"{NUM} pictures in {out}, {NUM} of them from before",
        *[f"{NUM} pictures in {out} and {npz}, {NUM} of them from before"] * 2,
    ]


def test_archive_without_png_files(
    tmp_path: Path, weights: Path, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, npz = tmp_path / "out", tmp_path / "all.npz"
    arguments = options(weights, out, f"--npz={npz}", "--no-png")
    write = RawFiles.write

    def fail_late(album: RawFiles, indices: np.ndarray, pixels: np.ndarray) -> None:
        if indices[0] >= 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(album, indices, pixels)

    monkeypatch.setattr(RawFiles, "write", fail_late)
    assert main([*arguments, "--batch-size=4"]) == 2
    monkeypatch.setattr(RawFiles, "write", write)
    runs = ["000000-000004.u8", "000004-000008.u8", "000008-000012.u8"]
    assert sorted(path.name for path in out.iterdir()) == [*runs, "manifest.json"]
    assert not npz.exists()
    (out / runs[1]).write_bytes(b"cut short by a copy")
    assert main([*arguments, "--batch-size=5"]) == 0
    with np.load(npz) as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], wanted)
    assert [path.name for path in out.iterdir()] == ["manifest.json"]
    before = stamps(tmp_path)
    assert main(arguments) == 0  # the archive itself says that all is done
    assert stamps(tmp_path) == before
    npz.unlink()
    assert main(arguments) == 0
    assert np.array_equal(np.load(npz)["arr_0"], wanted)


def test_raw_runs_that_overlap_count_once(tmp_path: Path) -> None:
    album, pixels = RawFiles(tmp_path, 2), np.arange(8 * 12, dtype=np.uint8).reshape(8, 2, 2, 3)
    for indices in ([0, 1, 2, 5], [1, 2, 3], [4, 5, 6, 7]):
        album.write(np.array(indices), pixels[indices])
    assert album.done(8).all()
    assert np.array_equal(np.stack(list(album.read(8))), pixels)
    (tmp_path / "000001-000004.u8").unlink()
    assert album.done(8).tolist() == [True] * 3 + [False] + [True] * 4
    with pytest.raises(FileNotFoundError, match="lacks picture 3"):
        list(album.read(8))


def test_damaged_picture_is_named_and_leaves_no_archive(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, npz = tmp_path / "out", tmp_path / "all.npz"
    assert main(options(weights, out)) == 0
    Image.new("RGB", (16, 16)).save(out / "000003.png")
    assert main(options(weights, out, f"--npz={npz}")) == 2
    assert "000003.png wants 32 x 32 pixels" in capsys.readouterr().err
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
        (["--no-png", "--npz={out}.npz"], "files was 'png', now 'raw'"),
    ],
)  # fmt: skip
def test_other_settings_are_refused_by_name(
    begun: Path, weights: Path, capsys: pytest.CaptureFixture[str], change: list[str], phrase: str
) -> None:
    before = stamps(begun)
    change = [text.format(other=weights / "other", out=begun) for text in change]
    assert main(options(weights, begun, *change)) == 2
    message = capsys.readouterr().err
    assert f"{begun} was begun with other settings: " in message
    assert phrase in message
    assert stamps(begun) == before


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    out = tmp_path_factory.mktemp("begun")
    assert main(options(weights, out)) == 0
    (out / "000002.png").unlink()
    return out


def test_weights_are_known_by_content_and_not_by_place(
    begun: Path, weights: Path, tmp_path: Path
) -> None:
    rebuilt(ImageBert(GENERATOR)).save_pretrained(tmp_path / "moved")
    try:
        assert main(options(weights, begun, f"--generator={tmp_path / 'moved'}")) == 0
    finally:
        (begun / "000002.png").unlink()


def test_bad_requests(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("x")
    other.mkdir()
    (other / "000000.png").write_text("not ours")
    np.savez(tmp_path / "taken.npz", arr_0=np.zeros(3))
    cases = [
        (["--count=21"], "--count wants a multiple of the 5 classes, such as 25; got 21"),
        ([f"--out={file}"], "File exists"),
        ([f"--out={file / 'below'}"], "Not a directory"),
        ([f"--out={other}"], "holds 000000.png but no manifest.json of an earlier run"),
        ([f"--npz={tmp_path / 'taken.npz'}"], "taken.npz exists and is not of this run"),
        (["--npz=pictures.zip"], "--npz wants a name ending in .npz; got pictures.zip"),
        (["--no-png"], "--no-png wants --npz FILE"),
        (["--steps=0"], "num_sample_steps wants an integer from 1 to 1024; got 0"),
        (["--random-weights"], "--random-weights wants --model, and no other place of weights"),
        (["--generator="], "name a published model with --model, or --tokenizer and --generator"),
        ([f"--generator={tmp_path / 'nowhere'}"], "is neither a directory"),
    ]
    for change, message in cases:
        assert main(options(weights, tmp_path / "out", *change)) == 2, change
        error = capsys.readouterr().err
        assert error.startswith("\nsample_many: rank 0: error: "), error
        assert message in error
    assert not list((tmp_path / "out").glob("*.png"))


def test_damaged_manifest(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, message in (("{", "manifest.json is damaged"), ("[]", "wants a JSON object")):
        (tmp_path / "manifest.json").write_text(content)
        assert main(options(weights, tmp_path)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--count=0", "--batch-size=x", "--patience=nan", "--patience=0"]
)
def test_numbers_are_checked(option: str) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--out=x", option])


def test_random_weights_of_a_published_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    store = dist.HashStore()
    other = options(weights, tmp_path, f"--generator={weights / 'other'}")
    errors: list[BaseException] = []

    def second() -> None:
        try:
            with Crew(store, 1, 2) as crew:
                follow(build_parser().parse_args(other), crew)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    arguments = build_parser().parse_args(options(weights, tmp_path))
    dead = pytest.raises(ConnectionError, match=r"rank 1 has not answered for 1\.5 s and seems")
    with dead, Crew(store, 0, 2, patience_s=1.5) as crew:
        lead(arguments, crew)
    thread.join()
    assert "rank 1 differs from rank 0: weights_sha256 was " in str(errors[0])
    assert len(PngFiles(tmp_path, 32).done(NUM).nonzero()[0]) == NUM  # rank 0 drew its share too


def test_claims_are_given_out_once() -> None:
    store, taken = dist.HashStore(), []
    crews = [Crew(store, rank, 4) for rank in range(4)]

    def take(crew: Crew) -> None:
        for _ in range(50):
            taken.append(crew.claim())
            crew.report(2)

    threads = [threading.Thread(target=take, args=(crew,)) for crew in crews]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(200))
    assert crews[0].finished() == 400


def test_slow_rank_with_a_pulse_is_waited_for() -> None:
    store, polls = dist.HashStore(), []

    def work() -> None:
        with Crew(store, 1, 2, patience_s=1) as crew:
            time.sleep(2.5)
            crew.leave()

    thread = threading.Thread(target=work)
    thread.start()
    with Crew(store, 0, 2, patience_s=1) as crew:
        crew.wait_for_others(lambda: polls.append(0))
    thread.join()
    assert len(polls) > 5


def test_silent_leader_and_failed_leader_end_the_others() -> None:
    store = dist.HashStore()
    crew = Crew(store, 1, 2, patience_s=0.3)
    with pytest.raises(ConnectionError, match=r"rank 0 has not answered for 0\.3 s"):
        crew.plan()
    Crew(store, 0, 2).publish(None)
    with pytest.raises(ConnectionError, match="rank 0 could not start"):
        crew.plan()


def test_store_that_goes_away() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    with Crew(client, 1, 2, patience_s=1) as crew:
        assert crew.claim() == 0
        del server
        with pytest.raises(ConnectionError, match="rank 0 or its launcher has gone"):
            crew.claim()


def test_nobody_to_join(
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    free = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("MASTER_PORT", free)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert main(options(weights, tmp_path, "--patience=1")) == 2
    error = capsys.readouterr().err
    assert "sample_many: rank 1: error: the other processes cannot be reached" in error
    monkeypatch.delenv("MASTER_ADDR")
    assert main(options(weights, tmp_path)) == 2
    assert "MASTER_ADDR" in capsys.readouterr().err
