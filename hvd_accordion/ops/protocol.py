"""What a framework must supply. Arithmetic (+ - * / ** @ abs, comparisons, slices) comes from the tensors themselves.

Names and meanings are numpy's where numpy has them. `add`, `accumulate`, `commit_residual`, `low_rank`, `add_row`, `put`
and `scatter_add` may reuse the memory of the tensor that they update. Nothing here may wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

Tensor: TypeAlias = Any
Split: TypeAlias = Callable[
    [bool], tuple[list[Any], Any]
]  # averages, and the remainders where the argument asks for them


class Ops(Protocol):
    # lists of tensors, many at once
    def upcast(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Each in fp32, or in fp64 if it is so already; contiguous."""

    def add(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
        """Each x + y. May take the memory of y, unless x holds NaN or Inf; the xs stay as they are."""

    def taken_back(self, y: Tensor, x: Tensor) -> Tensor:
        """y as it was before `add([x], [y])`, up to rounding."""

    def accumulate(
        self, sums: Sequence[Tensor], xs: Sequence[Tensor], weight: float, ok: Tensor | None
    ) -> list[Tensor]:
        """Each sum + weight x; the sums as they are where the flag `ok` does not hold. None: it holds."""

    def zeros_like(self, xs: Sequence[Tensor]) -> list[Tensor]: ...
    def commit_residual(
        self, ok: Tensor, split: Split, values: Sequence[Tensor], residual: Sequence[Tensor], xs: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Averages, and the new residual: the remainder where `ok` holds, else the old one.

        `values` are what `add(xs, residual)` gave. `split` gives averages, and the remainder if its argument asks for it.
        """

    def all_finite(self, xs: Sequence[Tensor]) -> Tensor:
        """A flag: no NaN, no Inf in any."""

    def flatten(self, xs: Sequence[Tensor]) -> Tensor:
        """All of them in one vector."""

    def unflatten(self, flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """The vector cut up into the shapes of `like`; what is left over is padding."""

    # shapes and types
    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor: ...
    def transpose(self, x: Tensor) -> Tensor:
        """The last two axes swapped."""

    def concat(self, xs: Sequence[Tensor], axis: int) -> Tensor: ...
    def stack(self, xs: Sequence[Tensor]) -> Tensor: ...
    def pad(self, flat: Tensor, size: int, shape: Sequence[int]) -> Tensor:
        """The vector, zeros behind it up to `size`, in `shape`."""

    def pad_rows(self, x: Tensor, width: int) -> Tensor:
        """(b, r, n) with zeros behind each row, up to `width`."""

    def zeros(self, size: int, like: Tensor) -> Tensor: ...
    def cleared(self, x: Tensor) -> Tensor:
        """A vector of as many zeros; may take the memory of x."""

    def full(self, size: int, value: Tensor) -> Tensor:
        """A vector of one value, which is a scalar tensor."""

    def constant(self, values: Sequence[int], like: Tensor) -> Tensor:
        """int32, where `like` is."""

    def arange(self, count: int, like: Tensor) -> Tensor:
        """int32 0, 1, ... count - 1, where `like` is."""

    def dtype(self, x: Tensor) -> str: ...
    def cast(self, x: Tensor, dtype: str) -> Tensor: ...
    def cast_like(self, x: Tensor, like: Tensor) -> Tensor: ...
    def to_bytes(self, x: Tensor) -> Tensor:
        """uint8, the last axis longer by the size of an item."""

    def from_bytes(self, x: Tensor, dtype: str) -> Tensor: ...

    # elementwise and reductions
    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor: ...
    def floor(self, x: Tensor) -> Tensor: ...
    def clip(self, x: Tensor, low: float, high: float) -> Tensor: ...
    def max(self, x: Tensor, axis: int, keepdims: bool) -> Tensor: ...
    def sum(self, x: Tensor, axis: int, keepdims: bool) -> Tensor: ...
    def norm(self, x: Tensor) -> Tensor:
        """The Euclidean norm of a vector."""

    # entries of vectors
    def top_k(self, x: Tensor, k: int) -> Tensor:
        """int32 indices, ascending, of the k entries largest in magnitude; NaN counts as largest. On the CPU the first of
        equal ones."""

    def argsort(self, x: Tensor) -> Tensor:
        """int32 indices that sort an integer vector, in which no number stands twice."""

    def searchsorted(self, ascending: Tensor, values: Tensor) -> Tensor:
        """int32: for each value of a vector, how many of the ascending numbers are no larger."""

    def affine(self, factors: Sequence[int], pick: Any, shift: Any, k: int, count: int, like: Tensor) -> Tensor:
        """int32 (a j + shift) mod count for j < k, where a is number `pick` modulo their count of the factors."""

    def take(self, x: Tensor, index: Tensor) -> Tensor: ...
    def put(self, x: Tensor, index: Tensor, value: float) -> Tensor: ...
    def scatter_add(self, x: Tensor, index: Tensor, values: Tensor) -> Tensor:
        """x with the values added; of an index that stands twice only one value may be other than zero."""

    def add_row(self, x: Tensor, row: int, values: Tensor) -> Tensor: ...

    # pseudo-random numbers from counters, the same in every framework and on every device
    def uniform(self, seed: Any, count: int, like: Tensor) -> Tensor:
        """`count` numbers in [0, 1), multiples of 2^-24: number i is `mix(i * 0x9E3779B1 + seed)`, in like's dtype."""

    def filler_basis(self, like: Tensor) -> Tensor:
        """sin((j + 1) (i + 1)) in column i of row j of each matrix; `like` is (b, r, n)."""

    # packed codes, along the last axis: value i of each 8 takes bits [i b, (i + 1) b) of b little-endian bytes
    def pack_bits(self, x: Tensor, bits: int) -> Tensor: ...
    def unpack_bits(self, x: Tensor, bits: int) -> Tensor: ...

    # matrices of one shape (n, m) as a list, thin factors as batches of rows: P^T (b, r, n), Q^T (b, r, m)
    def project(self, matrices: Sequence[Tensor], q: Tensor) -> Tensor:
        """(M Q)^T, (b, r, n)."""

    def project_t(self, matrices: Sequence[Tensor], p: Tensor) -> Tensor:
        """(M^T P)^T, (b, r, m)."""

    def low_rank(
        self, matrix: Tensor, p: Tensor, q: Tensor, into: Tensor | None, remainder: bool
    ) -> tuple[Tensor, Tensor | None]:
        """P Q^T of one matrix's factors (r, n) and (r, m), in the memory `into` if there is some, and M - P Q^T if wanted."""
