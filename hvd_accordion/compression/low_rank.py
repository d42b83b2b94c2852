"""PowerSGD: each gradient matrix as a product of two thin ones, found by a step of power iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hvd_accordion.comm.collectives import AllReduce, Rounds, Tensor
from hvd_accordion.compression.base import (
    ITEMSIZE,
    CompressionSpec,
    Context,
    Decoded,
    Memory,
    Message,
    dtype_name,
    joined_mean,
    size,
)
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.utils import seeds, validation


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor as a matrix: its first axis by all the others, or all by the last where that gives thinner factors.

    The first is the outputs' in torch's convolutions, the last in Keras's.
    """
    if len(shape) < 2:
        return size(shape), 1
    first, last = (shape[0], size(shape[1:])), (size(shape[:-1]), shape[-1])
    return last if sum(last) < sum(first) else first


@dataclass(frozen=True)
class PowerSGD(CompressionSpec):
    """PowerSGD (Vogels, Karimireddy, Jaggi 2019, arXiv 1905.13727, Algorithm 1).

    P = M Q; P <- mean over ranks; P <- orthonormalised; Q = M^T P; Q <- mean over ranks; the result is P Q^T, and Q is
    where the next step starts. Matrices of one shape go as one batch.

    Args:
        rank: r, columns of P and Q, >= 1; higher is closer and larger. Capped at the matrix's smaller side.
        start_after: steps before which everything travels dense, >= 0.
        min_compression_rate: a matrix stays dense unless n m >= rate r (n + m); > 0.
        iterations: power iterations a step, >= 1; each costs two rounds.
        warm_start: start from the last step's Q instead of a fresh random one.
    """

    rank: int = 4
    start_after: int = 0
    min_compression_rate: float = 2.0
    iterations: int = 1
    warm_start: bool = True

    memory_keys: ClassVar[tuple[str, ...]] = ("q",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._checked(rank=validation.integer("rank", self.rank, 1))
        self._checked(start_after=validation.integer("start_after", self.start_after, 0))
        self._checked(min_compression_rate=validation.real("min_compression_rate", self.min_compression_rate, 0.0))
        self._checked(iterations=validation.integer("iterations", self.iterations, 1))
        self._checked(warm_start=validation.boolean("warm_start", self.warm_start))

    def columns(self, shape: Sequence[int]) -> int:
        return min(self.rank, *matrix_shape(shape))

    def messages(self, shape: Sequence[int], dtype: Any, world_size: int) -> list[Message]:
        n, m = matrix_shape(shape)
        itemsize = max(4, ITEMSIZE[dtype_name(dtype)])
        rounds: list[Message] = [(AllReduce, self.columns(shape) * side * itemsize) for side in (n, m)]
        return rounds * self.iterations

    def delta(self, shape: Sequence[int]) -> float:
        """r / min(n, m): what the best rank-r matrix keeps at least; a converged warm start comes to it."""
        return self.columns(shape) / min(matrix_shape(shape))

    def shrinks(self, shape: Sequence[int], dtype: Any, world_size: int) -> bool:
        n, m = matrix_shape(shape)
        factors = self.columns(shape) * (n + m)
        return super().shrinks(shape, dtype, world_size) and n * m >= self.min_compression_rate * factors

    def active(self, step: int) -> bool:
        return step >= self.start_after

    def exchange(self, ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Decoded]:
        # factors lie in memory as rows, P^T and Q^T: products with long rows are several times as fast as with thin columns
        matrices = [ops.reshape(v, matrix_shape(v.shape)) for v in values]
        batches = by_shape(matrices)
        stacks = [[matrices[i] for i in batch] for batch in batches]
        olds = [self.start(ops, m, own, name, ctx) for m, own, name in zip(matrices, memory, ctx.names, strict=True)]
        starts = [ops.stack([olds[i][: self.columns(matrices[i].shape)] for i in batch]) for batch in batches]
        ps, qs = [], starts
        for _ in range(self.iterations):
            ps = yield from joined_mean(ops, [ops.project(m, scaled(ops, q)) for m, q in zip(stacks, qs, strict=True)])
            ps = orthonormalise(ops, ps)
            qs = yield from joined_mean(ops, [ops.project_t(m, p) for m, p in zip(stacks, ps, strict=True)])

        def split(into: list[Tensor | None] | None, remainder: bool) -> tuple[list[Tensor], list[Tensor] | None]:
            mean: list[Tensor] = [None] * len(values)
            left: list[Tensor] = [None] * len(values)
            for batch, p, q in zip(batches, ps, qs, strict=True):
                for row, i in enumerate(batch):
                    place = None if into is None else into[i]
                    place = None if place is None else ops.reshape(place, matrices[i].shape)
                    whole, rest = ops.low_rank(matrices[i], p[row], q[row], place, remainder)
                    mean[i] = ops.reshape(whole, values[i].shape)
                    left[i] = ops.reshape(rest, values[i].shape) if remainder else None
            return mean, left if remainder else None

        def keep(ok: Any) -> list[Memory]:
            kept: list[Memory] = [{}] * len(values)
            if self.warm_start:
                for batch, q, q0 in zip(batches, qs, starts, strict=True):
                    warm = ops.where(ok, q, q0)
                    for row, i in enumerate(batch):
                        kept[i] = {"q": joined(ops, warm[row], olds[i])}
            return kept

        return Decoded(split, keep, lambda: ops.all_finite(qs))

    def start(self, ops: Ops, matrix: Tensor, memory: Memory, name: str, ctx: Context) -> Tensor:
        """Q^T to start from, with at least the rows of this rank: the last step's, random ones where there are none yet."""
        r = self.columns(matrix.shape)
        if not self.warm_start:
            return random_rows(ops, matrix, [ctx.key(name, "q", j) for j in range(r)])
        q = memory.get("q")
        if q is not None and q.shape[0] >= r:
            return q
        fresh = self.initial_memory(ops, matrix, name, ctx.seed)["q"]
        return fresh if q is None else joined(ops, q, fresh)

    def initial_memory(self, ops: Ops, value: Tensor, name: str, seed: int) -> Memory:
        if not self.warm_start:
            return {}
        matrix = ops.reshape(value, matrix_shape(value.shape))
        keys = [seeds.stable_hash(seed, name, "q", j) for j in range(self.columns(matrix.shape))]
        return {"q": random_rows(ops, matrix, keys)}


def random_rows(ops: Ops, matrix: Tensor, keys: Sequence[Any]) -> Tensor:
    """One row in [-1/2, 1/2) for each seed, as long as a row of the matrix."""
    return ops.stack([ops.uniform(key, matrix.shape[1], matrix) for key in keys]) - 0.5


def joined(ops: Ops, q: Tensor, other: Tensor) -> Tensor:
    """q, and below it the rows that `other` has more."""
    return ops.concat([q, other[q.shape[0] :]], 0) if q.shape[0] < other.shape[0] else q


def by_shape(matrices: list[Tensor]) -> list[list[int]]:
    """Indices of the matrices of each shape, in order of first appearance."""
    batches: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        batches.setdefault(tuple(matrix.shape), []).append(i)
    return list(batches.values())


def orthonormalise(ops: Ops, factors: list[Tensor]) -> list[Tensor]:
    """Orthonormal rows that span those of each matrix of each batch (b, r, n), r <= n, by Gram-Schmidt done twice.

    A row that vanishes (a zero gradient, a rank below r) is replaced by an arbitrary one: the factors stay finite, and Q
    is never stuck at zero. NaN and Inf come out as NaN. Batches of different n go as one, with zeros behind the rows.
    """
    done: list[Tensor] = [None] * len(factors)
    for r in sorted({p.shape[1] for p in factors}):
        same = [i for i, p in enumerate(factors) if p.shape[1] == r]
        width = max(factors[i].shape[2] for i in same)
        wide = ops.concat([ops.pad_rows(factors[i], width) for i in same], 0)
        filler = [ops.pad_rows(ops.filler_basis(factors[i]), width) for i in same]
        basis, start = gram_schmidt(ops, scaled(ops, wide), ops.concat(filler, 0)), 0
        for i in same:
            b, _, n = factors[i].shape
            done[i] = basis[start : start + b, :, :n]
            start += b
    return done


def gram_schmidt(ops: Ops, p: Tensor, fillers: Tensor) -> Tensor:
    """The rows of each matrix of p (b, r, n) made orthonormal; one that vanishes gives way to that of `fillers`."""
    basis: Tensor | None = None
    for j in range(p.shape[1]):
        given = p[:, j : j + 1]
        row = reject(ops, given, basis)
        vanished = norm(ops, row) <= VANISHED * norm(ops, given)
        row = ops.where(vanished, fillers[:, j : j + 1], row)
        row = reject(ops, row / norm(ops, row), basis)
        row = row / norm(ops, row)
        basis = row if basis is None else ops.concat([basis, row], 1)
    return basis


def scaled(ops: Ops, p: Tensor) -> Tensor:
    """Each matrix of the batch divided by its largest entry: the same rows' span, no square over- or underflows."""
    peak = ops.max(ops.max(abs(p), -1, keepdims=True), -2, keepdims=True)
    return p / ops.where(peak == 0, 1.0, peak)


VANISHED = 1e-6  # of a row's length: less than this left after projection is rounding noise in fp32


def reject(ops: Ops, row: Tensor, basis: Tensor | None) -> Tensor:
    """What of the row (b, 1, n) is orthogonal to the basis (b, j, n)."""
    return row if basis is None else row - (row @ ops.transpose(basis)) @ basis


def norm(ops: Ops, row: Tensor) -> Tensor:
    return ops.sum(row * row, -1, keepdims=True) ** 0.5
