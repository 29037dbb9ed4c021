"""Many images from more than one process: the same bytes whoever draws, resumes or dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.sample_runs import (
    AGAIN,
    CLASSES,
    NAMES,
    NUM,
    main,
    options,
    pictures,
    stamps,
)

pytestmark = pytest.mark.usefixtures("one_thread_for_all")  # as torchrun sets it


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


def test_two_ranks_and_another_batch_size_give_the_same_bytes(
    tmp_path: Path, models: Path, wanted: np.ndarray
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--batch-size=3", f"--npz={tmp_path / 'two.npz'}", f"--grid={tmp_path / 'two.png'}"]
    process = torchrun(options(models, two, *more))
    assert main(options(models, one, f"--npz={tmp_path / 'one.npz'}")) == 0
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert np.array_equal(pictures(one), wanted)
    for name in NAMES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert np.asarray(Image.open(tmp_path / "two.png")).shape == (4 * 34 + 2, 5 * 34 + 2, 3)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_killed_rank_ends_the_run_and_a_rerun_draws_the_rest(tmp_path: Path, models: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    slow = ["--count=10", "--steps=250"]  # long enough to be in the middle of
    process = torchrun(options(models, out, *slow, "--batch-size=1"))
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
    assert main(options(models, out, *slow)) == 0
    assert before.items() <= stamps(out).items()  # nothing was drawn twice
    assert main(options(models, whole, *slow)) == 0
    assert np.array_equal(pictures(out), pictures(whole))


def test_rank_without_a_launcher_says_what_is_missing(tmp_path: Path, models: Path) -> None:
    """Such as mpirun without abort: rank 0 finishes its pieces, and names those of the dead."""
    out = tmp_path / "out"
    slow = options(models, out, "--count=10", "--steps=250", "--batch-size=1")
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


def test_rank_with_other_weights_is_refused(tmp_path: Path, models: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "rank.py").write_text(
        "import os, sys; from titok_fast.cli.main import main\n"
        f"other = '--generator={models / 'other'}'\n"
        "sys.exit(main(sys.argv[1:] + [other] * int(os.environ['RANK'])))\n"
    )
    run = torchrun(options(models, out), str(tmp_path / "rank.py"))
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "rank 1: error: rank 1 differs from rank 0: weights_sha256 was " in errors


def test_nobody_to_join(
    tmp_path: Path,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rank = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (rank | {"MASTER_PORT": free_port()}).items():
        monkeypatch.setenv(name, value)
    assert main(options(models, tmp_path, "--patience=1")) == 2
    error = capsys.readouterr().err
    assert "titok-fast: rank 1: error: the other processes cannot be reached" in error
    monkeypatch.delenv("MASTER_ADDR")
    assert main(options(models, tmp_path)) == 2
    assert "MASTER_ADDR" in capsys.readouterr().err


def test_ranks_choose_alike_where_their_rates_differ(tmp_path: Path, models: Path) -> None:
    """On a fresh machine each rank may measure for itself, and find another way faster."""
    out = tmp_path / "out"
    (tmp_path / "rank.py").write_text(
        "import os, sys\n"
        "from dataclasses import replace\n"
        "from titok_fast.cli.main import main\n"
        "from titok_fast.processor import here\n"
        "own = here.processor()\n"
        "rate = {'attention products float32': 1e15 * int(os.environ['RANK'])}\n"
        "here._known = replace(own, rates={**own.rates, **rate})\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    run = torchrun(options(models, out, "--fast"), str(tmp_path / "rank.py"))
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert len(pictures(out)) == NUM
