"""Entries on the wire: their values, and their positions in as few bytes as sorted ones need.

An index space is cut into blocks of at most 2^16 positions. A row of ascending positions travels as the low 16 bits of each,
its place in its block, and one int32 a block: how many of the row's positions lie before the block's end. Entry j is then
in block #{ends <= j}. All functions take and give matrices, one row for each rank.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from hvd_accordion.comm.collectives import Tensor
from hvd_accordion.compression.base import ITEMSIZE, Context
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.utils import seeds

BLOCK = 2**16
LARGEST = {"float16": 65504.0, "bfloat16": (2 - 2.0**-7) * 2.0**127}


@functools.lru_cache(maxsize=4096)
def block_edges(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where the blocks of index spaces that lie one behind the other begin, and where the last ends."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return *(s + b for s, size in zip(starts, sizes, strict=True) for b in range(0, size, BLOCK)), sum(sizes)


def nbytes(entries: int, size: int, dtype: str) -> int:
    """Of a row of entries of an index space of that size."""
    return entries * (ITEMSIZE[dtype] + 2) + 4 * -(-size // BLOCK)


@dataclass(frozen=True)
class Code:
    """Rows of entries as rows of bytes: values in `dtype`, ends of blocks, places in blocks."""

    dtype: str
    edges: tuple[int, ...]

    def encode(self, ops: Ops, values: Tensor, positions: Tensor) -> Tensor:
        """Each row's positions ascend; only the last ones may be equal."""
        return ops.concat([ops.to_bytes(narrow(ops, values, self.dtype)), self.pack(ops, positions)], 1)

    def decode(self, ops: Ops, code: Tensor, entries: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Values in like's dtype, and positions."""
        split = entries * ITEMSIZE[self.dtype]
        values = ops.cast_like(ops.from_bytes(code[:, :split], self.dtype), like)
        return values, self.unpack(ops, code[:, split:], entries)

    def arrives(self, ops: Ops, values: Tensor) -> Tensor:
        """The values as they are decoded."""
        if self.dtype not in LARGEST:
            return values
        return ops.cast_like(ops.from_bytes(ops.to_bytes(narrow(ops, values, self.dtype)), self.dtype), values)

    def pack(self, ops: Ops, positions: Tensor) -> Tensor:
        rows, entries = positions.shape
        row = ops.reshape(ops.arange(rows, positions), (rows, 1))
        edges = ops.constant(self.edges, positions)
        in_line = ops.reshape(positions + row * self.edges[-1], (-1,))  # one row behind the other: ascending as a whole
        last = ops.reshape(edges[1:] - 1 + row * self.edges[-1], (-1,))
        ends = ops.reshape(ops.searchsorted(in_line, last), (rows, -1)) - row * entries
        block = ops.searchsorted(edges[1:], ops.reshape(positions, (-1,)))
        places = positions - ops.reshape(ops.take(edges, block), (rows, entries))
        return ops.concat([ops.to_bytes(ends), ops.to_bytes(ops.cast(places, "int16"))], 1)

    def unpack(self, ops: Ops, code: Tensor, entries: int) -> Tensor:
        rows, blocks = code.shape[0], len(self.edges) - 1
        row = ops.reshape(ops.arange(rows, code), (rows, 1))
        ends = ops.reshape(ops.from_bytes(code[:, : 4 * blocks], "int32") + row * entries, (-1,))
        places = ops.cast(ops.from_bytes(code[:, 4 * blocks :], "int16"), "int32") & 0xFFFF
        block = ops.reshape(ops.searchsorted(ends, ops.arange(rows * entries, code)), (rows, entries)) - row * blocks
        starts = ops.take(ops.constant(self.edges, code), ops.reshape(block, (-1,)))
        return places + ops.reshape(starts, (rows, entries))


def narrow(ops: Ops, x: Tensor, dtype: str) -> Tensor:
    """x in `dtype`. Of 16-bit floats what lies beyond their range becomes the largest; NaN and Inf stay what they are."""
    if dtype in LARGEST:
        x = ops.where(abs(x) == math.inf, x, ops.clip(x, -LARGEST[dtype], LARGEST[dtype]))
    return ops.cast(x, dtype)


@functools.lru_cache(maxsize=4096)
def multipliers(count: int, many: int = 256) -> tuple[int, ...]:
    """Factors a that are coprime to `count`, spread over [1, count): each makes j -> a j + b mod count a bijection."""
    chosen = []
    for i in range(many):
        a = 1 + seeds.stable_hash("multiplier", count, i) % max(1, count - 1)
        while math.gcd(a, count) != 1:
            a = a % count + 1
        chosen.append(a)
    return tuple(chosen)


@dataclass(frozen=True)
class Shuffle:
    """The bijection i -> a i + b mod count, which spreads out what lies close together: hot rows, hot columns."""

    factor: int
    shift: Any  # an int, or an int64 scalar where a traced graph counts
    count: int

    @classmethod
    def of(cls, ctx: Context, count: int) -> Shuffle:
        """The group's, the same on all ranks. b changes from step to step: what is last in its slice is first in another."""
        factors = multipliers(count)
        chosen = seeds.stable_hash(ctx.seed, ctx.names[0], "factor") % len(factors)
        return cls(factors[chosen], ctx.key(ctx.names[0], "shift") % count, count)

    def there(self, ops: Ops, index: Tensor) -> Tensor:
        return ops.cast((ops.cast(index, "int64") * self.factor + self.shift) % self.count, "int32")

    def back(self, ops: Ops, place: Tensor) -> Tensor:
        back = pow(self.factor, -1, self.count)
        return ops.cast((ops.cast(place, "int64") - self.shift) * back % self.count, "int32")
