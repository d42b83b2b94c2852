"""The primitives in TensorFlow, for eager execution and traced graphs. See protocol.py.

Nothing is updated in place. A seed or a step may be an int64 scalar tensor. Shapes are static.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow import Tensor
from tensorflow import concat as concat
from tensorflow import floor as floor
from tensorflow import reshape as reshape
from tensorflow import stack as stack

from hvd_accordion.ops.protocol import Finish


def upcast(xs: Sequence[Tensor]) -> list[Tensor]:
    return [tf.cast(x, tf.float64 if x.dtype == tf.float64 else tf.float32) for x in xs]


def add(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    return [x + y for x, y in zip(xs, ys, strict=True)]


def undo_add(y: Tensor, x: Tensor) -> Tensor:
    del x  # `add` does not modify its arguments
    return y


def accumulate(sums: Sequence[Tensor], xs: Sequence[Tensor], weight: Any, is_finite: Any) -> list[Tensor]:
    summed = [s + tf.cast(weight, s.dtype) * x for s, x in zip(sums, xs, strict=True)]
    return summed if is_finite is None else [where(is_finite, new, old) for new, old in zip(summed, sums, strict=True)]


def zeros_like(xs: Sequence[Tensor]) -> list[Tensor]:
    return [tf.zeros_like(x) for x in xs]


def commit_residual(
    is_finite: Any, finish: Finish, values: Sequence[Tensor], residual: Sequence[Tensor], xs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    del values, xs
    mean, remainder = finish(True)
    return mean, [where(is_finite, new, old) for new, old in zip(remainder, residual, strict=True)]


def all_finite(xs: Sequence[Tensor]) -> Tensor:
    return tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(x)) for x in xs]))


def flatten(xs: Sequence[Tensor]) -> Tensor:
    return tf.concat([tf.reshape(x, (-1,)) for x in xs], 0)


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    *parts, _ = tf.split(flat, [*(x.shape.num_elements() for x in like), -1])
    return [tf.reshape(part, x.shape) for part, x in zip(parts, like, strict=True)]


def transpose(x: Tensor) -> Tensor:
    return tf.linalg.matrix_transpose(x)


def pad(flat: Tensor, size: int, shape: Sequence[int]) -> Tensor:
    return tf.reshape(tf.pad(flat, [[0, size - flat.shape[0]]]), shape)


def pad_rows(x: Tensor, width: int) -> Tensor:
    return tf.pad(x, [[0, 0], [0, 0], [0, width - x.shape[2]]])


def zeros(size: int, like: Tensor) -> Tensor:
    return tf.zeros(size, like.dtype)


def cleared(x: Tensor) -> Tensor:
    return tf.zeros_like(tf.reshape(x, (-1,)))


def full(size: int, value: Tensor) -> Tensor:
    return tf.fill([size], value)


def constant(values: Sequence[int], like: Tensor) -> Tensor:
    return tf.constant(values, tf.int32)


def arange(count: int, like: Tensor) -> Tensor:
    return tf.range(count, dtype=tf.int32)


def dtype(x: Tensor) -> str:
    return x.dtype.name


def cast(x: Tensor, dtype: str) -> Tensor:
    if dtype in ("float16", "bfloat16") and x.dtype == tf.float64:  # like torch, rounds fp64 first to fp32
        x = tf.cast(x, tf.float32)
    return tf.cast(x, dtype)


def cast_like(x: Tensor, like: Tensor) -> Tensor:
    return tf.cast(x, like.dtype)


def to_bytes(x: Tensor) -> Tensor:
    if x.dtype == tf.uint8:
        return x
    return tf.reshape(tf.bitcast(x, tf.uint8), (*x.shape[:-1], x.shape[-1] * x.dtype.size))


def from_bytes(x: Tensor, dtype: str) -> Tensor:
    size = tf.as_dtype(dtype).size
    if size == 1:
        return tf.bitcast(x, dtype)
    return tf.bitcast(tf.reshape(x, (*x.shape[:-1], x.shape[-1] // size, size)), dtype)


def where(condition: Any, x: Any, y: Any) -> Tensor:
    if condition is True:  # a Python constant: no op in the graph
        return x
    dtype = next(value.dtype for value in (x, y) if tf.is_tensor(value))  # a Python number gets the dtype of the tensor
    return tf.where(condition, *(value if tf.is_tensor(value) else tf.constant(value, dtype) for value in (x, y)))


def clip(x: Tensor, low: float, high: float) -> Tensor:
    return tf.clip_by_value(x, low, high)


def max(x: Tensor, axis: int, keepdims: bool) -> Tensor:
    return tf.reduce_max(x, axis, keepdims)


def sum(x: Tensor, axis: int, keepdims: bool) -> Tensor:
    return tf.reduce_sum(x, axis, keepdims)


def norm(x: Tensor) -> Tensor:
    return tf.sqrt(tf.reduce_sum(x * x))


def top_k(x: Tensor, k: int) -> Tensor:
    # the bits of floats without their sign are ordered like the magnitudes, with NaN above Inf
    integer, mask = (tf.int64, 2**63 - 1) if x.dtype == tf.float64 else (tf.int32, 2**31 - 1)
    bits = tf.bitwise.bitwise_and(tf.bitcast(x, integer), tf.constant(mask, integer))
    return tf.sort(tf.math.top_k(bits, k, sorted=False).indices)


def argsort(x: Tensor) -> Tensor:
    return tf.argsort(x)


def searchsorted(ascending: Tensor, values: Tensor) -> Tensor:
    return tf.searchsorted(ascending, values, side="right")


def affine(factors: Sequence[int], pick: Any, shift: Any, k: int, count: int, like: Tensor) -> Tensor:
    a = tf.gather(tf.constant(factors, tf.int64), pick % len(factors))
    return tf.cast((tf.range(k, dtype=tf.int64) * a + shift) % count, tf.int32)


def take(x: Tensor, index: Tensor) -> Tensor:
    return tf.gather(x, index)


def put(x: Tensor, index: Tensor, value: float) -> Tensor:
    return tf.tensor_scatter_nd_update(x, index[:, None], tf.fill(index.shape, tf.constant(value, x.dtype)))


def scatter_add(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return tf.tensor_scatter_nd_add(x, index[:, None], values)


def add_row(x: Tensor, row: int, values: Tensor) -> Tensor:
    return tf.tensor_scatter_nd_add(x, [[row]], values[None])


def uniform(seed: Any, count: int, like: Tensor) -> Tensor:
    x = tf.cast(tf.range(count, dtype=tf.int32), tf.uint32) * _word(0x9E3779B1) + tf.cast(seed, tf.uint32)
    x = _xor_shift(x, 16) * _word(0x7FEB352D)
    x = _xor_shift(x, 15) * _word(0x846CA68B)
    x = tf.bitwise.right_shift(_xor_shift(x, 16), _word(8))
    return tf.cast(x, like.dtype) * tf.constant(2.0**-24, like.dtype)


def _word(value: int) -> Tensor:
    return tf.constant(value, tf.uint32)


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _word(bits)))


def filler_basis(like: Tensor) -> Tensor:
    _, r, n = like.shape
    row, times = tf.range(1, n + 1, dtype=tf.float64), tf.range(1, r + 1, dtype=tf.float64)
    return tf.broadcast_to(tf.cast(tf.sin(times[:, None] * row), like.dtype), like.shape)


def pack_bits(x: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return x
    words = tf.cast(tf.reshape(x, (*x.shape[:-1], x.shape[-1] // 8, 8)), tf.int64)
    word = tf.reduce_sum(tf.bitwise.left_shift(words, bits * tf.range(8, dtype=tf.int64)), -1, keepdims=True)
    packed = tf.bitwise.right_shift(word, 8 * tf.range(bits, dtype=tf.int64))
    return tf.reshape(tf.cast(packed & 0xFF, tf.uint8), (*x.shape[:-1], x.shape[-1] // 8 * bits))


def unpack_bits(x: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return x
    words = tf.cast(tf.reshape(x, (*x.shape[:-1], x.shape[-1] // bits, bits)), tf.int64)
    word = tf.reduce_sum(tf.bitwise.left_shift(words, 8 * tf.range(bits, dtype=tf.int64)), -1, keepdims=True)
    values = tf.bitwise.right_shift(word, bits * tf.range(8, dtype=tf.int64))
    return tf.reshape(tf.cast(values & ((1 << bits) - 1), tf.uint8), (*x.shape[:-1], x.shape[-1] // bits * 8))


def project(matrices: Sequence[Tensor], q: Tensor) -> Tensor:
    return tf.stack([tf.matmul(q[i], matrix, transpose_b=True) for i, matrix in enumerate(matrices)])


def project_t(matrices: Sequence[Tensor], p: Tensor) -> Tensor:
    return tf.stack([p[i] @ matrix for i, matrix in enumerate(matrices)])


def low_rank(
    matrix: Tensor, p: Tensor, q: Tensor, buffer: Tensor | None, want_remainder: bool
) -> tuple[Tensor, Tensor | None]:
    del buffer
    product = tf.matmul(p, q, transpose_a=True)
    return product, matrix - product if want_remainder else None
