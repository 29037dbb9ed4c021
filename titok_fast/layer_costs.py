"""Costs of single layers, and how they add up; costs.py puts them together.

Counted are matrix products, convolutions and attention, one multiply-add as 2 FLOPs. Norms,
activations and sums are left out: about 1 % of the arithmetic.
"""

from collections.abc import Iterable
from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Cost:
    """Cost of a stage for one image; stages add up with `+`.

    Attributes:
        flops: floating point operations.
        parameters: weights and biases.
        float32_parameters: those of them kept in float32 whatever the model's dtype (codebooks).
        lookups: those of them read a row at a time (embedding tables), so not streamed.
        boundary: elements that enter and leave the stage; no implementation moves fewer.
        activations: elements read and written if each product, convolution and attention goes
            through memory, with norms, activations and sums fused into them.
        weight_reads: times the weights are streamed per batch; the sampler reads them every step.
    """

    flops: int = 0
    parameters: int = 0
    float32_parameters: int = 0
    lookups: int = 0
    boundary: int = 0
    activations: int = 0
    weight_reads: int = 1

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.parameters + other.parameters,
            self.float32_parameters + other.float32_parameters,
            self.lookups + other.lookups,
            self.boundary + other.boundary,
            self.activations + other.activations,
            max(self.weight_reads, other.weight_reads),
        )

    def weight_bytes(self, dtype: str = "float32") -> int:
        """Bytes the weights take in memory.

        Args:
            dtype: of the model, a key of DTYPE_BYTES; codebooks are float32 in any case.

        Raises:
            ValueError: another dtype.
        """
        cast = self.parameters - self.float32_parameters
        return cast * dtype_size(dtype) + 4 * self.float32_parameters

    def minimal_bytes(self, dtype: str = "float32", batch: int = 1) -> int:
        """Least memory traffic of a batch: weights streamed, inputs read, outputs written."""
        return self._streamed(dtype) + batch * self.boundary * dtype_size(dtype)

    def layerwise_bytes(self, dtype: str = "float32", batch: int = 1) -> int:
        """Memory traffic of a batch if every layer's activations go through memory."""
        return self._streamed(dtype) + batch * self.activations * dtype_size(dtype)

    def _streamed(self, dtype: str) -> int:
        looked_up = self.lookups * dtype_size(dtype)
        return self.weight_reads * (self.weight_bytes(dtype) - looked_up)


def dtype_size(dtype: str) -> int:
    """Bytes of an element.

    Raises:
        ValueError: a dtype that is not in DTYPE_BYTES.
    """
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype wants one of {', '.join(DTYPE_BYTES)}; got {dtype!r}")
    return DTYPE_BYTES[dtype]


def linear(rows: int, d_in: int, d_out: int, *, bias: bool = True) -> Cost:
    """A Linear on `rows` vectors."""
    return Cost(
        flops=2 * rows * d_in * d_out,
        parameters=d_in * d_out + bias * d_out,
        activations=rows * (d_in + d_out),
    )


def conv(
    pixels: int, c_in: int, c_out: int, k: int, *, bias: bool = True, pixels_in: int | None = None
) -> Cost:
    """A k x k convolution with `pixels` outputs per channel; as many inputs unless given."""
    return Cost(
        flops=2 * pixels * c_in * c_out * k * k,
        parameters=c_in * c_out * k * k + bias * c_out,
        activations=(pixels if pixels_in is None else pixels_in) * c_in + pixels * c_out,
    )


def norm(D: int) -> Cost:
    """Scale and shift of a LayerNorm or GroupNorm."""
    return Cost(parameters=2 * D)


def attention(L: int, D: int) -> Cost:
    """Scores and weighted sums of L tokens; any number of heads costs the same."""
    return Cost(flops=4 * L * L * D, activations=4 * L * D)


def block(L: int, D: int, hidden: int, *, qkv_bias: bool = True, skip: bool = False) -> Cost:
    """A transformer block on L tokens; with `skip` it first merges two inputs into one."""
    mixing = linear(L, D, 3 * D, bias=qkv_bias) + attention(L, D) + linear(L, D, D)
    mlp = linear(L, D, hidden) + linear(L, hidden, D)
    whole = norm(D) + mixing + norm(D) + mlp
    return whole + linear(L, 2 * D, D) if skip else whole


def resnet_blocks(pixels: int, c_in: int, c_out: int, count: int) -> Cost:
    """`count` blocks of MaskGIT-VQGAN; where channels change, the first has a third convolution."""
    first = norm(c_in) + conv(pixels, c_in, c_out, 3, bias=False)
    second = norm(c_out) + conv(pixels, c_out, c_out, 3, bias=False)
    shortcut = Cost() if c_in == c_out else conv(pixels, c_out, c_out, 1, bias=False)
    later = norm(c_out) + conv(pixels, c_out, c_out, 3, bias=False) + second
    return total([first, second, shortcut, *[later] * (count - 1)])


def total(costs: Iterable[Cost]) -> Cost:
    """The sum."""
    return sum(costs, Cost())
