"""A processor: its name, its instruction sets, and what follows from its rates."""

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from titok_fast.processor.rates import FORMATS

# our name: the names of torch.cpu.get_capabilities, of which one suffices
_SETS = {
    "avx2": ("avx2",),
    "avx512": ("avx512_bw",),
    "vnni": ("avx512_vnni", "avx_vnni"),
    "bf16": ("avx512_bf16", "bf16"),
    "amx": ("amx_int8",),
    "neon": ("neon",),
    "sve": ("sve",),
    "i8mm": ("i8mm",),
}
# value of ONEDNN_MAX_CPU_ISA: the sets that it leaves
_LEFT = {
    "SSE41": (),
    "AVX": (),
    "AVX2": ("avx2",),
    "AVX2_VNNI": ("avx2", "vnni"),
    "AVX512_CORE": ("avx2", "avx512"),
    "AVX512_CORE_VNNI": ("avx2", "avx512", "vnni"),
    "AVX512_CORE_BF16": ("avx2", "avx512", "vnni", "bf16"),
}
_PAYS = 1.1  # a smaller gain of a product is lost in the steps around it
_EQUAL = 0.97  # less than this is slower, and not noise


@dataclass(frozen=True)
class Processor:
    """One processor, as this process may use it.

    Attributes:
        name: the system's name for it, with family and model where there are such.
        instruction_sets: of "avx2", "avx512", "vnni", "bf16", "amx", "neon", "sve", "i8mm".
        rates: operations per second of one thread (2 for a multiply-add), by the names of
            rates.measured; 0 where there is no such product.
        int8_limit: the largest 8-bit weight whose products are exact: 127, or 64 where the
            processor adds pairs of products in 16 bits.
    """

    name: str
    instruction_sets: tuple[str, ...]
    rates: Mapping[str, float]
    int8_limit: int

    def best(self, kind: str, name: str) -> float:
        """The rate of the fastest way.

        Args:
            kind: "linear", "convolution" or "attention".
            name: "float32", "bfloat16", or "int8" for 8-bit inputs whatever the results are.
        """
        ways = [way for way in self.rates if way.startswith(kind) and name in way]
        return max(self.rates[way] for way in ways if name == "int8" or "int8" not in way)

    @property
    def dtype(self) -> torch.dtype:
        """The faster of float32 and bfloat16; float32 where they are nearly the same."""
        pays = self.best("linear", "bfloat16") > _PAYS * self.best("linear", "float32")
        return torch.bfloat16 if pays else torch.float32

    def packs(self, dtype: torch.dtype) -> bool:
        """Whether linear layers gain by weights in oneDNN's layout, or at least do not lose."""
        plain, packed = (
            self.rates[f"linear {way} {FORMATS[dtype]}"] for way in ("plain", "packed")
        )
        return packed > 0 and packed >= _EQUAL * plain

    def attention(self, dtype: torch.dtype) -> str:
        """The faster back end: "products" or "sdpa"."""
        sdpa, products = (
            self.rates[f"attention {way} {FORMATS[dtype]}"] for way in ("sdpa", "products")
        )
        return "products" if products > _PAYS * sdpa else "sdpa"

    def int8_result(self, kind: str, dtype: torch.dtype) -> torch.dtype | None:
        """The type in which int8 products leave: `dtype` or float32, whichever is faster.

        Args:
            kind: "linear" or "convolution".
            dtype: float32 or bfloat16, that of the model.

        Returns:
            None where int8 is not faster than products in `dtype`.
        """
        rates = {t: self.rates[f"{kind} int8 to {FORMATS[t]}"] for t in (dtype, torch.float32)}
        fast = dtype if rates[dtype] >= _EQUAL * rates[torch.float32] else torch.float32
        return fast if rates[fast] > _PAYS * self.best(kind, FORMATS[dtype]) else None


def cpu_name() -> str:
    """The system's name of the processor, with family and model on Linux.

    Under a hypervisor two generations, one twice as fast in bfloat16, may both be "AMD EPYC".
    """
    cpuinfo = Path("/proc/cpuinfo")
    named = name_in(cpuinfo.read_text()) if cpuinfo.exists() else None
    return named or platform.processor() or platform.machine()


def name_in(cpuinfo: str) -> str | None:
    """The processor that the text of /proc/cpuinfo describes, or None."""
    fields = dict(re.findall(r"^(\w[^:\n]*?)\s*:[ \t]*(.*?)\s*$", cpuinfo, re.MULTILINE))
    name = fields.get("model name")
    if name and "cpu family" in fields and "model" in fields:
        return f"{name} (family {fields['cpu family']}, model {fields['model']})"
    return name or None


def instruction_sets() -> tuple[str, ...]:
    """Names of _SETS that the processor has and the environment does not forbid."""
    has = torch.cpu.get_capabilities()
    found = [name for name, names in _SETS.items() if any(has.get(n) for n in names)]
    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    left = _LEFT.get(limit, tuple(_SETS))
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
        left = tuple(name for name in left if name != "avx512")
    return tuple(name for name in found if name in left)
