"""The primitives in numpy: the reference of the tests, also used by simulated clusters. See protocol.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy import clip as clip
from numpy import concatenate
from numpy import floor as floor
from numpy import reshape as reshape
from numpy import stack as stack
from numpy import where as where

from hvd_accordion.ops import selection
from hvd_accordion.ops.protocol import Finish

Array: TypeAlias = np.ndarray[Any, Any]


def upcast(xs: Sequence[Array]) -> list[Array]:
    return [np.asarray(x, dtype=np.float64 if x.dtype == np.float64 else np.float32, order="C") for x in xs]


def add(xs: Sequence[Array], ys: Sequence[Array]) -> list[Array]:
    return [x + y for x, y in zip(xs, ys, strict=True)]


def undo_add(y: Array, x: Array) -> Array:
    del x  # `add` does not modify its arguments
    return y


def accumulate(sums: Sequence[Array], xs: Sequence[Array], weight: float, is_finite: Array | None) -> list[Array]:
    return [
        s + s.dtype.type(weight) * x if is_finite is None or is_finite else s for s, x in zip(sums, xs, strict=True)
    ]


def zeros_like(xs: Sequence[Array]) -> list[Array]:
    return [np.zeros_like(x) for x in xs]


def commit_residual(
    is_finite: Array, finish: Finish, values: Sequence[Array], residual: Sequence[Array], xs: Sequence[Array]
) -> tuple[list[Array], list[Array]]:
    del values, xs
    mean, remainder = finish(True)
    return mean, [np.where(is_finite, new, old) for new, old in zip(remainder, residual, strict=True)]


def all_finite(xs: Sequence[Array]) -> Array:
    return np.array(all(np.isfinite(x).all() for x in xs))


def flatten(xs: Sequence[Array]) -> Array:
    return np.concatenate([x.reshape(-1) for x in xs])


def unflatten(flat: Array, like: Sequence[Array]) -> list[Array]:
    ends = np.cumsum([x.size for x in like])
    return [flat[end - x.size : end].reshape(x.shape) for x, end in zip(like, ends, strict=True)]


def transpose(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)


def concat(xs: Sequence[Array], axis: int) -> Array:
    return concatenate(list(xs), axis=axis)


def pad(flat: Array, size: int, shape: Sequence[int]) -> Array:
    return np.pad(flat, (0, size - flat.size)).reshape(shape)


def pad_rows(x: Array, width: int) -> Array:
    return np.pad(x, ((0, 0), (0, 0), (0, width - x.shape[2])))


def zeros(size: int, like: Array) -> Array:
    return np.zeros(size, like.dtype)


def cleared(x: Array) -> Array:
    return np.zeros_like(x).reshape(-1)


def full(size: int, value: Array) -> Array:
    return np.full(size, value)


def constant(values: Sequence[int], like: Array) -> Array:
    return np.array(values, np.int32)


def arange(count: int, like: Array) -> Array:
    return np.arange(count, dtype=np.int32)


def dtype(x: Array) -> str:
    return x.dtype.name


def cast(x: Array, dtype: str) -> Array:
    if dtype == "bfloat16":  # not a numpy dtype: the upper 16 bits of an fp32, rounded to nearest, ties to even
        bits = x.astype(np.float32).view(np.uint32)
        upper = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
        return np.where(np.isnan(x), np.uint32(0x7FC0), upper).astype(np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        return (x.astype(np.float32) if dtype == "float16" else x).astype(
            dtype
        )  # like the frameworks, rounds fp64 first to fp32


def cast_like(x: Array, like: Array) -> Array:
    return x.astype(like.dtype)


def to_bytes(x: Array) -> Array:
    return np.ascontiguousarray(x).view(np.uint8)


def from_bytes(x: Array, dtype: str) -> Array:
    x = np.ascontiguousarray(x)
    if dtype == "bfloat16":
        return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return x.view(dtype)


def max(x: Array, axis: int, keepdims: bool) -> Array:
    return np.max(x, axis=axis, keepdims=keepdims)


def sum(x: Array, axis: int, keepdims: bool) -> Array:
    return np.sum(x, axis=axis, keepdims=keepdims)


def norm(x: Array) -> Array:
    return np.sqrt(np.sum(x * x))


def top_k(x: Array, k: int) -> Array:
    return selection.exact(x, k)


def argsort(x: Array) -> Array:
    return np.argsort(x).astype(np.int32)


def searchsorted(ascending: Array, values: Array) -> Array:
    return np.searchsorted(ascending, values, side="right").astype(np.int32)


def affine(factors: Sequence[int], pick: int, shift: int, k: int, count: int, like: Array) -> Array:
    return ((np.arange(k, dtype=np.int64) * factors[pick % len(factors)] + shift) % count).astype(np.int32)


def take(x: Array, index: Array) -> Array:
    return x[index]


def put(x: Array, index: Array, value: float) -> Array:
    x = x.copy()
    x[index] = value
    return x


def scatter_add(x: Array, index: Array, values: Array) -> Array:
    x = x.copy()
    np.add.at(x, index, values)
    return x


def add_row(x: Array, row: int, values: Array) -> Array:
    x = x.copy()
    x[row] += values
    return x


def uniform(seed: int, count: int, like: Array) -> Array:
    x = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(seed)
    x ^= x >> 16
    x *= np.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= np.uint32(0x846CA68B)
    x ^= x >> 16
    return (x >> 8).astype(like.dtype) * like.dtype.type(2.0**-24)


def filler_basis(like: Array) -> Array:
    _, r, n = like.shape
    return np.broadcast_to(
        np.sin(np.outer(np.arange(1.0, r + 1), np.arange(1.0, n + 1))).astype(like.dtype), like.shape
    )


def pack_bits(x: Array, bits: int) -> Array:
    words = x.reshape(*x.shape[:-1], -1, 8).astype(np.int64) << (bits * np.arange(8))
    word = np.bitwise_or.reduce(words, axis=-1)[..., None]
    return ((word >> (8 * np.arange(bits))) & 0xFF).astype(np.uint8).reshape(*x.shape[:-1], -1)


def unpack_bits(x: Array, bits: int) -> Array:
    words = x.reshape(*x.shape[:-1], -1, bits).astype(np.int64) << (8 * np.arange(bits))
    word = np.bitwise_or.reduce(words, axis=-1)[..., None]
    return ((word >> (bits * np.arange(8))) & ((1 << bits) - 1)).astype(np.uint8).reshape(*x.shape[:-1], -1)


def project(matrices: Sequence[Array], q: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return q @ transpose(np.stack(matrices))


def project_t(matrices: Sequence[Array], p: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return p @ np.stack(matrices)


def low_rank(
    matrix: Array, p: Array, q: Array, buffer: Array | None, want_remainder: bool
) -> tuple[Array, Array | None]:
    del buffer
    with np.errstate(invalid="ignore"):
        product = p.T @ q
        return product, matrix - product if want_remainder else None
