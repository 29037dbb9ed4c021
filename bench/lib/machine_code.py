"""Compile a Triton kernel for a GPU that is not there, and inspect its machine code.

Triton ships its own compiler and `ptxas`, so any machine can do this; the process must run without
`TRITON_INTERPRET`.

A stream is an argument whose reading is the kernel's work: of the loads whose tile has the most
dimensions, those large enough for every thread to take 16 bytes. Parameters (a row of weights
beside a tile of pixels, a seed) and single values picked afterwards are no streams. Triton's first
representation (TTIR) shows which arguments are streams: its pointers still have names and its tiles
shapes. The PTX shows how wide the loads became; their addresses are traced back to the arguments.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from titok_fast.kernels._offline import OfflineCase

_WIDE = 16  # bytes: the most that one load takes for a thread before Blackwell


@dataclass(frozen=True)
class MachineCode:
    """What the assembler reports of one compiled kernel, and what its text shows.

    Attributes:
        registers: per thread.
        spill_bytes: stores and loads to local memory, per thread, together.
        stack_bytes: local memory per thread that is not spills.
        shared_bytes: static and dynamic shared memory per program.
        mma: tensor-core instructions in the PTX (mma.sync and wgmma).
        fma: scalar float32 multiply-adds in the PTX.
        loads_128: global loads of 128 bits (ld.global.v4.b32, v2.b64, cp.async of 16 bytes).
        loads_narrow: global loads of fewer bits, cp.async included.
        streams: arguments that are streams.
        narrow_streams: those of them that are read, in part or in all, in fewer than 128 bits.
        short_offsets: arguments whose tiles are addressed by 32-bit offsets that depend on the
            first program id, along which the number of rows has no limit.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    mma: int
    fma: int
    loads_128: int
    loads_narrow: int
    streams: list[str] = field(default_factory=list)
    narrow_streams: list[str] = field(default_factory=list)
    short_offsets: list[str] = field(default_factory=list)


def compile_offline(case: OfflineCase, capability: int) -> MachineCode:
    """Compile one case for a compute capability times ten, and read its machine code.

    Raises:
        RuntimeError: the process has `TRITON_INTERPRET` set, or ptxas refuses the kernel.
        ValueError: signature and constexprs do not cover the kernel's arguments.
    """
    kernel = case.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("compile_offline wants a compiled kernel: run without TRITON_INTERPRET")
    types = {name: kind.split(":")[0] for name, kind in case.signature.items()}
    named, wanted = {*types, *case.constexprs}, set(kernel.arg_names)
    if named != wanted:
        lacks, unknown = sorted(wanted - named), sorted(named - wanted)
        raise ValueError(
            f"compile_offline: {kernel.__name__} [{case.config}] lacks {lacks}, has no {unknown}"
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
    ttir, ptx = compiled.asm["ttir"], compiled.asm["ptx"]
    log = _assemble(ptx, capability)
    shared = int(compiled.metadata.shared)
    return read_machine_code(ttir, ptx, log, shared, threads=32 * case.num_warps)


def _assemble(ptx: str, capability: int) -> str:
    """Output of `ptxas -v`; Triton ships two, and from 3.9 on only the newer one reads its PTX."""
    # 90a: the wgmma instructions that Triton emits for Hopper exist only there
    arch = "sm_90a" if capability == 90 else f"sm_{capability}"
    nvidia = triton.knobs.nvidia
    tools = [nvidia.ptxas, getattr(nvidia, "ptxas_blackwell", None)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        for tool in filter(None, tools):
            command = [tool.path, "-v", f"--gpu-name={arch}", path, "-o", f"{folder}/kernel.cubin"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return done.stdout + done.stderr
    raise RuntimeError(f"ptxas refuses the kernel for {arch}: {done.stderr.strip()}")


def read_machine_code(ttir: str, ptx: str, log: str, shared: int, threads: int) -> MachineCode:
    """Gather the figures of a program of `threads` from its texts; `log` is that of `ptxas -v`."""

    def numbers(pattern: str) -> list[int]:
        return [int(found) for found in re.findall(pattern, log)]

    header = next(line for line in ttir.splitlines() if "tt.func public" in line)
    arguments = re.findall(r"%(\w+): (!tt\.ptr)?", header)
    accesses = _accesses(ttir, [name for name, pointer in arguments if pointer])
    # the PTX has the same parameters in the same order; no load goes through a scalar
    widths = _load_widths(ptx, [name if pointer else "" for name, pointer in arguments])
    all_widths = [width for loads in widths.values() for width in loads]
    rank = max((len(a.tile) for a in accesses if a.reads), default=0)
    tiles = [a for a in accesses if len(a.tile) == rank and a.size >= _WIDE * threads]
    streams = sorted({a.argument for a in tiles if a.reads})
    return MachineCode(
        registers=max(numbers(r"Used (\d+) registers"), default=0),
        spill_bytes=sum(numbers(r"(\d+) bytes spill (?:stores|loads)")),
        stack_bytes=max(numbers(r"(\d+) bytes stack frame"), default=0),
        shared_bytes=shared,
        mma=len(re.findall(r"\bmma\.sync|\bwgmma\.mma_async", ptx)),
        fma=len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32(?:x2)?\b", ptx)),
        loads_128=sum(width >= _WIDE for width in all_widths),
        loads_narrow=sum(width < _WIDE for width in all_widths),
        streams=streams,
        narrow_streams=[s for s in streams if _is_narrow(s, accesses, widths)],
        short_offsets=sorted({a.argument for a in tiles if a.follows_x and not a.long}),
    )


@dataclass(frozen=True)
class _Value:
    """A value of the TTIR: the pointer argument it derives from, and how it is addressed."""

    argument: str = ""
    follows_x: bool = False  # depends on the first program id
    long: bool = False  # some offset had 64 bits


@dataclass(frozen=True)
class _Access(_Value):
    """One load or store in the TTIR; `tile` is () for a single value."""

    reads: bool = False
    tile: tuple[int, ...] = ()
    size: int = 0  # bytes of a tile


def _is_narrow(stream: str, accesses: list[_Access], widths: dict[str, list[int]]) -> bool:
    """Whether a stream's tiles are read narrowly; loads of a single value of it may be narrow."""
    single = sum(a.argument == stream and a.reads and not a.tile for a in accesses)
    loads = widths.get(stream, []) + widths.get("", [])
    narrow = sum(width < _WIDE for width in loads)
    return narrow > single or narrow == len(loads)


_BITS = {"i1": 8, "bf16": 16}  # in memory; other types name their bits: f32, i64
_REGISTER = r"%rd?\d+"
_OPERATION = re.compile(r'\s*(?:(%\w+)(?::\d+)? = )?"?([a-z]\w*\.\w+)"?(.*)')


def _accesses(ttir: str, pointers: list[str]) -> list[_Access]:
    """The kernel's loads and stores, in one pass: names are defined before use."""
    known = {f"%{name}": _Value(name) for name in pointers}
    found: list[_Access] = []
    for line in ttir.splitlines():
        matched = _OPERATION.match(line)
        if matched is None:
            continue
        name, operation, rest = matched.groups()
        operands = [known.get(o, _Value()) for o in re.findall(r"%\w+", rest)]
        value = _Value(
            next((o.argument for o in operands if o.argument), ""),
            any(o.follows_x for o in operands),
            any(o.long for o in operands),
        )
        if operation == "tt.get_program_id":
            value = _Value(follows_x=rest.startswith(" x"))
        elif operation == "tt.addptr":
            has_64_bits = re.search(r"(?:[ x])i64>?(?: loc|$)", rest.rstrip()) is not None
            long = operands[0].long or has_64_bits
            value = replace(operands[0], follows_x=value.follows_x, long=long)
        elif operation in ("tt.load", "tt.store"):
            found.append(_access(operands[0], operation == "tt.load", rest))
            value = _Value(follows_x=value.follows_x)  # loaded data is no pointer
        elif operation == "scf.for":
            for inner, outer in re.findall(r"(%\w+) = (%\w+)", rest):
                known[inner] = known.get(outer, _Value())
        if name:
            known[name] = value
    return found


def _access(pointer: _Value, reads: bool, rest: str) -> _Access:
    shape = re.search(r"tensor<((?:\d+x)+)!tt\.ptr<(\w+)>", rest)
    tile: tuple[int, ...] = ()
    size = 0
    if shape is not None:
        tile = tuple(int(n) for n in shape[1].split("x")[:-1])
        size = prod(tile) * (_BITS.get(shape[2]) or int(shape[2].lstrip("fiu"))) // 8
    return _Access(pointer.argument, pointer.follows_x, pointer.long, reads, tile, size)


def _load_widths(ptx: str, parameters: list[str]) -> dict[str, list[int]]:
    """Bytes per thread of each global load instruction, by the pointer it reads through.

    Parameters that are scalars are "", as are loads whose address came out of shared memory.
    """
    sources: dict[str, set[str]] = {}  # of each register: registers, and names of pointers
    loads: list[tuple[str, int]] = []
    for line in ptx.splitlines():
        matched = re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+([^;]*);", line)
        if matched is None:
            continue
        instruction, rest = matched.groups()
        if instruction.startswith("ld.global"):
            shape = re.search(r"(?:\.v(\d))?\.[bfsu](\d+)$", instruction)
            address = re.search(r"\[\s*(%rd\d+)", rest)
            assert shape is not None
            assert address is not None
            loads.append((address[1], int(shape[1] or 1) * int(shape[2]) // 8))
        elif instruction.startswith("cp.async.c"):
            if copy := re.match(r"\[[^\]]*\],\s*\[\s*(%rd\d+)[^\]]*\],\s*(\w+)", rest):
                loads.append((copy[1], int(copy[2], 0)))
        elif instruction.startswith(("ld.shared", "atom")):
            continue  # an address read from memory cannot be traced
        # a pointer may be split over two registers, to pass it between lanes
        elif target := re.match(r"(\{[^}]*\}|[^,{]*),(.*)", rest):
            inputs = set(re.findall(_REGISTER, target[2]))
            if parameter := re.search(r"_param_(\d+)\]", target[2]):
                inputs |= set(parameters[int(parameter[1]) :][:1])
            for register in re.findall(_REGISTER, target[1]):
                sources.setdefault(register, set()).update(inputs)

    widths: dict[str, list[int]] = {}
    for pointer, width in loads:
        reached: set[str] = set()
        todo = {pointer}
        while todo:
            register = todo.pop()
            reached.add(register)
            todo |= sources.get(register, set()) - reached
        for name in [p for p in parameters if p and p in reached] or [""]:
            widths.setdefault(name, []).append(width)
    return widths
