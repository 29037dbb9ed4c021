"""Make models under random weights in seconds.

Speed does not depend on what the weights are.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from titok_fast import TiTok, TiTokPipeline
from titok_fast.models.generator import generator_class
from titok_fast.models.quantizer import VectorQuantizer
from titok_fast.presets import Preset

M = TypeVar("M", bound=nn.Module)


class NoInit(TorchFunctionMode):
    """Constructors leave their weights at 0: drawing 3.8 billion of them takes minutes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0].zero_()  # as allocated, torch's truncated normal might redraw for ever
        return func(*args, **(kwargs or {}))


def build(make: Callable[[], M], device: torch.device, dtype: torch.dtype) -> M:
    """A model in eval mode under random weights, made in its final type; "meta" takes no memory.

    Our codebooks are float32 whatever the type is.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a float32 copy of the largest would not fit beside it
    try:
        with NoInit(), torch.device(device):
            model = make()
    finally:
        torch.set_default_dtype(before)
    model = model.eval().requires_grad_(False)
    for part in model.modules():
        if isinstance(part, VectorQuantizer):
            part.embedding.float()
    if device.type != "meta":
        fill(model)
    return model


@torch.no_grad()
def fill(model: M) -> M:
    """Normal weights of scale fan_in**-0.5, the same noise repeated; norms scale by 1; in place."""
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if p.ndim < 2:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        scaled = (noise * p[0].numel() ** -0.5).to(p.device, p.dtype)
        for part in p.view(-1).split(len(scaled)):
            part.copy_(scaled[: len(part)])
    return model


def draw_only(system: Preset, device: torch.device, dtype: torch.dtype) -> TiTokPipeline:
    """One of our pipelines without its encoder, which sampling does not run."""
    config = system.generator
    if config is None:
        raise ValueError("draw_only wants a system with a generator; this is a tokenizer alone")

    def tokenizer() -> TiTok:
        whole = TiTok(system.tokenizer)
        whole.encoder = nn.Identity()
        return whole

    t = build(tokenizer, device, dtype)
    g = build(lambda: generator_class(config)(config), device, dtype)
    return TiTokPipeline(t, g, system.sampling)
