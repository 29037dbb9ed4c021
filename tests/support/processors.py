"""Processors as they were measured, so that what depends on them is the same on every machine."""

from titok_fast.processor.description import Processor


def _processor(name: str, sets: tuple[str, ...], limit: int, rates: str) -> Processor:
    """`rates`: GFLOP/s of one thread, in the order of _WAYS."""
    numbers = (1e9 * float(rate) for rate in rates.split())
    return Processor(name, sets, dict(zip(_WAYS, numbers, strict=True)), limit)


_WAYS = [
    f"{way} {name}"
    for name in ("float32", "bfloat16")
    for way in (
        *("linear plain", "linear packed", "linear int8 to", "convolution plain"),
        *("convolution int8 to", "attention sdpa", "attention products"),
    )
]
BF16 = _processor(
    "with bf16",
    ("avx2", "avx512", "vnni", "bf16"),
    127,
    "82 102 384 108 396 60 33   199 221 390 200 430 70 116",
)
NO_BF16 = _processor(
    "with AVX-512 and without bf16",
    ("avx2", "avx512"),
    64,
    "49 107 213 112 226 73 33   18 38 224 39 227 44 31",
)
AVX2 = _processor(
    "with AVX2 alone", ("avx2",), 64, "46 99 197 108 226 72 31   22 0 0.1 24 1.5 68 2.2"
)
