"""One evaluation on many ranks: each measures a part, and sums bring the parts together."""

import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This process's rank and their number; (0, 1) outside a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def my_share(total: int) -> range:
    """The images that this rank measures: a run of indices, of even length up to one."""
    rank, world = rank_and_world()
    return range(rank * total // world, (rank + 1) * total // world)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up in place over all ranks, and return the tensor. All ranks must call it."""
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
