"""What a compiled kernel says of itself: the assembler's figures, and how it reads its streams.

A stream is an argument that the kernel is there to read: of the loads whose tile has the most
dimensions, those that are large enough for every thread to take 16 bytes. What is left out are
parameters (a row of weights beside a tile of pixels, one seed) and single values picked afterwards.
Which arguments these are stands in Triton's first representation, in which pointers still have
names and tiles shapes; how wide the loads became stands in the PTX, followed back to the arguments.
"""

import re
from dataclasses import dataclass, field, replace
from math import prod

_WIDE = 16  # bytes: the most that one load instruction takes for a thread before Blackwell


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
        short_offsets: arguments, read or written, whose tiles are found by 32-bit offsets though
            their place follows the first program id: that is where rows are without bound.
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


def read_machine_code(ttir: str, ptx: str, log: str, shared: int, threads: int) -> MachineCode:
    """Gather the figures.

    Args:
        ttir: Triton's representation of the kernel before any layout is chosen.
        ptx: of the same kernel.
        log: what `ptxas -v` printed for it.
        shared: bytes of shared memory per program.
        threads: of one program.
    """

    def total(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, log))

    header = next(line for line in ttir.splitlines() if "tt.func public" in line)
    arguments = re.findall(r"%(\w+): (!tt\.ptr)?", header)
    accesses = _accesses(ttir, [name for name, pointer in arguments if pointer])
    # parameters of the PTX are in the same order; scalars are none of a load's pointers
    widths = _load_widths(ptx, [name if pointer else "" for name, pointer in arguments])
    every = [width for loads in widths.values() for width in loads]
    rank = max((len(a.tile) for a in accesses if a.reads), default=0)
    tiles = [a for a in accesses if len(a.tile) == rank and a.size >= _WIDE * threads]
    streams = {a.argument for a in tiles if a.reads}
    return MachineCode(
        registers=max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=0),
        spill_bytes=total(r"(\d+) bytes spill stores") + total(r"(\d+) bytes spill loads"),
        stack_bytes=max((int(n) for n in re.findall(r"(\d+) bytes stack frame", log)), default=0),
        shared_bytes=shared,
        mma=len(re.findall(r"\bmma\.sync|\bwgmma\.mma_async", ptx)),
        fma=len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32(?:x2)?\b", ptx)),
        loads_128=sum(width >= _WIDE for width in every),
        loads_narrow=sum(width < _WIDE for width in every),
        streams=sorted(streams),
        narrow_streams=sorted(s for s in streams if _narrow(s, accesses, widths)),
        short_offsets=sorted({a.argument for a in tiles if a.follows_x and not a.long}),
    )


def _narrow(stream: str, accesses: list["_Access"], widths: dict[str, list[int]]) -> bool:
    """Whether a stream's tiles are read narrowly; a single value of it may be."""
    single = sum(a.argument == stream and a.reads and not a.tile for a in accesses)
    loads = widths.get(stream, []) + widths.get("", [])
    narrow = sum(width < _WIDE for width in loads)
    return narrow > single or narrow == len(loads)


@dataclass(frozen=True)
class _Value:
    """What is known of a value: the pointer it stems from, and how its place was reckoned."""

    argument: str = ""
    follows_x: bool = False  # on the first program id
    long: bool = False  # some offset had 64 bits


@dataclass(frozen=True)
class _Access(_Value):
    """One load or store in the first representation; `tile` is () for a single value."""

    reads: bool = False
    tile: tuple[int, ...] = ()
    size: int = 0  # bytes of a tile


_BITS = {"i1": 8, "bf16": 16}  # in memory; of other types all but the first letter
_REGISTER = r"%rd?\d+"
_OPERATION = re.compile(r'\s*(?:(%\w+)(?::\d+)? = )?"?([a-z]\w*\.\w+)"?(.*)')


def _accesses(ttir: str, pointers: list[str]) -> list[_Access]:
    """The kernel's loads and stores.

    One pass in the order of the text: a name is defined before it is used, and is used again only
    where the first of that name is out of sight.
    """
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
            value = replace(operands[0], follows_x=value.follows_x)
            if re.search(r"(?:[ x])i64>?(?: loc|$)", rest.rstrip()):
                value = replace(value, long=True)
        elif operation in ("tt.load", "tt.store"):
            found.append(_access(operands[0], operation == "tt.load", rest))
            value = _Value(follows_x=value.follows_x)  # what was read is no pointer
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
    """Bytes per thread of each global load instruction, by the pointer that it reads through.

    Args:
        ptx: the kernel.
        parameters: of each parameter the pointer's name, "" for a scalar.

    Returns:
        Widths by name; under "" those of loads whose address came out of shared memory.
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
            continue  # what is read is no pointer that could be followed
        # a pointer may be cut in two registers, to be passed from lane to lane
        elif target := re.match(r"(\{[^}]*\}|[^,{]*),(.*)", rest):
            given = set(re.findall(_REGISTER, target[2]))
            if parameter := re.search(r"_param_(\d+)\]", target[2]):
                given |= set(parameters[int(parameter[1]) :][:1])
            for register in re.findall(_REGISTER, target[1]):
                sources.setdefault(register, set()).update(given)

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
