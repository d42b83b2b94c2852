"""An allreduce of encoded values, for encodings that no collective can sum: 16-bit floats, packed levels.

Each rank encodes its vector in n slices and sends slice r to rank r (alltoall). Rank r decodes and averages the slices in
fp32, encodes the mean and sends it to all ranks (allgather). A rank sends about twice the encoded vector, whatever n is.
"""

from __future__ import annotations

from typing import Any, Protocol

from hvd_accordion.comm.collectives import AllGather, AllToAll, Rounds, Tensor
from hvd_accordion.compression.base import Context, Decoded, Memory, Message
from hvd_accordion.ops.protocol import Ops


class Code(Protocol):
    """Encodes rows of values as rows of bytes, each row by itself, `block` values at a time."""

    @property
    def block(self) -> int:
        """Values that are encoded together."""
        ...

    def nbytes(self, count: int) -> int:
        """Returns the bytes of `count` encoded values; `count` is a multiple of `block`."""
        ...

    def encode(self, ops: Ops, x: Tensor, seed: int) -> Tensor:
        """Encodes a matrix of values (rows, count) as uint8 (rows, nbytes(count))."""
        ...

    def decode(self, ops: Ops, code: Tensor, like: Tensor) -> Tensor:
        """Decodes uint8 (rows, nbytes(count)) to values (rows, count) in the dtype of `like`."""
        ...


def slice_size(count: int, world_size: int, block: int) -> int:
    """Returns the values in each rank's slice of a vector of `count` values, rounded up to whole blocks."""
    return -(-count // (world_size * block)) * block


def two_hop_messages(code: Code, count: int, world_size: int) -> list[Message]:
    """Returns the collectives and payload bytes of one rank for `count` values."""
    slice_bytes = code.nbytes(slice_size(count, world_size, code.block))
    return [(AllToAll, slice_bytes * world_size), (AllGather, slice_bytes)]


def two_hop(ops: Ops, values: list[Tensor], memory: list[Memory], code: Code, ctx: Context) -> Rounds[Decoded]:
    """Averages the ranks' encoded values. The owner of each slice encodes the mean again for the second hop.

    Both hops are under error feedback. The owner adds its slice's second encoding error to its own remainder, times n,
    because its next gradient has the weight 1/n. So the applied average plus the mean remainder equals the mean of the
    values, and a slice needs no state of its own.
    """
    flat = ops.flatten(values)
    count, n = flat.shape[0], ctx.size
    length = slice_size(count, n, code.block)
    x = ops.pad(flat, n * length, (n, length))
    first = code.encode(ops, x, ctx.key(ctx.names[0], "hop1", ctx.rank))
    received = code.decode(ops, (yield AllToAll(first)), flat)
    own = ops.sum(received, 0, keepdims=True) / n
    second = code.encode(ops, own, ctx.key(ctx.names[0], "hop2", ctx.rank))
    gathered = yield AllGather(ops.reshape(second, (-1,)))
    mean = code.decode(ops, gathered, flat)

    def finish(_: Any, want_remainder: bool) -> tuple[list[Tensor], list[Tensor] | None]:
        averages = ops.unflatten(ops.reshape(mean, (-1,)), values)
        if not want_remainder:
            return averages, None
        remainder = x - code.decode(ops, first, flat)
        remainder = ops.add_row(remainder, ctx.rank, n * (own[0] - mean[ctx.rank]))
        return averages, ops.unflatten(ops.reshape(remainder, (-1,)), values)

    return Decoded(finish, lambda _: memory, lambda: ops.all_finite([mean]))
