"""An allreduce of encoded values, for encodings that no collective can sum: 16-bit floats, packed levels.

Each rank encodes its vector in n slices and sends slice r to rank r (alltoall). Rank r decodes and averages the slices in
fp32, encodes the mean and sends it to all ranks (allgather). A rank sends about twice the encoded vector, whatever n is.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """Averages the ranks' encoded values, all layers as one vector. See `average_rows`."""
    flat = ops.flatten(values)
    length = slice_size(flat.shape[0], ctx.size, code.block)
    x = ops.pad(flat, ctx.size * length, (ctx.size, length))
    first = code.encode(ops, x, ctx.key(ctx.names[0], "hop1", ctx.rank))
    mean, lost = yield from average_rows(ops, first, flat, code, code, ctx)

    def finish(_: Any, want_remainder: bool) -> tuple[list[Tensor], list[Tensor] | None]:
        averages = ops.unflatten(ops.reshape(mean, (-1,)), values)
        if not want_remainder:
            return averages, None
        remainder = ops.add_row(x - code.decode(ops, first, flat), ctx.rank, lost())
        return averages, ops.unflatten(ops.reshape(remainder, (-1,)), values)

    return Decoded(finish, lambda _: memory, lambda: ops.all_finite([mean]))


def average_rows(
    ops: Ops, first: Tensor, like: Tensor, code: Code, owners_code: Code, ctx: Context
) -> Rounds[tuple[Tensor, Callable[[], Tensor]]]:
    """Averages the ranks' encoded matrices of one row per rank. The owner of a row encodes its mean for the second hop.

    Both hops are under error feedback. The owner adds its row's second encoding error to its own remainder, times n,
    because its next gradient has the weight 1/n. So the applied average plus the mean remainder equals the mean of the
    values, and a row needs no state of its own.

    Args:
        first: this rank's matrix, encoded by `code`.
        like: has the dtype of the result.
        owners_code: encodes the row that this rank owns.

    Returns:
        The mean matrix, equal on all ranks, and a function that returns n times the second encoding error of the own row.
    """
    n = ctx.size
    received = code.decode(ops, (yield AllToAll(first)), like)
    own = ops.sum(received, 0, keepdims=True) / n
    second = owners_code.encode(ops, own, ctx.key(ctx.names[0], "hop2", ctx.rank))
    mean = code.decode(ops, (yield AllGather(ops.reshape(second, (-1,)))), like)
    return mean, lambda: n * (own[0] - mean[ctx.rank])
