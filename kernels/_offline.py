"""The cases that `offline_cases()` of a kernel file lists for `bench/offline.py` to compile."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class OfflineCase:
    """One kernel with one set of compile-time choices, at one published shape.

    The signature gives a Triton type to every argument that is not a constexpr: "*fp32", "i32",
    "fp32". Pointers count as 16-byte aligned, as torch allocates them; an integer that is always a
    multiple of 16 is "i32:16", as in Triton's tools. `bench/lib/machine_code.py` defines streams.
    """

    kernel: Any
    config: str  # distinguishes the kernel's rows, such as "L-32 bf16 64x128"
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 1
    expects_mma: bool = False  # True: the code must use tensor cores; False: it must not
    vector_loads: bool = True  # streams must be read with 128-bit loads and 64-bit offsets
    flops: float = field(kw_only=True)  # of the whole call, a multiply-add counting two
    bytes_min: float = field(kw_only=True)  # every input and output of the call once
    bytes_unfused: float = field(kw_only=True)  # moved by plain PyTorch for the same result

    @classmethod
    def of(
        cls,
        kernel: Any,
        config: str,
        types: Mapping[str, str],
        constexprs: Mapping[str, object],
        **rest: Any,
    ) -> "OfflineCase":
        """A case from the arguments of each type, such as {"*i64": "ids_ptr seeds_ptr"}.

        Other pointers are "*fp32", other numbers "i32:16".
        """
        signature = {
            name: "*fp32" if name.endswith("_ptr") else "i32:16"
            for name in kernel.arg_names
            if name not in constexprs
        }
        named = {name: kind for kind, names in types.items() for name in names.split()}
        assert named.keys() <= signature.keys(), named.keys() - signature.keys()
        return cls(kernel, config, signature | named, constexprs, **rest)
