"""IndexedSlices, the gradients of lookups: gathered as Horovod does, not compressed further."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from hvd_accordion.comm.collectives import AllGather, sent
from hvd_accordion.policy.layers import Layer
from hvd_accordion.tensorflow.transport import HorovodTransport


class Gathered(NamedTuple):
    """All ranks' slices of a layer in one, their mean or sum; whether they are finite; the bytes that this rank sent."""

    slices: tf.IndexedSlices
    ok: tf.Tensor
    nbytes: tf.Tensor


def gather(layer: Layer, grad: Any, name: str, transport: HorovodTransport, summed: bool) -> Gathered:
    """A missing gradient is one without slices."""
    if grad is None:
        values = tf.zeros((0, *layer.shape[1:]), layer.dtype)
        grad = tf.IndexedSlices(values, tf.zeros(0, tf.int64), tf.constant(layer.shape, tf.int64))
    size = transport.size
    mine, indices = grad.values, tf.cast(grad.indices, tf.int64)
    values = transport.allgather(mine, f"{name}.values")
    rows = transport.allgather(indices, f"{name}.indices")
    nbytes = tf.size(mine, tf.int64) * mine.dtype.size + tf.size(indices, tf.int64) * 8
    joined = tf.IndexedSlices(values if summed else values / size, tf.cast(rows, grad.indices.dtype), grad.dense_shape)
    ok = tf.reduce_all(tf.math.is_finite(values))
    return Gathered(joined, ok, tf.cast(nbytes, tf.float64) * sent(AllGather, 1, size))
