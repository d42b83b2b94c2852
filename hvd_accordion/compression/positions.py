"""Wire format of sparse entries: values, and sorted positions in two bytes each.

An index space is divided into blocks of at most 2^16 positions. A row of ascending positions is encoded as

* one int32 per block: how many of the row's positions lie before the block's end;
* the low 16 bits of each position: its offset within its block.

Entry j then lies in block #{ends <= j}. All functions take and return matrices with one row per rank.
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

BLOCK = 2**16  # positions that two bytes can tell apart
LARGEST_FINITE = {"float16": 65504.0, "bfloat16": (2 - 2.0**-7) * 2.0**127}


@functools.lru_cache(maxsize=4096)
def block_edges(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the start of each block of consecutive index spaces of these sizes, and the end of the last block."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return *(s + b for s, size in zip(starts, sizes, strict=True) for b in range(0, size, BLOCK)), sum(sizes)


def nbytes(entries: int, size: int, dtype: str) -> int:
    """Returns the bytes of a row of `entries` encoded entries in an index space of `size` positions."""
    return entries * (ITEMSIZE[dtype] + 2) + 4 * -(-size // BLOCK)


@dataclass(frozen=True)
class Code:
    """Encodes rows of entries as rows of bytes: values in `dtype`, block ends, offsets within blocks."""

    dtype: str
    edges: tuple[int, ...]

    def encode(self, ops: Ops, values: Tensor, positions: Tensor) -> Tensor:
        """Encodes values and positions of shape (rows, entries). Positions ascend in each row; only the last may repeat."""
        return ops.concat([ops.to_bytes(saturating_cast(ops, values, self.dtype)), self.pack(ops, positions)], 1)

    def decode(self, ops: Ops, code: Tensor, entries: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the values in the dtype of `like`, and the positions, both of shape (rows, entries)."""
        value_bytes = entries * ITEMSIZE[self.dtype]
        values = ops.cast_like(ops.from_bytes(code[:, :value_bytes], self.dtype), like)
        return values, self.unpack(ops, code[:, value_bytes:], entries)

    def round_trip(self, ops: Ops, values: Tensor) -> Tensor:
        """Returns the values as the receiver decodes them: rounded to `dtype`."""
        if self.dtype not in LARGEST_FINITE:
            return values
        return ops.cast_like(ops.from_bytes(ops.to_bytes(saturating_cast(ops, values, self.dtype)), self.dtype), values)

    def pack(self, ops: Ops, positions: Tensor) -> Tensor:
        """Encodes positions of shape (rows, entries) as block ends and 16-bit offsets."""
        rows, entries = positions.shape
        row = ops.reshape(ops.arange(rows, positions), (rows, 1))
        edges = ops.constant(self.edges, positions)
        # the rows are shifted into consecutive ranges, so that one binary search serves them all
        ascending = ops.reshape(positions + row * self.edges[-1], (-1,))
        last = ops.reshape(edges[1:] - 1 + row * self.edges[-1], (-1,))
        ends = ops.reshape(ops.searchsorted(ascending, last), (rows, -1)) - row * entries
        block = ops.searchsorted(edges[1:], ops.reshape(positions, (-1,)))
        offsets = positions - ops.reshape(ops.take(edges, block), (rows, entries))
        return ops.concat([ops.to_bytes(ends), ops.to_bytes(ops.cast(offsets, "int16"))], 1)

    def unpack(self, ops: Ops, code: Tensor, entries: int) -> Tensor:
        """Inverts `pack`: returns positions of shape (rows, entries)."""
        rows, blocks = code.shape[0], len(self.edges) - 1
        row = ops.reshape(ops.arange(rows, code), (rows, 1))
        ends = ops.reshape(ops.from_bytes(code[:, : 4 * blocks], "int32") + row * entries, (-1,))
        offsets = ops.cast(ops.from_bytes(code[:, 4 * blocks :], "int16"), "int32") & 0xFFFF
        block = ops.reshape(ops.searchsorted(ends, ops.arange(rows * entries, code)), (rows, entries)) - row * blocks
        starts = ops.take(ops.constant(self.edges, code), ops.reshape(block, (-1,)))
        return offsets + ops.reshape(starts, (rows, entries))


def saturating_cast(ops: Ops, x: Tensor, dtype: str) -> Tensor:
    """Casts x to `dtype`. Finite values beyond the range of a 16-bit float become its largest; NaN and Inf are kept."""
    if dtype in LARGEST_FINITE:
        x = ops.where(abs(x) == math.inf, x, ops.clip(x, -LARGEST_FINITE[dtype], LARGEST_FINITE[dtype]))
    return ops.cast(x, dtype)


@functools.lru_cache(maxsize=4096)
def multipliers(count: int, number: int = 256) -> tuple[int, ...]:
    """Returns factors a coprime to `count`, spread over [1, count): j -> (a j + b) mod count is then a bijection."""
    chosen = []
    for i in range(number):
        a = 1 + seeds.stable_hash("multiplier", count, i) % max(1, count - 1)
        while math.gcd(a, count) != 1:
            a = a % count + 1
        chosen.append(a)
    return tuple(chosen)


@dataclass(frozen=True)
class Shuffle:
    """The bijection i -> (a i + b) mod count. It spreads neighbouring large entries, such as a hot row, over all slices."""

    factor: int
    shift: Any  # an int, or an int64 scalar tensor inside a traced graph
    count: int

    @classmethod
    def of(cls, ctx: Context, count: int) -> Shuffle:
        """Returns the group's shuffle, equal on all ranks.

        The factor a is fixed for the group. The shift b changes with the step, so the entries that are last in their slice,
        and dropped first, change too.
        """
        factors = multipliers(count)
        chosen = seeds.stable_hash(ctx.seed, ctx.names[0], "factor") % len(factors)
        return cls(factors[chosen], ctx.key(ctx.names[0], "shift") % count, count)

    def forward(self, ops: Ops, index: Tensor) -> Tensor:
        """Maps int32 positions in the group to shuffled positions."""
        return ops.cast((ops.cast(index, "int64") * self.factor + self.shift) % self.count, "int32")

    def inverse(self, ops: Ops, shuffled: Tensor) -> Tensor:
        """Maps int32 shuffled positions back to positions in the group; `count` and more, which are padding, to `count`."""
        inverse_factor = pow(self.factor, -1, self.count)
        index = ops.cast((ops.cast(shuffled, "int64") - self.shift) * inverse_factor % self.count, "int32")
        return ops.where(shuffled < self.count, index, self.count)
