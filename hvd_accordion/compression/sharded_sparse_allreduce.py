"""A sparse allreduce whose traffic per rank is independent of n, after Ok-Topk (Li, Hoefler 2022, arXiv 2201.07598).

Each rank owns a slice of the group's shuffled entries. A rank sends each of its k selected entries to the owner (alltoall).
The owner adds up what it received and sends the largest of its sums to all ranks (allgather). Messages are rows of
1.25 k/n entries, so a rank sends about 2.5 k entries whatever n is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hvd_accordion.comm.collectives import AllGather, AllToAll, Rounds, Tensor
from hvd_accordion.compression.base import Context, Decoded, Memory
from hvd_accordion.compression.positions import Code, Shuffle, block_edges
from hvd_accordion.ops.protocol import Ops

ROW_SLACK = 1.25  # length of a row relative to the mean number of entries it holds


def slice_size(count: int, world_size: int) -> int:
    """Returns the entries that each rank owns of `count`; the last rank may own fewer."""
    return -(-count // world_size)


def row_length(k: int, count: int, world_size: int) -> int:
    """Returns c = ceil(1.25 k/n), the entries in a row to or from an owner, at most the size of a slice."""
    return min(math.ceil(ROW_SLACK * k / world_size), slice_size(count, world_size))


@dataclass(frozen=True)
class Rows:
    """This rank's selected entries, sorted by owner: row r of `values` and `positions` goes to rank r.

    All rows have c entries. Unused ones hold the value 0 at the position behind the slice's last. Entries of an owner
    beyond c are not sent.
    """

    values: Tensor  # (n, c)
    positions: Tensor  # (n, c), within the owner's slice
    sources: Tensor  # (n c,), positions in the group; the group's size for unused entries


def rows_by_owner(
    ops: Ops, selected: Tensor, entries: Tensor, shuffle: Shuffle, ranks: int, length: int, width: int
) -> Rows:
    """Sorts the selected entries by owner.

    Args:
        ops: the framework's primitives.
        selected: positions in the group, (k,).
        entries: their values, (k,).
        shuffle: maps positions in the group to shuffled ones.
        ranks: n.
        length: the size of a slice.
        width: c, the entries of a row.
    """
    shuffled = shuffle.forward(ops, selected)
    order = ops.argsort(shuffled)
    shuffled, selected = ops.take(shuffled, order), ops.take(selected, order)
    # NaN and Inf must reach the other ranks even if their entry is dropped
    sorted_entries = ops.where(ops.all_finite([entries]), ops.take(entries, order), math.nan)
    bounds = ops.searchsorted(shuffled, ops.arange(ranks + 1, shuffled) * length - 1)
    slots = ops.reshape(bounds[:-1], (ranks, 1)) + ops.reshape(ops.arange(width, shuffled), (1, width))
    used = slots < ops.reshape(bounds[1:], (ranks, 1))
    slots = ops.reshape(ops.where(used, slots, 0), (-1,))
    starts = ops.reshape(ops.arange(ranks, shuffled) * length, (ranks, 1))
    values = ops.where(used, ops.reshape(ops.take(sorted_entries, slots), (ranks, width)), 0.0)
    positions = ops.where(used, ops.reshape(ops.take(shuffled, slots), (ranks, width)) - starts, length)
    sources = ops.where(ops.reshape(used, (-1,)), ops.take(selected, slots), shuffle.count)
    return Rows(values, positions, sources)


def sharded_sparse_allreduce(
    ops: Ops, values: list[Tensor], memory: list[Memory], selected: Tensor, entries: Tensor, dtype: str, ctx: Context
) -> Rounds[Decoded]:
    """Averages the ranks' selected entries and applies the largest c of each slice.

    Both hops are under error feedback. An entry that finds no space in its row stays in the sender's remainder. The slices
    shift with the step, so no entry is dropped every time. What an owner does not send, or loses in rounding, enters its
    own remainder, times n, because its next gradient has the weight 1/n. So the applied average plus the mean remainder
    equals the mean of the values.

    Args:
        ops: the framework's primitives.
        values: the gradients of the group's layers.
        memory: returned unchanged.
        selected: this rank's selected positions in the group, ascending.
        entries: the values at these positions.
        dtype: of the values on the wire.
        ctx: names, step, seed, rank and size.
    """
    flats = [ops.reshape(v, (-1,)) for v in values]
    n, count = ctx.size, sum(f.shape[0] for f in flats)
    length, c = slice_size(count, n), row_length(selected.shape[0], count, n)
    shuffle, code = Shuffle.of(ctx, count), Code(dtype, block_edges((length + 1,)))

    # hop 1: each owner receives the entries of its slice
    rows = rows_by_owner(ops, selected, entries, shuffle, n, length, c)
    message = code.encode(ops, rows.values, rows.positions)
    received, received_at = code.decode(ops, (yield AllToAll(message)), c, entries)

    # hop 2: all ranks receive the largest sums of each slice
    sums = ops.zeros(length + 1, entries)
    for r in range(n):  # in rank order, so that sums are bit-equal to those of the allgather algorithm
        sums = ops.scatter_add(sums, received_at[r], received[r] / n)
    largest = ops.top_k(sums[:length], c)
    message = code.encode(ops, ops.reshape(ops.take(sums, largest), (1, c)), ops.reshape(largest, (1, c)))
    applied, applied_at = code.decode(ops, (yield AllGather(ops.reshape(message, (-1,)))), c, entries)

    def averages() -> list[Tensor]:
        starts = ops.reshape(ops.arange(n, applied_at) * length, (n, 1))
        flat = ops.reshape(applied, (-1,))
        mean = ops.full(count + 1, ops.sum(flat * 0.0, 0, keepdims=False))  # all NaN if any applied value is NaN
        at = shuffle.inverse(ops, ops.reshape(applied_at + starts, (-1,)))
        return ops.unflatten(ops.scatter_add(mean, at, flat), values)

    def remainder() -> list[Tensor]:
        flat = ops.concat([*flats, ops.zeros(1, entries)], 0)
        flat = ops.scatter_add(flat, rows.sources, -ops.reshape(code.round_trip(ops, rows.values), (-1,)))
        unsent, unsent_by_sender = ops.scatter_add(sums, largest, -applied[ctx.rank]), []
        for r in range(n):  # an entry that several ranks sent is counted once
            unsent_by_sender.append(ops.take(unsent, received_at[r]))
            unsent = ops.put(unsent, received_at[r], 0.0)
        at = ops.reshape(ops.where(received_at < length, received_at + ctx.rank * length, count), (-1,))
        unsent = n * ops.concat(unsent_by_sender, 0)
        return ops.unflatten(ops.scatter_add(flat, shuffle.inverse(ops, at), unsent), values)

    def finish(_: Any, want_remainder: bool) -> tuple[list[Tensor], list[Tensor] | None]:
        mean = averages()
        return mean, remainder() if want_remainder else None

    return Decoded(finish, lambda _: memory, lambda: ops.all_finite([applied]))
