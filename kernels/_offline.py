"""Compile a kernel for a GPU that is not there, and read what the assembler says of it.

Triton carries its own compiler and `ptxas`, so machine code for any architecture can be made and
inspected on a laptop. Each kernel file lists the shapes worth looking at in `offline_cases()`;
`bench/kernel_report.py` compiles them and decides. Needs a process without `TRITON_INTERPRET`.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction


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
        vector_loads: whether the streams must be read with 128-bit loads.
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


@dataclass(frozen=True)
class MachineCode:
    """What the assembler reports of one compiled kernel.

    Attributes:
        registers: per thread.
        spill_bytes: stores and loads to local memory, per thread, together.
        stack_bytes: local memory per thread that is not spills.
        shared_bytes: static and dynamic shared memory per program.
        mma: tensor-core instructions in the PTX (mma.sync and wgmma).
        fma: scalar float32 multiply-adds in the PTX.
        loads_128: global loads of 128 bits (ld.global.v4.b32, v2.b64, cp.async of 16 bytes).
        loads_narrow: global loads of fewer bits, cp.async included.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    mma: int
    fma: int
    loads_128: int
    loads_narrow: int


def compile_offline(case: OfflineCase, capability: int) -> MachineCode:
    """Compile one case for one architecture and read registers, spills and instructions.

    Args:
        case: what to compile.
        capability: 80, 86, 89, 90: compute capability times ten.

    Returns:
        The assembler's figures.

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
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    shared = int(compiled.metadata.shared)
    return _read_machine_code(ptx, _assemble(ptx, capability), shared)


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


def _read_machine_code(ptx: str, log: str, shared: int) -> MachineCode:
    def total(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, log))

    spills = total(r"(\d+) bytes spill stores") + total(r"(\d+) bytes spill loads")
    loads = re.findall(r"ld\.global[\w.:]*", ptx)
    wide = [load for load in loads if re.search(r"\.v4\.[bfsu]32|\.v2\.[bfsu]64|\.b128", load)]
    copies = re.findall(
        r"cp\.async\.c[ag]\.shared\.global[\w.:]*\s*\[[^\]]*\],\s*\[[^\]]*\],\s*(\w+)", ptx
    )
    wide_copies = [size for size in copies if int(size, 0) == 16]
    return MachineCode(
        registers=max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=0),
        spill_bytes=spills,
        stack_bytes=max((int(n) for n in re.findall(r"(\d+) bytes stack frame", log)), default=0),
        shared_bytes=shared,
        mma=len(re.findall(r"\bmma\.sync|\bwgmma\.mma_async", ptx)),
        fma=len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32(?:x2)?\b", ptx)),
        loads_128=len(wide) + len(wide_copies),
        loads_narrow=len(loads) - len(wide) + len(copies) - len(wide_copies),
    )
