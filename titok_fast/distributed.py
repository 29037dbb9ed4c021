"""The processes of one run: joining them, and values on which all of them agree.

A process without a launcher is a run of one rank; `torchrun` starts more. Control values travel as
CPU tensors through gloo, gradients through gloo or NCCL, whichever the device has.
"""

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

# before there is a group: that module makes the group of that time a default argument, which then
# outlives `destroy_process_group`, and a thread of such a group can abort the process at its end
import torch.distributed.nn
from torch import Tensor

# gloo and NCCL raise plain RuntimeErrors; these words are all that tells them from others
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out")


class RankLostError(ConnectionError):
    """Another process of the run is gone, or has not answered in time."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: 0..size-1; rank 0 writes files.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, as float64 on the CPU; any shape, the same on every rank."""
        return sum_over_ranks(values.detach().to("cpu", torch.float64, copy=True))

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on some rank."""
        votes = torch.tensor(flags, dtype=torch.int32)
        if self.size > 1:
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes]

    def wait(self, lost: Callable[[], str]) -> None:
        """Wait until every rank is here; `lost` words the RankLostError where one is gone."""
        try:
            self.any(False)
        except RuntimeError as error:  # how gloo says that a rank is gone
            raise RankLostError(lost()) from error

    def agree(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 and tell all ranks how it ended.

        Returns:
            On every rank what `work` returned on rank 0, which must be picklable.

        Raises:
            OSError, ValueError: as `work` did, with its message, on every rank.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except (OSError, ValueError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


@contextmanager
def join(device: str | None = None, patience_s: float = 600.0) -> Iterator[Ranks]:
    """The run that the launcher's environment describes, or a run of one rank.

    Args:
        device: "cpu", "cuda" or "cuda:1"; by default the launcher's local CUDA device, else the
            CPU.
        patience_s: seconds after which a rank that does not answer counts as lost.

    Raises:
        ConnectionError: the other processes cannot be reached.
        ValueError: the environment is incomplete, or the device does not exist.
    """
    own = local_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Ranks(0, 1, own)
        return
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=patience_s))
    except (dist.DistError, RuntimeError) as error:
        raise ConnectionError(f"the other processes cannot be reached: {error}") from error
    with _lost_ranks_named(patience_s):
        yield Ranks(dist.get_rank(), dist.get_world_size(), own)
    # not after an error: that waits for ranks that may be gone; see `end_process`
    dist.destroy_process_group()


def local_device(name: str | None = None) -> torch.device:
    """The device of this process, made torch's current one where it is a CUDA device.

    Args:
        name: "cpu", "cuda" or "cuda:1"; by default CUDA where there is some. "cuda" without an
            index is the launcher's LOCAL_RANK.

    Raises:
        ValueError: no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device wants cpu, cuda or cuda:1; got {name!r}") from error
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or device.index >= count:
            raise ValueError(
                f"--device {device}: torch sees {count} CUDA devices here; start one process per "
                "device, or pass --device cpu"
            )
        torch.cuda.set_device(device)
    return device


def end_process(status: int) -> NoReturn:
    """End this process with an exit status, which is the caller's last act.

    A rank ends without Python's own end: the group may still be alive, after an error or in a cache
    of torch, and one of its threads that meets a closing interpreter aborts the process.
    """
    if "RANK" in os.environ:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextmanager
def _lost_ranks_named(patience_s: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(w in text.lower() for w in _LOST):
            raise
        raise RankLostError(
            f"another rank is gone, or has not answered for {patience_s:g} s: "
            f"{text.splitlines()[0] if text else type(error).__name__}"
        ) from error


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) outside a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def my_share(total: int) -> range:
    """This rank's contiguous part of `total` items; parts differ in length by at most one."""
    rank, world = rank_and_world()
    return range(rank * total // world, (rank + 1) * total // world)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up in place over all ranks, and return the tensor. Every rank must call it."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows: Tensor, first: int, total: int) -> Tensor:
    """All ranks' rows in order: (n, d) of this rank, which begin at `first` -> (total, d)."""
    if rank_and_world()[1] == 1:
        return rows
    whole = rows.new_zeros(total, *rows.shape[1:])
    whole[first : first + len(rows)] = rows
    return sum_over_ranks(whole)


def rank_mean(x: Tensor) -> Tensor:
    """Mean over ranks, whose gradient reaches this rank's `x` as if it were the mean itself.

    A loss f(rank_mean(x)) then has the gradient of f(global mean) once gradients are averaged over
    ranks, as DDP and FSDP2 do. With one rank it is `x`.
    """
    _, world = rank_and_world()
    if world == 1:
        return x
    return x + (sum_over_ranks(x.detach().clone()) / world - x.detach())
