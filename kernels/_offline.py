"""Compile a kernel for a GPU that is not there, and read what the assembler says of it.

Triton carries its own compiler and `ptxas`, so machine code for any architecture can be made and
inspected on a laptop. Each kernel file lists the shapes worth looking at in `offline_cases()`;
`bench/kernel_report.py` compiles them and decides. Needs a process without `TRITON_INTERPRET`.
"""

import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    from titok_fast.kernels._machine_code import MachineCode


@dataclass(frozen=True)
class OfflineCase:
    """One kernel with one set of compile-time choices, at one published shape.

    Attributes:
        kernel: the `@triton.jit` function.
        config: what tells this row from the kernel's other rows, such as "L-32 bf16 64x128".
        signature: argument name to Triton type, for every argument that is not a constexpr:
            "*fp32", "i32", "fp32". Pointers are taken as 16-byte aligned, as torch allocates them;
            an integer known to be a multiple of 16 is written "i32:16", as in Triton's own tools.
        constexprs: values of the remaining arguments; None for a pointer that is not given.
        num_warps: warps per program.
        num_stages: depth of software pipelining.
        expects_mma: whether tensor-core instructions must be there; if not, they must be absent.
        vector_loads: whether the streams (see `_machine_code.py`) must be read with 128-bit loads
            and found by 64-bit offsets.
        flops: floating-point operations of the whole call, a multiply-add counting two.
        bytes_min: bytes the whole call must move: every input once, every output once.
        bytes_unfused: bytes that plain PyTorch operators move for the same result.
    """

    kernel: Any
    config: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int
    expects_mma: bool
    vector_loads: bool
    flops: float
    bytes_min: float
    bytes_unfused: float


def compile_offline(case: OfflineCase, capability: int) -> "MachineCode":
    """Compile one case for one architecture and read registers, spills and instructions.

    Args:
        case: what to compile.
        capability: 80, 86, 89, 90: compute capability times ten.

    Returns:
        The assembler's figures, and how the streams are read.

    Raises:
        RuntimeError: the process has `TRITON_INTERPRET` set, so kernels cannot be compiled.
        ValueError: signature and constexprs do not cover the kernel's arguments.
    """
    kernel = case.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("compile_offline wants a compiled kernel: run without TRITON_INTERPRET")
    types = {name: kind.split(":")[0] for name, kind in case.signature.items()}
    told = {*types, *case.constexprs}
    missing = [name for name in kernel.arg_names if name not in told]
    unknown = sorted(told - set(kernel.arg_names))
    if missing or unknown:
        raise ValueError(
            f"compile_offline: {kernel.__name__} [{case.config}] lacks {missing}, has no {unknown}"
        )
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in case.signature.items()
        if kind.startswith("*") or kind.endswith(":16")
    }
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=dict(case.constexprs),
        attrs=aligned,
    )
    from titok_fast.kernels._machine_code import read_machine_code  # which users never need

    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ttir, ptx = compiled.asm["ttir"], compiled.asm["ptx"]
    return read_machine_code(
        ttir,
        ptx,
        log=_assemble(ptx, capability),
        shared=int(compiled.metadata.shared),
        threads=32 * case.num_warps,
    )


def _assemble(ptx: str, capability: int) -> str:
    """What `ptxas -v` prints for `ptx`.

    Triton ships two assemblers, and from 3.9 on writes PTX that only the newer one reads.

    Raises:
        RuntimeError: neither takes it; the message is the assembler's.
    """
    # 90a: the wgmma instructions that Triton emits for Hopper exist only there
    arch = "sm_90a" if capability == 90 else f"sm_{capability}"
    nvidia = triton.knobs.nvidia
    newer = getattr(nvidia, "ptxas_blackwell", None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        for tool in (nvidia.ptxas, newer):
            if tool is None:
                continue
            command = [tool.path, "-v", f"--gpu-name={arch}", str(path)]
            command += ["-o", str(Path(folder) / "kernel.cubin")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return done.stdout + done.stderr
    raise RuntimeError(f"ptxas refuses the kernel for {arch}: {done.stderr.strip()}")
