"""A model that all ranks of a run train together: DDP, FSDP2, or one process alone."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from titok_fast.distributed import Ranks
from titok_fast.models.blocks import PostNormBlock, PreNormBlock
from titok_fast.models.vqgan import Level

# modules that are sharded, checkpointed and compiled as a unit
BLOCKS = (PreNormBlock, PostNormBlock, Level)


class _Calls(nn.Module):
    """Runs functions of the model inside one module's forward, which DDP and FSDP2 both hook.

    So the ranks also share a model's other methods (`encode`, `hidden`): FSDP2 could register
    those as forward methods, DDP could not.
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
        ranks: the processes of the run.
        kind: "ddp" (every rank holds the model) or "fsdp2" (every rank holds a shard).
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
        """`work(model, *args)` with all parameters gathered."""
        result = self._module(work, *args)
        if self.sharded and not torch.is_grad_enabled():
            self._module.reshard()  # type: ignore[operator]  # without a backward, nothing else does
        return result

    def gradients(self, *, reduce: bool) -> AbstractContextManager[None]:
        """Context of a forward and its backward; `reduce` averages gradients over ranks."""
        if self.sharded:
            self._module.set_requires_gradient_sync(reduce)  # type: ignore[operator]
        elif isinstance(self._module, DistributedDataParallel) and not reduce:
            return self._module.no_sync()
        return nullcontext()


def _shard(module: nn.Module, ranks: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # some outputs are views, but no code changes them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for part in [part for part in module.modules() if isinstance(part, BLOCKS)]:
        fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered from all ranks where it is sharded. Every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every tensor whole, on the CPU. Every rank must call it."""
    return {name: whole(t).detach().cpu() for name, t in model.state_dict().items()}
