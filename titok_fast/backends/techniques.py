"""The techniques of the fast mode: their names, defaults, checks and application.

Each changes the networks of a pipeline in place, except "graph", which records the whole draw
(cuda_graph.py). None changes samples beyond rounding: `python bench/waterfall.py` measures the
speed and quality of each.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from titok_fast.backends.cpu_int8 import int8_layers
from titok_fast.backends.cpu_packed import pack, packed_layers
from titok_fast.models.blocks import set_attention
from titok_fast.models.generator import MaskedGenerator
from titok_fast.models.tokenizer import TiTok
from titok_fast.processor.here import processor
from titok_fast.processor.rates import FORMATS

TECHNIQUES = {
    "packed": "CPU: weights in oneDNN's layout, GELU fused into the matmul, kernels folded once",
    "products": "CPU: attention as plain matmuls",
    "int8": "CPU: matmuls in 8-bit integers, scales per token and per output channel",
    "inductor": "torch.compile of each network",
    "graph": "CUDA: the whole draw recorded once for each batch size, then replayed",
}
# shapes per network: B and 2B rows for each batch size. Beyond its limit, by default 8, torch runs
# the plain network
_SHAPES = 64
_RECORDING_MODES = ("reduce-overhead", "max-autotune")


def resolve_fast(fast: bool | str, device_type: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The techniques of `fast=` and `--fast`: none for False, for True those that pay here.

    They keep the dtype; "int8" is the fastest on a CPU. ValueError for another value.
    """
    if fast is False:
        return ()
    if fast is True and device_type != "cpu":
        return ("inductor", "graph") if device_type == "cuda" else ("inductor",)
    if fast in (True, "int8"):
        products = dtype in FORMATS and processor().attention(dtype) == "products"
        attention = ("products",) if products else ()
        return ("packed", *attention) if fast is True else (*attention, "int8")
    raise ValueError(
        f"fast wants True, False or 'int8'; got {fast!r}: lists of techniques go to compile()"
    )


def check_techniques(
    techniques: Collection[str],
    device_type: str,
    dtype: torch.dtype,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Check the techniques and the options of torch.compile before any network changes.

    Raises:
        ValueError: an unknown technique, one for another device or dtype, two that exclude each
            other, or options that no technique takes.
    """
    unknown = set(techniques) - TECHNIQUES.keys()
    if unknown:
        known = ", ".join(TECHNIQUES)
        raise ValueError(f"unknown techniques {sorted(unknown)}; known: {known}")
    for name in ("packed", "products", "int8"):
        if name in techniques and device_type != "cpu":
            raise ValueError(f"technique {name!r} is for the CPU; the pipeline is on {device_type}")
    for name in ("packed", "int8"):
        if name in techniques and dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"technique {name!r} wants float32 or bfloat16; got {dtype}")
        if name in techniques and "inductor" in techniques:
            raise ValueError(f"{name!r} and 'inductor' both replace the layers: choose one")
    if "graph" in techniques and device_type != "cuda":
        raise ValueError(
            f"technique 'graph' wants a CUDA pipeline; the pipeline is on {device_type}: call `to` "
            "before, or leave it out"
        )
    if options and "inductor" not in techniques:
        raise ValueError(f"{sorted(options)} are for technique 'inductor', which is not asked for")
    if options and "graph" in techniques and options.get("mode") in _RECORDING_MODES:
        raise ValueError(
            f"mode {options['mode']!r} records CUDA graphs, and so does technique 'graph': leave "
            "one out, or take mode 'max-autotune-no-cudagraphs'"
        )


def apply_techniques(networks: Collection[nn.Module], techniques: Collection[str]) -> None:
    """Change the networks in place; call `check_techniques` first."""
    for network in networks:
        if "products" in techniques:
            set_attention(network, "products")
        dtype = next(network.parameters()).dtype
        if "int8" in techniques:
            pack(network, int8_layers(dtype))
        elif "packed" in techniques:
            pack(network, packed_layers(dtype))


def compile_networks(
    tokenizer: TiTok, generator: MaskedGenerator | None, options: Mapping[str, Any]
) -> None:
    """Apply the technique "inductor", in place, with these options of torch.compile."""
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _SHAPES)
    given: dict[str, Any] = {"dynamic": False} | dict(options)
    if tokenizer.latent_tokens.device.type == "cpu":  # weights become constants, packed for oneDNN
        given.setdefault("options", {"freezing": True})
    tokenizer.encoder.compile(**given)
    tokenizer.decoder.compile(**given)
    if tokenizer.config.finetune_decoder:
        tokenizer.pixel_decoder.compile(**given)
    if generator is not None:
        generator.compile(**given)
