"""Sparsification: a fraction of each layer's entries is sent, the rest stays in the residual."""

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


def num_selected(ratio: float, count: int) -> int:
    """Returns k = ceil(ratio d), at least one, for d = `count` entries."""
    return max(1, math.ceil(ratio * count))


def value_bytes(dtype: Any) -> int:
    """Returns the bytes of a value that is exchanged in fp32 at least."""
    return max(4, ITEMSIZE[dtype_name(dtype)])


def offsets(counts: Sequence[int]) -> list[int]:
    """Returns the start of each part of a concatenation of parts of these lengths."""
    return [sum(counts[:i]) for i in range(len(counts))]


def zero_selected(ops: Ops, flats: list[Tensor], selected: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """Returns the values with zeros at the selected entries, in their own shapes."""
    rest = [ops.put(flat, index, 0.0) for flat, index in zip(flats, selected, strict=True)]
    return [ops.reshape(flat, value.shape) for flat, value in zip(rest, values, strict=True)]


@dataclass(frozen=True)
class _Sparse(CompressionSpec):
    """Sends k = ceil(ratio d) of a layer's d entries."""

    ratio: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_fields(ratio=validation.real("ratio", self.ratio, 0.0, 1.0))

    def delta(self, shape: Sequence[int]) -> float:
        """Returns k/d."""
        return num_selected(self.ratio, size(shape)) / size(shape)


@dataclass(frozen=True)
class TopK(_Sparse):
    """Sends the k = ceil(ratio d) entries of each layer of largest magnitude (Stich et al. 2018, arXiv 1809.07599).

    "allgather": each rank sends its entries to all others, which add them in rank order. A rank sends (n-1) k entries, and
    up to n k entries are applied.

    "two_step": each rank owns a slice of the entries, adds up what it receives and sends the largest sums to all (see
    `sharded_sparse_allreduce`). A rank sends about 2.5 k entries whatever n is, and at most 1.25 k entries are applied.

    Unsent entries stay in the residuals. An entry takes its value and two bytes of position; each 65,536 entries of a layer
    take 4 bytes more.

    Args:
        ratio: fraction of the entries that is sent, in (0, 1].
        values: dtype of values on the wire. "float32" means float64 for float64 gradients. With "float16" or "bfloat16" the
            rounding error stays in the residual, and so does what exceeds their range (float16: 6e-8 to 65504).
        algorithm: "auto" selects "two_step" among 4 ranks or more, where it sends less unless k is very small.
    """

    _: KW_ONLY
    values: str = "float32"
    algorithm: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_fields(values=validation.choice("values", self.values, ("float32", "float16", "bfloat16")))
        self._set_fields(algorithm=validation.choice("algorithm", self.algorithm, ("auto", "allgather", "two_step")))

    def is_sharded(self, world_size: int) -> bool:
        """Returns whether this many ranks use the sharded sparse allreduce."""
        return self.algorithm == "two_step" or (self.algorithm == "auto" and world_size >= 4)

    def wire_dtype(self, dtype: Any) -> str:
        """Returns the dtype of values on the wire, for gradients of this dtype."""
        return "float64" if self.values == "float32" and dtype_name(dtype) == "float64" else self.values

    def messages(self, shape: Sequence[int], dtype: Any, world_size: int) -> list[Message]:
        """Returns the collectives of a layer alone. Layers of a group share rows and blocks and take a few bytes less."""
        d, dtype = size(shape), self.wire_dtype(dtype)
        k = num_selected(self.ratio, d)
        if not self.is_sharded(world_size):
            return [(AllGather, positions.nbytes(k, d, dtype))]
        row = positions.nbytes(row_length(k, d, world_size), slice_size(d, world_size) + 1, dtype)
        return [(AllToAll, world_size * row), (AllGather, row)]

    def delta(self, shape: Sequence[int]) -> float:
        """Returns k/d, less the squared rounding error of 16-bit values.

        This holds for what a rank sends in the first hop, if no entry is dropped for lack of space. Of the means in its
        slice of d/n entries, an owner keeps the largest c, and c n/d >= 1.25 k/d of their energy. Both hops contract, each
        under error feedback (as in DoubleSqueeze, Tang et al. 2019, arXiv 1905.05957). Together they are no k/d contraction
        of the mean: if all ranks select different entries, most entries wait.
        """
        return super().delta(shape) * (1 - {"float16": 2.0**-22, "bfloat16": 2.0**-16}.get(self.values, 0.0))

    def exchange(self, ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Decoded]:
        flats = [ops.reshape(v, (-1,)) for v in values]
        counts = [f.shape[0] for f in flats]
        selected = [ops.top_k(f, num_selected(self.ratio, d)) for f, d in zip(flats, counts, strict=True)]
        entries = ops.concat([ops.take(f, i) for f, i in zip(flats, selected, strict=True)], 0)
        in_group = ops.concat([i + start for i, start in zip(selected, offsets(counts), strict=True)], 0)
        dtype = self.wire_dtype(ctx.dtype)
        if self.is_sharded(ctx.size):
            return (yield from sharded_sparse_allreduce(ops, values, memory, in_group, entries, dtype, ctx))

        code = positions.Code(dtype, positions.block_edges(tuple(counts)))
        k = in_group.shape[0]
        message = code.encode(ops, ops.reshape(entries, (1, k)), ops.reshape(in_group, (1, k)))
        received, received_at = code.decode(ops, (yield AllGather(ops.reshape(message, (-1,)))), k, entries)

        def add_mean(into: Tensor, begin: int, end: int, offset: int) -> Tensor:
            """Adds the mean of the ranks' entries begin .. end, of layers that begin at `offset` in the group."""
            for r in range(ctx.size):  # in rank order: a fixed order of addition keeps the ranks bit-equal
                into = ops.scatter_add(into, received_at[r][begin:end] - offset, received[r][begin:end] / ctx.size)
            return into

        def finish(
            buffers: list[Tensor | None] | None, want_remainder: bool
        ) -> tuple[list[Tensor], list[Tensor] | None]:
            if buffers is None:
                averages = ops.unflatten(add_mean(ops.zeros(sum(counts), entries), 0, k, 0), values)
            else:
                ends = [*offsets([i.shape[0] for i in selected]), k]
                cleared = [
                    ops.zeros(d, entries) if x is None else ops.cleared(x) for d, x in zip(counts, buffers, strict=True)
                ]
                spans = zip(cleared, ends[:-1], ends[1:], offsets(counts), values, strict=True)
                averages = [ops.reshape(add_mean(into, *span), value.shape) for into, *span, value in spans]
            if not want_remainder:
                return averages, None
            sent = ops.unflatten(-received[ctx.rank], selected)
            rest = [ops.scatter_add(f, i, x) for f, i, x in zip(flats, selected, sent, strict=True)]
            return averages, [ops.reshape(x, v.shape) for x, v in zip(rest, values, strict=True)]

        return Decoded(finish, lambda _: memory, lambda: ops.all_finite([received]))


@dataclass(frozen=True)
class RandomK(_Sparse):
    """Sends k = ceil(ratio d) random entries of each layer, the same on every rank, by one allreduce of their values.

    (Stich et al. 2018, arXiv 1809.07599, unscaled.) Indices are (a j + b) mod d for j < k. The factor a, one of 256 that are
    coprime to d, and b are derived from (seed, layer, step). All indices are distinct and equally likely, without a sort.

    Args:
        ratio: fraction of the entries that is sent, in (0, 1].
    """

    def messages(self, shape: Sequence[int], dtype: Any, world_size: int) -> list[Message]:
        return [(AllReduce, num_selected(self.ratio, size(shape)) * value_bytes(dtype))]

    def exchange(self, ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Decoded]:
        flats = [ops.reshape(v, (-1,)) for v in values]
        counts = [f.shape[0] for f in flats]
        selected = [
            ops.affine(multipliers(d), ctx.key(name, "a"), ctx.key(name, "b"), num_selected(self.ratio, d), d, f)
            for name, f, d in zip(ctx.names, flats, counts, strict=True)
        ]
        in_group = ops.concat([i + start for i, start in zip(selected, offsets(counts), strict=True)], 0)
        # NaN and Inf must reach the other ranks even if their entry is not selected
        taken = [ops.where(ops.all_finite([f]), ops.take(f, i), math.nan) for f, i in zip(flats, selected, strict=True)]
        (entries,) = yield AllReduce([ops.concat(taken, 0)])
        mean = ops.scatter_add(ops.zeros(sum(counts), entries), in_group, entries)

        def finish(_: Any, want_remainder: bool) -> tuple[list[Tensor], list[Tensor] | None]:
            remainder = zero_selected(ops, flats, selected, values) if want_remainder else None
            return ops.unflatten(mean, values), remainder

        return Decoded(finish, lambda _: memory, lambda: ops.all_finite([entries]))
