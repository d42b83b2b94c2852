"""PowerSGD: approximates each gradient matrix by a product of two thin factors, found by power iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
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
    fused_mean,
    size,
)
from hvd_accordion.compression.sharing import Sharing
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.utils import seeds, validation

VANISHED = 1e-6  # relative length below which a projected row is fp32 rounding noise


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Returns the (n, m) of the matrix that a tensor is reshaped to.

    Either the first axis is kept, or the last, whichever gives the smaller n + m. The output channels of a convolution are
    the first axis in torch and the last in Keras.
    """
    if len(shape) < 2:
        return size(shape), 1
    first, last = (shape[0], size(shape[1:])), (size(shape[:-1]), shape[-1])
    return last if sum(last) < sum(first) else first


@dataclass(frozen=True)
class PowerSGD(CompressionSpec):
    """PowerSGD (Vogels, Karimireddy, Jaggi 2019, arXiv 1905.13727, Algorithm 1).

    For a gradient matrix M of shape (n, m):

        P = M Q; P <- mean over ranks; P <- orthonormalise(P); Q = M^T P; Q <- mean over ranks

    The averaged gradient is P Q^T. The next step starts from Q. Matrices of equal shape are processed as one batch.

    Args:
        rank: r, the columns of P and Q, >= 1. A higher rank approximates better and sends more. At most min(n, m) is used.
        start_after: number of initial steps that are exchanged dense, >= 0.
        min_compression_rate: a matrix stays dense unless n m >= rate r (n + m); > 0.
        iterations: power iterations per step, >= 1. Each takes two collectives.
        warm_start: start from the previous step's Q instead of a new random one.
    """

    rank: int = 4
    start_after: int = 0
    min_compression_rate: float = 2.0
    iterations: int = 1
    warm_start: bool = True

    memory_sharing: ClassVar[Mapping[str, Sharing]] = MappingProxyType({"q": Sharing.SHARED})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_fields(rank=validation.integer("rank", self.rank, 1))
        self._set_fields(start_after=validation.integer("start_after", self.start_after, 0))
        self._set_fields(min_compression_rate=validation.real("min_compression_rate", self.min_compression_rate, 0.0))
        self._set_fields(iterations=validation.integer("iterations", self.iterations, 1))
        self._set_fields(warm_start=validation.boolean("warm_start", self.warm_start))

    def columns(self, shape: Sequence[int]) -> int:
        """Returns the rank used for a tensor of this shape: at most the matrix's smaller side."""
        return min(self.rank, *matrix_shape(shape))

    def messages(self, shape: Sequence[int], dtype: Any, world_size: int) -> list[Message]:
        n, m = matrix_shape(shape)
        itemsize = max(4, ITEMSIZE[dtype_name(dtype)])
        rounds: list[Message] = [(AllReduce, self.columns(shape) * side * itemsize) for side in (n, m)]
        return rounds * self.iterations

    def delta(self, shape: Sequence[int]) -> float:
        """Returns r / min(n, m), the bound for the best rank-r approximation, which a warm start converges to."""
        return self.columns(shape) / min(matrix_shape(shape))

    def shrinks(self, shape: Sequence[int], dtype: Any, world_size: int) -> bool:
        n, m = matrix_shape(shape)
        factors = self.columns(shape) * (n + m)
        return super().shrinks(shape, dtype, world_size) and n * m >= self.min_compression_rate * factors

    def active(self, step: int) -> bool:
        return step >= self.start_after

    def exchange(self, ops: Ops, values: list[Tensor], memory: list[Memory], ctx: Context) -> Rounds[Decoded]:
        # factors are stored as rows, P^T and Q^T: products with long rows are several times faster than with thin columns
        matrices = [ops.reshape(v, matrix_shape(v.shape)) for v in values]
        batches = by_shape(matrices)
        stacks = [[matrices[i] for i in batch] for batch in batches]
        initial = [self.start(ops, m, own, name, ctx) for m, own, name in zip(matrices, memory, ctx.names, strict=True)]
        starts = [ops.stack([initial[i][: self.columns(matrices[i].shape)] for i in batch]) for batch in batches]
        ps, qs = [], starts
        for _ in range(self.iterations):
            ps = yield from fused_mean(ops, [ops.project(m, scaled(ops, q)) for m, q in zip(stacks, qs, strict=True)])
            ps = orthonormalise(ops, ps)
            qs = yield from fused_mean(ops, [ops.project_t(m, p) for m, p in zip(stacks, ps, strict=True)])

        def finish(
            buffers: list[Tensor | None] | None, want_remainder: bool
        ) -> tuple[list[Tensor], list[Tensor] | None]:
            mean: list[Tensor] = [None] * len(values)
            remainder: list[Tensor] = [None] * len(values)
            for batch, p, q in zip(batches, ps, qs, strict=True):
                for row, i in enumerate(batch):
                    buffer = None if buffers is None else buffers[i]
                    buffer = None if buffer is None else ops.reshape(buffer, matrices[i].shape)
                    product, rest = ops.low_rank(matrices[i], p[row], q[row], buffer, want_remainder)
                    mean[i] = ops.reshape(product, values[i].shape)
                    remainder[i] = ops.reshape(rest, values[i].shape) if want_remainder else None
            return mean, remainder if want_remainder else None

        def next_memory(is_finite: Any) -> list[Memory]:
            new: list[Memory] = [{}] * len(values)
            if self.warm_start:
                for batch, q, q0 in zip(batches, qs, starts, strict=True):
                    warm = ops.where(is_finite, q, q0)
                    for row, i in enumerate(batch):
                        new[i] = {"q": append_missing_rows(ops, warm[row], initial[i])}
            return new

        return Decoded(finish, next_memory, lambda: ops.all_finite(qs))

    def start(self, ops: Ops, matrix: Tensor, memory: Memory, name: str, ctx: Context) -> Tensor:
        """Returns the initial Q^T with at least r rows: the previous step's, completed by random rows."""
        r = self.columns(matrix.shape)
        if not self.warm_start:
            return random_rows(ops, matrix, [ctx.key(name, "q", j) for j in range(r)])
        q = memory.get("q")
        if q is not None and q.shape[0] >= r:
            return q
        fresh = self.initial_memory(ops, matrix, name, ctx.seed)["q"]
        return fresh if q is None else append_missing_rows(ops, q, fresh)

    def initial_memory(self, ops: Ops, value: Tensor, name: str, seed: int) -> Memory:
        if not self.warm_start:
            return {}
        matrix = ops.reshape(value, matrix_shape(value.shape))
        keys = [seeds.stable_hash(seed, name, "q", j) for j in range(self.columns(matrix.shape))]
        return {"q": random_rows(ops, matrix, keys)}


def random_rows(ops: Ops, matrix: Tensor, keys: Sequence[Any]) -> Tensor:
    """Returns one row of numbers in [-1/2, 1/2) per seed, as long as a row of the matrix."""
    return ops.stack([ops.uniform(key, matrix.shape[1], matrix) for key in keys]) - 0.5


def append_missing_rows(ops: Ops, q: Tensor, other: Tensor) -> Tensor:
    """Appends the rows of `other` beyond the rows of q, so that a smaller rank keeps what a larger one learned."""
    return ops.concat([q, other[q.shape[0] :]], 0) if q.shape[0] < other.shape[0] else q


def by_shape(matrices: list[Tensor]) -> list[list[int]]:
    """Returns the indices of the matrices of each shape, in order of first appearance."""
    batches: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        batches.setdefault(tuple(matrix.shape), []).append(i)
    return list(batches.values())


def orthonormalise(ops: Ops, factors: list[Tensor]) -> list[Tensor]:
    """Orthonormalises the rows of each matrix in batches of shape (b, r, n), r <= n, by Gram-Schmidt applied twice.

    A row that vanishes (a zero gradient, a matrix of rank below r) is replaced by an arbitrary one. Factors thus stay
    finite, and Q never gets stuck at zero. NaN and Inf give NaN. Batches of different n are padded with zeros and
    processed together.
    """
    result: list[Tensor] = [None] * len(factors)
    for r in sorted({p.shape[1] for p in factors}):
        same = [i for i, p in enumerate(factors) if p.shape[1] == r]
        width = max(factors[i].shape[2] for i in same)
        wide = ops.concat([ops.pad_rows(factors[i], width) for i in same], 0)
        filler = [ops.pad_rows(ops.filler_basis(factors[i]), width) for i in same]
        basis, start = gram_schmidt(ops, scaled(ops, wide), ops.concat(filler, 0)), 0
        for i in same:
            b, _, n = factors[i].shape
            result[i] = basis[start : start + b, :, :n]
            start += b
    return result


def gram_schmidt(ops: Ops, p: Tensor, fillers: Tensor) -> Tensor:
    """Orthonormalises the rows of each matrix of p (b, r, n). A vanishing row is replaced by that of `fillers`."""
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
    """Divides each matrix of the batch by its largest magnitude: equal row span, but squares cannot over- or underflow."""
    peak = ops.max(ops.max(abs(p), -1, keepdims=True), -2, keepdims=True)
    return p / ops.where(peak == 0, 1.0, peak)


def reject(ops: Ops, row: Tensor, basis: Tensor | None) -> Tensor:
    """Returns the component of the row (b, 1, n) that is orthogonal to the basis (b, j, n)."""
    return row if basis is None else row - (row @ ops.transpose(basis)) @ basis


def norm(ops: Ops, row: Tensor) -> Tensor:
    """Returns the 2-norm along the last axis, which is kept with length 1."""
    return ops.sum(row * row, -1, keepdims=True) ** 0.5
