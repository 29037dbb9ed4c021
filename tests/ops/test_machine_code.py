"""Inspection of machine code: which arguments are streams, and how they are read."""

from typing import Any

import pytest
from support.bench_scripts import scripts

(machine_code,) = scripts("lib.machine_code")

# 32 threads; x is a stream of 32 x 8 float32, w a row of weights, n a number of rows
TTIR = """
  tt.func public @kernel(%x_ptr: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("x_ptr"(#loc)), \
%n: i32 loc("n"(#loc)), %w_ptr: !tt.ptr<f32> loc("w_ptr"(#loc))) {
    %pid = tt.get_program_id AXIS : i32 loc(#loc1)
    %first = arith.muli %pid, %c32_i32 : i32 loc(#loc1)
    %sum = scf.for %row = %first to %n step %c1_i32 iter_args(%acc = %cst) -> (f32)  : i32 {
      %at = LENGTHEN
      %rows = tt.splat %at : OFFSET -> tensor<32x8xOFFSET> loc(#loc2)
      %base = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<32x8x!tt.ptr<f32>> loc(#loc2)
      %ptrs = tt.addptr %base, %rows : tensor<32x8x!tt.ptr<f32>>, tensor<32x8xOFFSET> loc(#loc2)
      %x = tt.load %ptrs, %mask, %cst : tensor<32x8x!tt.ptr<f32>> loc(#loc3)
    } loc(#loc3)
    %w_base = tt.splat %w_ptr : !tt.ptr<f32> -> tensor<512x!tt.ptr<f32>> loc(#loc2)
    %w = tt.load %w_base : tensor<512x!tt.ptr<f32>> loc(#loc3)
    %one = tt.load %x_ptr : !tt.ptr<f32> loc(#loc3)
  }
"""
PTX = """
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r1, [kernel_param_1];
	ld.param.b64 	%rd2, [kernel_param_2];
	ld.param.b64 	%rd9, [kernel_param_3];
	mad.wide.s32 	%rd3, %r1, 4, %rd1;
	mov.b64 	{%r2, %r3}, %rd3;
	shfl.sync.idx.b32 	%r4|%p1, %r2, 0, 31, -1;
	shfl.sync.idx.b32 	%r5|%p1, %r3, 0, 31, -1;
	mov.b64 	%rd4, {%r4, %r5};
	@%p2 TILE [ %rd4 + 0 ];
	@%p2 cp.async.cg.shared.global [ %r6 + 0 ], [ %rd3 + 64 ], 0x10, %r7;
	ld.global.b32 { %r8 }, [ %rd2 + 0 ];
	ld.global.b32 { %r9 }, [ %rd1 + 0 ];
	fma.rn.f32 	%r10, %r9, %r8, %r9;
"""
LOG = "0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\nUsed 40 registers"


WIDE = "ld.global.v4.b32 { %r1, %r2, %r3, %r4 },"


def read(
    *, axis: str = "x", long: bool = True, tile: str = WIDE, ptx: str = PTX, threads: int = 32
) -> Any:
    lengthen = "arith.extsi %row : i32 to i64" if long else "arith.addi %row, %c1_i32 : i32"
    ttir = TTIR.replace("AXIS", axis).replace("OFFSET", "i64" if long else "i32")
    ttir, ptx = ttir.replace("LENGTHEN", lengthen), ptx.replace("TILE", tile)
    return machine_code.read_machine_code(ttir, ptx, LOG, shared=64, threads=threads)


def test_figures() -> None:
    got = read()
    assert (got.registers, got.spill_bytes, got.stack_bytes, got.shared_bytes) == (40, 12, 0, 64)
    assert (got.mma, got.fma) == (0, 1)
    assert (got.loads_128, got.loads_narrow) == (2, 2)


def test_a_stream_that_is_read_well() -> None:
    """Neither the weights nor the single value of x, both narrow, are tiles of a stream."""
    got = read()
    assert got.streams == ["x_ptr"]
    assert got.narrow_streams == []
    assert got.short_offsets == []


@pytest.mark.parametrize(
    "tile", ["ld.global.v2.b32 { %r1, %r2 },", "ld.global.L1::evict_last.b64 { %rd8 },"]
)
def test_a_tile_in_narrow_loads(tile: str) -> None:
    """One load of two suffices; its address went from lane to lane on the way."""
    assert read(tile=tile).narrow_streams == ["x_ptr"]


def test_an_address_out_of_shared_memory_may_be_any() -> None:
    shared = PTX.replace("mov.b64 	%rd4, {%r4, %r5};", "ld.shared.b64 	%rd4, [%r4];")
    assert shared != PTX
    assert read(ptx=shared).narrow_streams == []
    assert read(ptx=shared, tile="ld.global.b32 { %r1 },").narrow_streams == ["x_ptr"]


def test_rows_in_32_bits() -> None:
    """A loop from the first program id on: the offset follows it. The second id ends at 65535."""
    assert read(long=False).short_offsets == ["x_ptr"]
    assert read(long=False, axis="y").short_offsets == []


def test_a_tile_too_small_for_its_threads_is_no_stream() -> None:
    assert read(tile="ld.global.b32 { %r1 },", threads=128).streams == []
