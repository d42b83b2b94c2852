"""Sparsification: a share of each layer's entries travels, the rest waits in the residual."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hvd_accordion import checks, seeds
from hvd_accordion.collectives import AllGather, AllReduce, Rounds, Tensor
from hvd_accordion.compression.base import ITEMSIZE, CompressionSpec, Context, Exchanged, Memory, Message, dtype_name, size
from hvd_accordion.ops.protocol import Ops


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
        self._checked(ratio=checks.real("ratio", self.ratio, 0.0, 1.0))

    def delta(self, shape: Sequence[int]) -> float:
        """k/d."""
        return kept(self.ratio, size(shape)) / size(shape)


@dataclass(frozen=True)
class TopK(_Sparse):
    """The k = ceil(ratio d) entries of each layer that are largest in magnitude (Stich et al. 2018, arXiv 1809.07599).

    One allgather of values and int32 indices packed in one message; each rank adds the messages in rank order.

    Args:
        ratio: share of the entries that is sent, in (0, 1].
    """

    def messages(self, shape: Sequence[int], dtype: Any, world_size: int) -> list[Message]:
        return [(AllGather, kept(self.ratio, size(shape)) * (value_bytes(dtype) + 4))]

    def exchange(self, ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Exchanged]:
        flats = [ops.reshape(v, (-1,)) for v in values]
        counts = [f.shape[0] for f in flats]
        picks = [ops.top_k(f, kept(self.ratio, d)) for f, d in zip(flats, counts, strict=True)]
        mine = ops.concat([ops.take(f, i) for f, i in zip(flats, picks, strict=True)], 0)
        where = ops.concat([i + start for i, start in zip(picks, offsets(counts), strict=True)], 0)
        message = ops.concat([ops.to_bytes(mine), ops.to_bytes(where)], 0)
        gathered = yield AllGather(message)

        split = message.shape[0] - 4 * where.shape[0]
        mean = ops.zeros(sum(counts), mine)
        parts = [ops.cast_like(ops.from_bytes(gathered[r, :split], ops.dtype(mine)), mine) for r in range(ctx.size)]
        for r, part in enumerate(parts):  # rank by rank: a fixed order of addition keeps the ranks bit-equal
            mean = ops.scatter_add(mean, ops.from_bytes(gathered[r, split:], "int32"), part / ctx.size)

        def split(_: Any, remainder: bool) -> tuple[list[Tensor], list[Tensor] | None]:
            return ops.unflatten(mean, values), unsent(ops, flats, picks, values) if remainder else None

        return Exchanged(split, lambda _: memory, lambda: ops.all_finite(parts))


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

    def exchange(self, ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Exchanged]:
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

        return Exchanged(split, lambda _: memory, lambda: ops.all_finite([mine]))


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
