"""A sparse allreduce whose traffic does not grow with the ranks, after Ok-Topk (Li, Hoefler 2022, arXiv 2201.07598).

Each rank owns a slice of the group's shuffled entries. Of the k entries that a rank picked, each owner gets its own
(alltoall), adds up what it got and sends the largest of its sums to all (allgather): with rows of 1.25 k/n entries about
2.5 k entries per rank, whatever n.
"""

from __future__ import annotations

import math
from typing import Any

from hvd_accordion.comm.collectives import AllGather, AllToAll, Rounds, Tensor
from hvd_accordion.compression.base import Context, Decoded, Memory
from hvd_accordion.compression.positions import Code, Shuffle, block_edges
from hvd_accordion.ops.protocol import Ops

ROOM = 1.25  # entries in a row, of those that it holds on average


def slice_size(count: int, world_size: int) -> int:
    """Entries that each rank owns of `count`; the last may own fewer."""
    return -(-count // world_size)


def row_length(k: int, count: int, world_size: int) -> int:
    """Entries in a row to or from an owner: c = ceil(1.25 k/n), no more than the owner has."""
    return min(math.ceil(ROOM * k / world_size), slice_size(count, world_size))


def sharded_sparse_allreduce(
    ops: Ops, values: list[Tensor], memory: list[Memory], where: Tensor, mine: Tensor, dtype: str, ctx: Context
) -> Rounds[Decoded]:
    """The mean of the ranks' picks, of which the largest c of each slice are applied.

    Error feedback on both hops: what finds no place in a row stays in the sender's remainder, and as slices shift from
    step to step, the same entry does not go without for ever; what an owner does not send, or loses in rounding, enters
    its own, times n since its next gradient counts 1/n. So applied + mean of the remainders = given. All rows have one
    length; unused slots hold 0 for the position behind the slice's last.

    Args:
        where: this rank's picks as positions in the group, ascending.
        mine: their values.
    """
    flats = [ops.reshape(v, (-1,)) for v in values]
    n, count = ctx.size, sum(f.shape[0] for f in flats)
    part, c = slice_size(count, n), row_length(where.shape[0], count, n)
    shuffle, code = Shuffle.of(ctx, count), Code(dtype, block_edges((part + 1,)))

    # hop 1: rows[r] holds the picks that rank r owns
    place = shuffle.there(ops, where)
    order = ops.argsort(place)
    place, where = ops.take(place, order), ops.take(where, order)
    picked = ops.where(ops.all_finite([mine]), ops.take(mine, order), math.nan)  # must show, whatever finds a place
    bounds = ops.searchsorted(place, ops.arange(n + 1, place) * part - 1)
    slots = ops.reshape(bounds[:-1], (n, 1)) + ops.reshape(ops.arange(c, place), (1, c))
    held = slots < ops.reshape(bounds[1:], (n, 1))
    slots = ops.reshape(ops.where(held, slots, 0), (-1,))
    start = ops.reshape(ops.arange(n, place) * part, (n, 1))
    rows = ops.where(held, ops.reshape(ops.take(picked, slots), (n, c)), 0.0)
    places = ops.where(held, ops.reshape(ops.take(place, slots), (n, c)) - start, part)
    got, where_got = code.decode(ops, (yield AllToAll(code.encode(ops, rows, places))), c, mine)

    # hop 2: the largest of this rank's slice
    sums = ops.zeros(part + 1, mine)
    for r in range(n):  # rank by rank, as without the second hop
        sums = ops.scatter_add(sums, where_got[r], got[r] / n)
    best = ops.top_k(sums[:part], c)
    second = code.encode(ops, ops.reshape(ops.take(sums, best), (1, c)), ops.reshape(best, (1, c)))
    applied, where_applied = code.decode(ops, (yield AllGather(ops.reshape(second, (-1,)))), c, mine)

    def home(place: Tensor) -> Tensor:
        """Positions in the group; those behind its end become its size."""
        return ops.where(place < count, shuffle.back(ops, place), count)

    def split(_: Any, remainder: bool) -> tuple[list[Tensor], list[Tensor] | None]:
        largest = ops.reshape(applied, (-1,))
        mean = ops.full(count + 1, ops.sum(largest * 0.0, 0, keepdims=False))  # NaN everywhere if there is any
        mean = ops.scatter_add(mean, home(ops.reshape(where_applied + start, (-1,))), largest)
        averages = ops.unflatten(mean, values)
        if not remainder:
            return averages, None
        left = ops.concat([*flats, ops.zeros(1, mine)], 0)
        sent = ops.reshape(code.arrives(ops, rows), (-1,))
        left = ops.scatter_add(left, ops.where(ops.reshape(held, (-1,)), ops.take(where, slots), count), -sent)
        rest, dropped = ops.scatter_add(sums, best, -applied[ctx.rank]), []
        for r in range(n):  # an entry that several ranks sent is taken once
            dropped.append(ops.take(rest, where_got[r]))
            rest = ops.put(rest, where_got[r], 0.0)
        at = ops.reshape(ops.where(where_got < part, where_got + ctx.rank * part, count), (-1,))
        left = ops.scatter_add(left, home(at), n * ops.concat(dropped, 0))
        return averages, ops.unflatten(left, values)

    return Decoded(split, lambda _: memory, lambda: ops.all_finite([applied]))
