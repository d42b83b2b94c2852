"""IndexedSlices, the gradients of lookups: gathered as Horovod does, not compressed further."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from hvd_accordion.comm.collectives import AllGather, sent
from hvd_accordion.policy.assignment import Layer


def average(layer: Layer, grad: Any, name: str, process_set: hvd.ProcessSet, summed: bool) -> tuple[Any, Any, Any]:
    """All ranks' slices in one, their mean or sum; whether they are finite; the bytes that this rank sent.

    A missing gradient is one without slices.
    """
    if grad is None:
        values = tf.zeros((0, *layer.shape[1:]), layer.dtype)
        grad = tf.IndexedSlices(values, tf.zeros(0, tf.int64), tf.constant(layer.shape, tf.int64))
    size = process_set.size()
    where = {"process_set": process_set, "ignore_name_scope": True}
    mine, indices = grad.values, tf.cast(grad.indices, tf.int64)
    values = hvd.allgather(mine, name=f"{name}.values", **where)
    rows = hvd.allgather(indices, name=f"{name}.indices", **where)
    nbytes = tf.size(mine, tf.int64) * mine.dtype.size + tf.size(indices, tf.int64) * 8
    joined = tf.IndexedSlices(values if summed else values / size, tf.cast(rows, grad.indices.dtype), grad.dense_shape)
    ok = tf.reduce_all(tf.math.is_finite(values))
    return joined, ok, tf.cast(nbytes, tf.float64) * sent(AllGather, 1, size)
