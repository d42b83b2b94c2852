"""backward_passes_per_step: gradients that add up locally before they are exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvd_accordion.tensorflow.state import outside, variable


class LocalSums(tf.Module):
    """Gradients of several backward passes, added up locally.

    Args:
        passes: that make a sum.
        average: divide it by them.
        sparse_as_dense: take IndexedSlices, as dense gradients.
    """

    def __init__(self, passes: int, average: bool, sparse_as_dense: bool) -> None:
        super().__init__(name="sums")
        self.passes, self.average, self.sparse_as_dense = passes, average, sparse_as_dense
        self.sums: dict[str, tf.Variable] = {}
        self.count = outside(lambda: variable(0, tf.int64))

    def build(self, variables: Sequence[Any], keys: Sequence[str]) -> None:
        """Makes room for the gradients of these variables, under these keys, where there is more than one pass."""
        if self.passes > 1:
            dtypes = [tf.as_dtype(v.dtype) for v in variables]
            for v, key, dtype in zip(variables, keys, dtypes, strict=True):
                self.sums[key] = outside(lambda v=v, dtype=dtype: variable(tf.zeros(v.shape, dtype), dtype))

    def named(self) -> dict[str, tf.Variable]:
        """For a file: what is under way."""
        return {"count": self.count, **{f"sum.{key}": v for key, v in self.sums.items()}} if self.passes > 1 else {}

    def added(self, grads: list[Any], variables: list[Any], keys: list[str]) -> tuple[list[Any], tf.Tensor]:
        """The sums (or means) with these gradients added, and whether this was the last pass.

        ValueError for IndexedSlices that must not become dense.
        """
        count = self.count.assign_add(1)
        found: list[Any] = []
        for grad, v, key in zip(grads, variables, keys, strict=True):
            if isinstance(grad, tf.IndexedSlices) and not self.sparse_as_dense:
                raise ValueError(
                    "IndexedSlices are not supported when `backward_passes_per_step` > 1 and `sparse_as_dense` is False."
                )
            if grad is None:
                found.append(None)
                continue
            total = tf.convert_to_tensor(self.sums[key].assign_add(tf.cast(tf.convert_to_tensor(grad), v.dtype)))
            found.append(total / self.passes if self.average else total)
        return found, count >= self.passes

    def clear(self) -> None:
        self.count.assign(0)
        for total in self.sums.values():
            total.assign(tf.zeros_like(total))
