"""An allreduce of coded values, for codes that no collective can sum: 16-bit floats, packed levels.

Each rank codes its vector in n slices and sends slice r to rank r (alltoall), which decodes and averages them in fp32,
codes the mean again and sends it to all (allgather): about twice the coded vector per rank, whatever n.
"""

from __future__ import annotations

from typing import Any, Protocol

from hvd_accordion.comm.collectives import AllGather, AllToAll, Rounds, Tensor
from hvd_accordion.compression.base import Context, Decoded, Memory, Message
from hvd_accordion.ops.protocol import Ops


class Code(Protocol):
    """Codes rows of values into rows of bytes, each row by itself, `block` values at a time."""

    @property
    def block(self) -> int: ...

    def nbytes(self, count: int) -> int:
        """Bytes of `count` coded values; `count` is a multiple of `block`."""
        ...

    def encode(self, ops: Ops, x: Tensor, seed: int) -> Tensor: ...

    def decode(self, ops: Ops, code: Tensor, like: Tensor) -> Tensor: ...


def slice_size(count: int, world_size: int, block: int) -> int:
    """Values in each rank's slice of a vector of `count` values: whole blocks."""
    return -(-count // (world_size * block)) * block


def two_hop_messages(code: Code, count: int, world_size: int) -> list[Message]:
    """What one rank hands to the network for `count` values."""
    part = code.nbytes(slice_size(count, world_size, code.block))
    return [(AllToAll, part * world_size), (AllGather, part)]


def two_hop(ops: Ops, values: list[Tensor], memory: list[Memory], code: Code, ctx: Context) -> Rounds[Decoded]:
    """The mean of the ranks' coded values, coded again on the second hop.

    Error feedback on both hops: what the owner of a slice loses in coding the mean enters its own remainder, times n
    since its next gradient counts 1/n. So applied + mean of the remainders = given, and no state belongs to a slice.
    """
    flat = ops.flatten(values)
    count, n = flat.shape[0], ctx.size
    part = slice_size(count, n, code.block)
    x = ops.pad(flat, n * part, (n, part))
    first = code.encode(ops, x, ctx.key(ctx.names[0], "hop1", ctx.rank))
    received = code.decode(ops, (yield AllToAll(first)), flat)
    own = ops.sum(received, 0, keepdims=True) / n
    second = code.encode(ops, own, ctx.key(ctx.names[0], "hop2", ctx.rank))
    gathered = yield AllGather(ops.reshape(second, (-1,)))
    mean = code.decode(ops, gathered, flat)

    def split(_: Any, remainder: bool) -> tuple[list[Tensor], list[Tensor] | None]:
        averages = ops.unflatten(ops.reshape(mean, (-1,)), values)
        if not remainder:
            return averages, None
        left = x - code.decode(ops, first, flat)
        left = ops.add_row(left, ctx.rank, n * (own[0] - mean[ctx.rank]))
        return averages, ops.unflatten(ops.reshape(left, (-1,)), values)

    return Decoded(split, lambda _: memory, lambda: ops.all_finite([mean]))
