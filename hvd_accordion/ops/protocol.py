"""The primitives that a framework must supply.

Arithmetic (+ - * / ** @ abs, comparisons, slices) is that of the tensors themselves. Names and meanings follow numpy where
numpy has the function. `add`, `accumulate`, `commit_residual`, `low_rank`, `cleared`, `add_row`, `put` and `scatter_add` may
reuse the memory of the tensor that they update. No primitive may synchronise with the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

Tensor: TypeAlias = Any
# finish(want_remainder) returns the averages, and the remainders or None
Finish: TypeAlias = Callable[[bool], tuple[list[Any], Any]]


class Ops(Protocol):
    """A framework's primitives. Shapes in the docstrings: b matrices per batch, rank r, n rows, m columns."""

    # lists of tensors, processed together
    def upcast(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Returns the tensors in fp32, or in fp64 if they are fp64, each contiguous."""

    def add(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
        """Returns each x + y. May reuse the memory of y, unless x holds NaN or Inf. The xs stay unchanged."""

    def undo_add(self, y: Tensor, x: Tensor) -> Tensor:
        """Returns y as it was before `add([x], [y])`, up to rounding."""

    def accumulate(
        self, sums: Sequence[Tensor], xs: Sequence[Tensor], weight: float, is_finite: Tensor | None
    ) -> list[Tensor]:
        """Returns each sum + weight x, or the unchanged sums if the flag `is_finite` is false. None counts as true."""

    def zeros_like(self, xs: Sequence[Tensor]) -> list[Tensor]: ...
    def commit_residual(
        self,
        is_finite: Tensor,
        finish: Finish,
        values: Sequence[Tensor],
        residual: Sequence[Tensor],
        xs: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the averages and the new residual: the remainder if `is_finite` holds, else the old residual.

        Args:
            is_finite: a flag on the device.
            finish: `finish(want_remainder)` returns the averages, and the remainder if wanted.
            values: the result of `add(xs, residual)`.
            residual: the old residual.
            xs: the gradients.
        """

    def all_finite(self, xs: Sequence[Tensor]) -> Tensor:
        """Returns a flag on the device: no tensor holds NaN or Inf."""

    def flatten(self, xs: Sequence[Tensor]) -> Tensor:
        """Concatenates all tensors to one vector."""

    def unflatten(self, flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Splits the vector into tensors of the shapes of `like`; entries beyond them are padding."""

    # shapes and types
    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor: ...
    def transpose(self, x: Tensor) -> Tensor:
        """Swaps the last two axes."""

    def concat(self, xs: Sequence[Tensor], axis: int) -> Tensor: ...
    def stack(self, xs: Sequence[Tensor]) -> Tensor: ...
    def pad(self, flat: Tensor, size: int, shape: Sequence[int]) -> Tensor:
        """Appends zeros to the vector up to `size` entries and reshapes it to `shape`."""

    def pad_rows(self, x: Tensor, width: int) -> Tensor:
        """Appends zeros to each row of x (b, r, n), up to `width` entries."""

    def zeros(self, size: int, like: Tensor) -> Tensor: ...
    def cleared(self, x: Tensor) -> Tensor:
        """Returns a vector of zeros with as many entries as x; may reuse the memory of x."""

    def full(self, size: int, value: Tensor) -> Tensor:
        """Returns a vector filled with the scalar tensor `value`."""

    def constant(self, values: Sequence[int], like: Tensor) -> Tensor:
        """Returns an int32 vector on the device of `like`."""

    def arange(self, count: int, like: Tensor) -> Tensor:
        """Returns int32 0, 1, ... count - 1 on the device of `like`."""

    def dtype(self, x: Tensor) -> str: ...
    def cast(self, x: Tensor, dtype: str) -> Tensor: ...
    def cast_like(self, x: Tensor, like: Tensor) -> Tensor: ...
    def to_bytes(self, x: Tensor) -> Tensor:
        """Returns the bytes of x as uint8. The last axis is longer by the size of an item."""

    def from_bytes(self, x: Tensor, dtype: str) -> Tensor: ...

    # elementwise and reductions
    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor: ...
    def floor(self, x: Tensor) -> Tensor: ...
    def clip(self, x: Tensor, low: float, high: float) -> Tensor: ...
    def max(self, x: Tensor, axis: int, keepdims: bool) -> Tensor: ...
    def sum(self, x: Tensor, axis: int, keepdims: bool) -> Tensor: ...
    def norm(self, x: Tensor) -> Tensor:
        """Returns the Euclidean norm of a vector."""

    # entries of vectors
    def top_k(self, x: Tensor, k: int) -> Tensor:
        """Returns the ascending int32 indices of the k entries of largest magnitude.

        NaN counts as the largest. On the CPU, the first of equal entries are selected.
        """

    def argsort(self, x: Tensor) -> Tensor:
        """Returns the int32 indices that sort an integer vector of distinct numbers."""

    def searchsorted(self, ascending: Tensor, values: Tensor) -> Tensor:
        """Returns for each value (int32) the number of ascending entries that are not larger."""

    def affine(self, factors: Sequence[int], pick: Any, shift: Any, k: int, count: int, like: Tensor) -> Tensor:
        """Returns int32 (a j + shift) mod count for j < k, with a = factors[pick mod len(factors)]."""

    def take(self, x: Tensor, index: Tensor) -> Tensor: ...
    def put(self, x: Tensor, index: Tensor, value: float) -> Tensor: ...
    def scatter_add(self, x: Tensor, index: Tensor, values: Tensor) -> Tensor:
        """Adds the values to x at the indices. Of a repeated index, only one value may be non-zero."""

    def add_row(self, x: Tensor, row: int, values: Tensor) -> Tensor: ...

    # pseudo-random numbers from counters, the same in every framework and on every device
    def uniform(self, seed: Any, count: int, like: Tensor) -> Tensor:
        """Returns `count` multiples of 2^-24 in [0, 1), in the dtype of `like`: mix(i * 0x9E3779B1 + seed) for i < count."""

    def filler_basis(self, like: Tensor) -> Tensor:
        """Returns matrices (b, r, n), the shape of `like`, with sin((j + 1) (i + 1)) in column i of row j."""

    # bit packing along the last axis: value i of each 8 occupies bits [i b, (i + 1) b) of b little-endian bytes
    def pack_bits(self, x: Tensor, bits: int) -> Tensor: ...
    def unpack_bits(self, x: Tensor, bits: int) -> Tensor: ...

    # low rank: a list of b matrices M of one shape (n, m), thin factors as batches of rows P^T (b, r, n), Q^T (b, r, m)
    def project(self, matrices: Sequence[Tensor], q: Tensor) -> Tensor:
        """Returns (M Q)^T, (b, r, n)."""

    def project_t(self, matrices: Sequence[Tensor], p: Tensor) -> Tensor:
        """Returns (M^T P)^T, (b, r, m)."""

    def low_rank(
        self, matrix: Tensor, p: Tensor, q: Tensor, buffer: Tensor | None, want_remainder: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns P Q^T of one matrix's factors (r, n) and (r, m), and M - P Q^T if `want_remainder`.

        The product is written into `buffer` unless that is None. The remainder may reuse the memory of M.
        """
