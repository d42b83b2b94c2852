"""Sparsification: a share of each layer's entries travels, the rest waits in the residual."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from hvd_accordion.comm.collectives import AllGather, AllReduce, AllToAll, Rounds, Tensor
from hvd_accordion.compression import positions
from hvd_accordion.compression.base import (
    ITEMSIZE,
    CompressionSpec,
    Context,
    Decoded,
    Memory,
    Message,
    dtype_name,
    size,
)
from hvd_accordion.compression.positions import multipliers
from hvd_accordion.compression.sharded_sparse_allreduce import row_length, sharded_sparse_allreduce, slice_size
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.utils import validation


def kept(ratio: float, count: int) -> int:
    """k = ceil(ratio d): at least one entry."""
    return max(1, math.ceil(ratio * count))


def value_bytes(dtype: Any) -> int:
    return max(4, ITEMSIZE[dtype_name(dtype)])  # 16-bit gradients are exchanged in fp32


def offsets(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]


def unsent(ops: Ops, flats: list[Tensor], picks: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """The values with zeros where an entry was picked, in their own shapes."""
    left = [ops.put(flat, pick, 0.0) for flat, pick in zip(flats, picks, strict=True)]
    return [ops.reshape(flat, value.shape) for flat, value in zip(left, values, strict=True)]


@dataclass(frozen=True)
class _Sparse(CompressionSpec):
    ratio: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self._checked(ratio=validation.real("ratio", self.ratio, 0.0, 1.0))

    def delta(self, shape: Sequence[int]) -> float:
        """k/d."""
        return kept(self.ratio, size(shape)) / size(shape)


@dataclass(frozen=True)
class TopK(_Sparse):
    """The k = ceil(ratio d) entries of each layer that are largest in magnitude (Stich et al. 2018, arXiv 1809.07599).

    "allgather": each rank's entries go to all others, which add them in rank order: (n-1) k entries, up to n k applied.
    "two_step": sums are made by the owners of slices, which send on the largest (see two_step.py): at most about 2.5 k
    entries whatever n, and at most 1.25 k applied. The rest waits in the residuals.

    An entry is its value and two bytes of position, and there are 4 bytes for each 65,536 entries of a layer.

    Args:
        ratio: share of the entries that is sent, in (0, 1].
        values: what values travel as. "float32" is float64 for float64 gradients. With "float16" or "bfloat16" what
            rounding loses stays in the residual, and so does what is beyond their range (float16: 6e-8 to 65504).
        algorithm: "auto" takes two_step among 4 ranks or more, where it sends less for all but a handful of entries.
    """

    _: KW_ONLY
    values: str = "float32"
    algorithm: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._checked(values=validation.choice("values", self.values, ("float32", "float16", "bfloat16")))
        self._checked(algorithm=validation.choice("algorithm", self.algorithm, ("auto", "allgather", "two_step")))

    def is_sharded(self, world_size: int) -> bool:
        return self.algorithm == "two_step" or (self.algorithm == "auto" and world_size >= 4)

    def wire_dtype(self, dtype: Any) -> str:
        """What values travel as."""
        return "float64" if self.values == "float32" and dtype_name(dtype) == "float64" else self.values

    def messages(self, shape: Sequence[int], dtype: Any, world_size: int) -> list[Message]:
        """Those of the layer alone; layers of a group share rows and blocks, and take a few bytes less."""
        d, dtype = size(shape), self.wire_dtype(dtype)
        k = kept(self.ratio, d)
        if not self.is_sharded(world_size):
            return [(AllGather, positions.nbytes(k, d, dtype))]
        row = positions.nbytes(row_length(k, d, world_size), slice_size(d, world_size) + 1, dtype)
        return [(AllToAll, world_size * row), (AllGather, row)]

    def delta(self, shape: Sequence[int]) -> float:
        """k/d, less the square of the rounding error of 16-bit values.

        For what a rank sends first, while each owner's row has room for it. Of the means in its slice an owner keeps
        the largest c of d/n, which holds c n/d >= 1.25 k/d of their energy: both hops contract, each under error feedback
        (as in DoubleSqueeze, Tang et al. 2019, arXiv 1905.05957), but the two together are no k/d contraction of the
        mean: where all ranks pick different entries, most of them wait.
        """
        return super().delta(shape) * (1 - {"float16": 2.0**-22, "bfloat16": 2.0**-16}.get(self.values, 0.0))

    def exchange(self, ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Decoded]:
        flats = [ops.reshape(v, (-1,)) for v in values]
        counts = [f.shape[0] for f in flats]
        picks = [ops.top_k(f, kept(self.ratio, d)) for f, d in zip(flats, counts, strict=True)]
        mine = ops.concat([ops.take(f, i) for f, i in zip(flats, picks, strict=True)], 0)
        where = ops.concat([i + start for i, start in zip(picks, offsets(counts), strict=True)], 0)
        dtype = self.wire_dtype(ctx.dtype)
        if self.is_sharded(ctx.size):
            return (yield from sharded_sparse_allreduce(ops, values, memory, where, mine, dtype, ctx))

        code = positions.Code(dtype, positions.block_edges(tuple(counts)))
        k = where.shape[0]
        message = code.encode(ops, ops.reshape(mine, (1, k)), ops.reshape(where, (1, k)))
        arrived, places = code.decode(ops, (yield AllGather(ops.reshape(message, (-1,)))), k, mine)

        def average(into: Tensor, begin: int, end: int, offset: int) -> Tensor:
            """Adds up entries begin .. end of each rank, of layers that begin at `offset`."""
            for r in range(ctx.size):  # rank by rank: a fixed order of addition keeps the ranks bit-equal
                into = ops.scatter_add(into, places[r][begin:end] - offset, arrived[r][begin:end] / ctx.size)
            return into

        def split(into: list[Tensor | None] | None, remainder: bool) -> tuple[list[Tensor], list[Tensor] | None]:
            if into is None:
                averages = ops.unflatten(average(ops.zeros(sum(counts), mine), 0, k, 0), values)
            else:
                ends = [*offsets([p.shape[0] for p in picks]), k]
                rooms = [ops.zeros(d, mine) if x is None else ops.cleared(x) for d, x in zip(counts, into, strict=True)]
                spans = zip(rooms, ends[:-1], ends[1:], offsets(counts), values, strict=True)
                averages = [ops.reshape(average(room, *span), value.shape) for room, *span, value in spans]
            if not remainder:
                return averages, None
            sent = ops.unflatten(-arrived[ctx.rank], picks)
            left = [ops.scatter_add(f, i, x) for f, i, x in zip(flats, picks, sent, strict=True)]
            return averages, [ops.reshape(x, v.shape) for x, v in zip(left, values, strict=True)]

        return Decoded(split, lambda _: memory, lambda: ops.all_finite([arrived]))


@dataclass(frozen=True)
class RandomK(_Sparse):
    """k = ceil(ratio d) entries of each layer, the same random ones on every rank: values alone travel, by one allreduce.

    (Stich et al. 2018, arXiv 1809.07599, unscaled.) The indices are a j + b mod d, where a (one of 256
    that are coprime to d) and b come from (seed, layer, step): distinct, each entry equally likely, no sort.

    Args:
        ratio: share of the entries that is sent, in (0, 1].
    """

    def messages(self, shape: Sequence[int], dtype: Any, world_size: int) -> list[Message]:
        return [(AllReduce, kept(self.ratio, size(shape)) * value_bytes(dtype))]

    def exchange(self, ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Decoded]:
        flats = [ops.reshape(v, (-1,)) for v in values]
        counts = [f.shape[0] for f in flats]
        picks = [
            ops.affine(multipliers(d), ctx.key(name, "a"), ctx.key(name, "b"), kept(self.ratio, d), d, f)
            for name, f, d in zip(ctx.names, flats, counts, strict=True)
        ]
        where = ops.concat([i + start for i, start in zip(picks, offsets(counts), strict=True)], 0)
        # NaN and Inf must show even where none of them is picked
        chosen = [ops.where(ops.all_finite([f]), ops.take(f, i), math.nan) for f, i in zip(flats, picks, strict=True)]
        (mine,) = yield AllReduce([ops.concat(chosen, 0)])
        mean = ops.scatter_add(ops.zeros(sum(counts), mine), where, mine)

        def split(_: Any, remainder: bool) -> tuple[list[Tensor], list[Tensor] | None]:
            return ops.unflatten(mean, values), unsent(ops, flats, picks, values) if remainder else None

        return Decoded(split, lambda _: memory, lambda: ops.all_finite([mine]))
