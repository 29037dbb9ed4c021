"""Ranks of one run: joining them, sharing a model's training out, sums that all agree on.

One process without a launcher is a run of one rank; `torchrun` starts more. Control values travel
as CPU tensors through gloo, gradients through gloo or NCCL, whichever the device has.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from titok_fast.blocks import PostNormBlock, PreNormBlock
from titok_fast.maskgit_vqgan import Level

# what is sharded, checkpointed and compiled as one piece
BLOCKS = (PreNormBlock, PostNormBlock, Level)


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

    def share(self, count: int) -> slice:
        """This rank's part of `count` things, a contiguous run.

        Raises:
            ValueError: `count` is no multiple of the number of ranks.
        """
        if count % self.size:
            raise ValueError(f"{count} things cannot be shared out evenly to {self.size} ranks")
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, as float64 on the CPU; any shape, the same on every rank."""
        values = values.detach().to("cpu", torch.float64, copy=True)
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is up on some rank."""
        votes = torch.tensor(flags, dtype=torch.int32)
        if self.size > 1:
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes]

    def wait(self) -> None:
        """Until every rank is here."""
        self.any(False)

    def agree(self, work: Callable[[], Any]) -> Any:
        """Let rank 0 do `work`, and all ranks know how it ended.

        Returns:
            On every rank what `work` returned on rank 0, which must be picklable.

        Raises:
            OSError, ValueError: as `work` did, with its message, on every rank.
        """
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = work()
            except (OSError, ValueError) as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        return told[0]


@contextmanager
def join(device: str | None = None, patience_s: float = 600.0) -> Iterator[Ranks]:
    """The run that the launcher's environment describes, or a run of one rank.

    Args:
        device: "cpu", "cuda" or "cuda:1"; by default the launcher's local CUDA device, else the
            CPU.
        patience_s: seconds after which a rank that does not answer is taken for lost.

    Raises:
        ConnectionError: the others cannot be reached.
        ValueError: the environment is incomplete, or the device does not exist.
    """
    where = _device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Ranks(0, 1, where)
        return
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=patience_s))
    except (dist.DistError, RuntimeError) as error:
        raise ConnectionError(f"the other processes cannot be reached: {error}") from error
    with _lost_ranks_named(patience_s):
        yield Ranks(dist.get_rank(), dist.get_world_size(), where)
    # not after an error: leaving in good order waits for ranks that may be gone
    dist.destroy_process_group()


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"no device is called {name!r}: cpu, cuda or cuda:1") from error
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if not torch.cuda.is_available() or device.index >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise ValueError(f"device {device} does not exist: {found} CUDA devices found")
        torch.cuda.set_device(device)
    return device


# gloo and NCCL raise plain RuntimeErrors; these words are all that tells them from others
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out")


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


def rank_mean(x: Tensor) -> Tensor:
    """Mean over ranks, whose gradient reaches this rank's `x` as if it were the mean itself.

    A loss f(rank_mean(x)) then has the gradient of f(global mean) once gradients are averaged over
    ranks, which both ways of sharing do. Alone, or outside a run, it is `x`.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    mean = x.detach().clone()
    dist.all_reduce(mean)
    return x + (mean / dist.get_world_size() - x.detach())


class _Calls(nn.Module):
    """Runs functions of the model inside one module's forward, where both wrappers do their work.

    So that a model's other methods (`encode`, `trunk`) need no forward of their own.
    """

    def __init__(self, model: nn.Module, device: torch.device, bf16: bool) -> None:
        super().__init__()
        self.model, self.device_type, self.bf16 = model, device.type, bf16

    def forward(self, work: Callable[..., Any], *args: Any) -> Any:
        """`work(model, *args)`, under autocast where asked for."""
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.bf16):
            return work(self.model, *args)


class Engine:
    """A model that is trained by all ranks together.

    Args:
        model: on the ranks' device; FSDP2 replaces its parameters by shards.
        ranks: who shares the work.
        kind: "ddp" (every rank holds the model) or "fsdp2" (every rank holds a part).
        bf16: run the model under bfloat16 autocast.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, kind: str = "ddp", bf16: bool = False):
        self.sharded = kind == "fsdp2" and ranks.size > 1
        self._module: nn.Module = _Calls(model, ranks.device, bf16)
        if self.sharded:
            _shard(self._module, ranks)
        elif ranks.size > 1 and any(p.requires_grad for p in model.parameters()):
            self._module = DistributedDataParallel(self._module, gradient_as_bucket_view=True)

    def __call__(self, work: Callable[..., Any], *args: Any) -> Any:
        """`work(model, *args)` with the model whole inside."""
        result = self._module(work, *args)
        if self.sharded and not torch.is_grad_enabled():
            self._module.reshard()  # type: ignore[operator]  # no backward will do it
        return result

    def gradients(self, *, reduce: bool) -> AbstractContextManager[None]:
        """Context of a forward and its backward; the last of a step averages over ranks."""
        if self.sharded:
            self._module.set_requires_gradient_sync(reduce)  # type: ignore[operator]
        elif isinstance(self._module, DistributedDataParallel) and not reduce:
            return self._module.no_sync()
        return nullcontext()


def _shard(module: nn.Module, ranks: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # some outputs are views, which nothing here changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for part in [part for part in module.modules() if isinstance(part, BLOCKS)]:
        fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered from all ranks where it is sharded. Every rank must call it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be sharded."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every tensor whole, on the CPU. Every rank must call it."""
    return {name: whole(t).detach().cpu() for name, t in model.state_dict().items()}
