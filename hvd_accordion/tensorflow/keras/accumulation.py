"""Gradients of several backward passes, added up locally before they are exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import tensorflow as tf

from hvd_accordion.tensorflow.exchange.state import outside, variable


def zeros(shape: Any, dtype: tf.DType) -> tf.Variable:
    return variable(tf.zeros(shape, dtype), dtype)


class LocalSums(tf.Module):
    """Sums of gradients, kept in fp32 at least.

    Args:
        passes: the most that make a sum.
        average: divide it by their number.
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
            dtypes = [tf.float64 if tf.as_dtype(v.dtype) == tf.float64 else tf.float32 for v in variables]
            for v, key, dtype in zip(variables, keys, dtypes, strict=True):
                self.sums[key] = outside(partial(zeros, v.shape, dtype))

    def named(self) -> dict[str, tf.Variable]:
        """For a file: what is under way."""
        return {"count": self.count, **{f"sum.{key}": v for key, v in self.sums.items()}} if self.passes > 1 else {}

    def add(self, grads: list[Any], keys: list[str]) -> tf.Tensor:
        """Adds these gradients; returns how many times that was done since the sums were cleared.

        ValueError for IndexedSlices that must not become dense.
        """
        count = self.count.assign_add(1)
        for grad, key in zip(grads, keys, strict=True):
            if isinstance(grad, tf.IndexedSlices) and not self.sparse_as_dense:
                raise ValueError(
                    "IndexedSlices are not supported when gradients of several passes are added up "
                    "(`backward_passes_per_step` > 1, `batch_size`) and `sparse_as_dense` is False."
                )
            if grad is not None:
                self.sums[key].assign_add(tf.cast(tf.convert_to_tensor(grad), self.sums[key].dtype))
        return tf.convert_to_tensor(count)

    def total(self, variable: Any, key: str, count: tf.Tensor) -> tf.Tensor:
        """The sum (or mean) of `count` gradients of a variable, in its type."""
        total = self.sums[key].read_value()
        return tf.cast(total / tf.cast(count, total.dtype) if self.average else total, variable.dtype)

    def clear(self) -> None:
        self.count.assign(0)
        for total in self.sums.values():
            total.assign(tf.zeros_like(total))
