"""The fast mode: which techniques there are, which work together, and which are on by default.

Each changes the networks of a pipeline in place, and none changes what is sampled beyond rounding:
`python bench/waterfall.py` has a row of speed and quality for each.
"""

from collections.abc import Collection

import torch
from torch import nn

from titok_fast.blocks import set_attention
from titok_fast.int8 import Int8Layers
from titok_fast.packed import PackedLayers, pack

TECHNIQUES = {
    "packed": "CPU: weights in oneDNN's layout, GELU in the product, kernels folded once",
    "products": "CPU: attention as plain matrix products",
    "int8": "CPU: products in 8-bit integers, scales per token and per output channel",
    "inductor": "torch.compile of each network",
}
DEFAULTS = {"cpu": ("packed", "products"), "cuda": ("inductor",)}


def check_techniques(techniques: Collection[str], device_type: str, dtype: torch.dtype) -> None:
    """Refuse what cannot work, before anything is changed.

    Raises:
        ValueError: an unknown technique, one for another device or dtype, or two that exclude
            each other.
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


def apply_techniques(networks: Collection[nn.Module], techniques: Collection[str]) -> None:
    """Change the networks in place; `check_techniques` has been asked."""
    for network in networks:
        if "products" in techniques:
            set_attention(network, "products")
        if "int8" in techniques:
            pack(network, Int8Layers())
        elif "packed" in techniques:
            pack(network, PackedLayers())
