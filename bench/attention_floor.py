"""Attention on paper: what each back end moves and multiplies, and what our own kernel could win.

    python bench/attention_floor.py [--device a100-sxm-80gb] [--images 128] [--json FILE]

For every published sequence length: useful work, work after padding rows and keys to the tiles of
each back end and head_dim to a power of two, bytes, launches; beside the linear layers of the same
block, which set the pace. The gain is the share of a block's time that an attention at its floor
would save over the padded one: the most that a short-sequence kernel of our own can bring.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.harness import table, write_json

from titok_fast.costs import DEVICES


@dataclass(frozen=True)
class Shape:
    """Self-attention of one block: L positions, H heads of d channels, rows per image."""

    model: str
    L: int
    H: int
    d: int
    passes: int  # sequences per image in a batch: 2 in a guided generator step


@dataclass(frozen=True)
class Backend:
    """How a back end cuts the problem: tiles of rows and keys, padded head_dim, launches."""

    name: str
    rows: int
    keys: int
    pad_head: bool
    launches: int
    materialises: bool = False  # the (L, L) weights go through memory


SHAPES = (
    Shape("generator of L-32", 33, 16, 48, 2),
    Shape("generator of B-64", 65, 16, 48, 2),
    Shape("generator of S-128", 129, 16, 64, 2),
    Shape("tokenizer L-32", 289, 16, 64, 1),
    Shape("tokenizer B-64", 321, 12, 64, 1),
    Shape("tokenizer S-128", 385, 8, 64, 1),
    Shape("decoder SL-256", 513, 16, 64, 1),
)
# tile sizes of the forward kernels for head_dim up to 64 on sm_80, from their sources: torch's
# SDPA calls flash-attn 2 (128 x 128) or CUTLASS (64 x 64); xformers calls the same two
BACKENDS = (
    Backend("sdpa flash / flash-attn 2", 128, 128, True, 1),
    Backend("sdpa efficient / xformers", 64, 64, False, 1),
    Backend("sdpa math", 1, 1, False, 3, materialises=True),
    Backend("ours, one program per head", 16, 16, True, 1),
)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def row(shape: Shape, backend: Backend, images: int, device: str) -> dict[str, Any]:
    """One line: bfloat16, one block, `images` images."""
    card = DEVICES[device]
    peak, bandwidth = card.tflops["bfloat16"] * 1e12, card.gbps * 1e9
    B, L, H, d = images * shape.passes, shape.L, shape.H, shape.d
    D = H * d
    useful = 4 * B * H * L * L * d
    padded_d = 64 if backend.pad_head and d < 64 else d
    padded = 4 * B * H * _up(L, backend.rows) * _up(L, backend.keys) * padded_d
    moved = 2 * B * L * 4 * D  # q, k, v in, the mix out
    if backend.materialises:
        moved += 2 * B * H * L * L * 4  # scores out and in, weights out and in
    linear = 24 * B * L * D * D / peak
    floor = max(useful / peak, 2 * B * L * 4 * D / bandwidth)
    seconds = max(padded / peak, moved / bandwidth)
    return {
        "model": shape.model,
        "L": L,
        "head_dim": d,
        "back end": backend.name,
        "padding": padded / useful,
        "launches": backend.launches,
        "MiB": moved / 2**20,
        "us": 1e6 * seconds,
        "floor us": 1e6 * floor,
        "linear layers us": 1e6 * linear,
        "gain": (seconds - floor) / (seconds + linear),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", choices=tuple(DEVICES), default="a100-sxm-80gb")
    p.add_argument("--images", type=int, default=128, metavar="B", help="batch (default: 128)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    args = p.parse_args(argv)
    if args.images < 1:
        p.error(f"--images wants at least 1; got {args.images}")
    rows = [row(s, b, args.images, args.device) for s in SHAPES for b in BACKENDS]
    text = {"padding": "{:.2f}", "MiB": "{:,.0f}", "gain": "{:.1%}"}
    text |= dict.fromkeys(("us", "floor us", "linear layers us"), "{:,.0f}")
    shown = [{k: text.get(k, "{}").format(v) for k, v in r.items()} for r in rows]
    print(f"{args.device}, bfloat16, one block, {args.images} images; data-sheet peaks\n")
    print(table(shown, tuple(rows[0])))
    if args.json:
        record = {"benchmark": "attention_floor", "device": args.device, "images": args.images}
        shapes = [asdict(s) for s in SHAPES]
        write_json(args.json, record | {"shapes": shapes, "cases": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
