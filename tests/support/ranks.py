"""Tests of several ranks: processes that start at once, and meet as torchrun's do."""

import gc
import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from titok_fast.distributed import RankLostError, join

# a server imports torch for all, and is forked before it has threads
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["titok_fast.training.loop", "torch.distributed.fsdp", "torch._dynamo"]
)
Worker = Callable[[int, int, Path], None]


def two_ranks(worker: Worker, folder: Path) -> None:
    """Run `worker(rank, world, folder)` in two processes, of a group that meets in the folder."""
    mp.spawn(_in_group, (worker, folder), nprocs=2)


def _in_group(rank: int, worker: Worker, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    worker(rank, 2, folder)
    gc.collect()  # what outlives the group keeps its threads, and a process that ends then aborts
    dist.destroy_process_group()


def assert_two_ranks_do_as_one(worker: Worker, folder: Path, *, rtol: float) -> None:
    """`worker(rank, world, folder)` saves tensors by name as `WORLD-RANK.pt`; they must agree."""
    worker(0, 1, folder)
    two_ranks(worker, folder)
    alone, first, second = (torch.load(folder / f"{n}.pt") for n in ("1-0", "2-0", "2-1"))
    for name, want in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], want, rtol=rtol, atol=1e-7, msg=name)


def run_together(
    work: Callable[..., Any], args: Any, size: int = 2, patience: float = 60.0
) -> tuple[list[Any], list[ForkServerProcess]]:
    """Messages of `size` ranks that join for `work(ranks, *args)`, and the ended processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told: SimpleQueue = PROCESSES.SimpleQueue()
    processes = [
        PROCESSES.Process(target=_joined, args=(rank, size, port, patience, work, told, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=150 if process is processes[0] else 20)
        process.kill()  # what a test has stopped
        process.join()
    messages = []
    while not told.empty():
        messages.append(told.get())
    return messages, processes


def _joined(
    rank: int, size: int, port: int, patience: float, work: Callable[..., Any], told: Any, args: Any
) -> None:
    """One rank of `run_together`: tells its result, or ends with status 3 and tells the error."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    address = {"RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in address.items()})
    try:
        with join("cpu", patience_s=patience) as ranks:
            result = work(ranks, *args)
    except RankLostError as error:
        told.put(str(error))
        os._exit(3)  # as after an error: an orderly exit waits for the dead
    told.put((rank, result))
