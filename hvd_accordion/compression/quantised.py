"""QSGD: stochastic rounding to a few levels, bit-packed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hvd_accordion.comm.collectives import Rounds, Tensor
from hvd_accordion.compression.base import CompressionSpec, Context, Decoded, Memory, Message, size
from hvd_accordion.compression.two_hop import two_hop, two_hop_messages
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.utils import validation


@dataclass(frozen=True)
class DitherCode:
    """Encodes each bucket of `block` values as one fp32 scale and a signed level of `bits` bits per value.

    x is rounded at random to one of the two nearest multiples of scale/levels, such that the expectation is x. The decoder
    multiplies by `gain`. The scale is the bucket's max norm ("max") or its 2-norm ("l2", as in the paper).
    """

    levels: int
    block: int
    norm: str
    gain: float

    @property
    def bits(self) -> int:
        """Bits per value: ceil(log2(2 levels + 1))."""
        return math.ceil(math.log2(2 * self.levels + 1))

    def nbytes(self, count: int) -> int:
        return count // self.block * 4 + count * self.bits // 8

    def encode(self, ops: Ops, x: Tensor, seed: int) -> Tensor:
        rows, count = x.shape
        x = ops.reshape(x, (rows, count // self.block, self.block))
        if self.norm == "max":
            scale = ops.max(abs(x), -1, keepdims=True)
        else:
            peak = ops.max(abs(x), -1, keepdims=True)
            peak = ops.where(peak == 0, 1.0, peak)  # squares of x / peak cannot overflow
            scale = peak * ops.sum((x / peak) ** 2, -1, keepdims=True) ** 0.5
        scale = ops.cast(scale, "float32")
        step = ops.where(scale == 0, 1.0, scale) / self.levels
        dither = ops.reshape(ops.uniform(seed, rows * count, x), x.shape)
        level = ops.clip(ops.floor(x / ops.cast_like(step, x) + dither), -self.levels, self.levels) + self.levels
        packed = ops.pack_bits(ops.reshape(ops.cast(level, "uint8"), (rows, count)), self.bits)
        return ops.concat([ops.to_bytes(ops.reshape(scale, (rows, -1))), packed], -1)

    def decode(self, ops: Ops, code: Tensor, like: Tensor) -> Tensor:
        rows = code.shape[0]
        buckets = code.shape[1] // self.nbytes(self.block)
        count = buckets * self.block
        scale = ops.from_bytes(code[:, : 4 * buckets], "float32")
        level = ops.unpack_bits(code[:, 4 * buckets :], self.bits)
        level = ops.reshape(ops.cast_like(level, like) - self.levels, (rows, buckets, self.block))
        unit = ops.reshape(ops.cast_like(scale, like), (rows, buckets, 1)) * (self.gain / self.levels)
        return ops.reshape(level * unit, (rows, count))


@dataclass(frozen=True)
class QSGD(CompressionSpec):
    """QSGD (Alistarh et al. 2017, arXiv 1610.02132), by a two-hop allreduce of packed levels.

    Per bucket, C(x) = ||x|| sign(x) xi(x, s). It is unbiased, with E||C(x) - x||^2 <= omega ||x||^2. Under error feedback
    C(x) is divided by 1 + omega, which makes it a contraction.

    Args:
        levels: s, the number of positive levels, 1 to 127. s = 1 takes 2 bits per value, 7 takes 4, 127 takes 8.
        bucket_size: values that share one fp32 scale, a multiple of 8. Larger buckets send less and round more coarsely.
        norm: the scale of a bucket, "max" (smaller variance) or "l2" (as in the paper).
    """

    levels: int = 7
    bucket_size: int = 512
    norm: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_fields(levels=validation.integer("levels", self.levels, 1, 127))
        self._set_fields(bucket_size=validation.integer("bucket_size", self.bucket_size, 8))
        if self.bucket_size % 8:
            raise ValueError(f"bucket_size must be a multiple of 8, got {self.bucket_size!r}")
        self._set_fields(norm=validation.choice("norm", self.norm, ("max", "l2")))

    @property
    def omega(self) -> float:
        """The variance bound, for buckets of b values.

        "max": (sqrt(1 + (b-1)/s^2) - 1)/2, attained by one large value among equal small ones.
        "l2": min(b/s^2, sqrt(b)/s) (the paper's Lemma 3.1).
        """
        b, s = self.bucket_size, self.levels
        if self.norm == "max":
            return (math.sqrt(1 + (b - 1) / s**2) - 1) / 2
        return min(b / s**2, math.sqrt(b) / s)

    @property
    def code(self) -> DitherCode:
        """The wire format. Without error feedback the decoded values stay unbiased."""
        gain = 1 / (1 + self.omega) if self.error_feedback else 1.0
        return DitherCode(self.levels, self.bucket_size, self.norm, gain)

    def messages(self, shape: Sequence[int], dtype: Any, world_size: int) -> list[Message]:
        return two_hop_messages(self.code, size(shape), world_size)

    def delta(self, shape: Sequence[int]) -> float:
        """Returns 1/(1 + omega), which holds for C(x)/(1 + omega)."""
        return 1 / (1 + self.omega)

    def exchange(self, ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Decoded]:
        return (yield from two_hop(ops, values, memory, self.code, ctx))
