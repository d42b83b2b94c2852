"""Exchanges of an elastic job inside of graphs: a graph outlives a change of ranks, what it is to do for them does not.

The graph of a training step, Keras's or a tf.function of the user's, is traced once and for all. In an elastic job it holds
a call of Python in place of the exchange, which runs a graph of its own, traced anew whenever ranks were gathered anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from hvd_accordion.tensorflow.exchange.state import outside
from hvd_accordion.tensorflow.transport import HorovodInternalError, has_failed

# exchanges of one graph run one after the other, in the order in which it was traced
_order: list[tf.Variable] = []


def call(
    exchange: Callable[[list[Any], tf.Tensor, tf.Tensor], list[Any]],
    gradients: Sequence[Any],
    variables: Sequence[Any],
    rate: tf.Tensor,
    steps: Any,
    touched: Sequence[tf.Variable],
) -> list[Any]:
    """What `exchange(gradients, rate, steps)` gives when the graph runs; of each gradient the same kind of thing, or None.

    Args:
        touched: variables that the graph reads and the exchange writes.

    Raises RuntimeError where TensorFlow has but one thread for this.
    """
    if threads() < 2:
        raise RuntimeError(
            "elastic training inside of tf.function or fit needs 2 inter-op threads of TensorFlow or more, got 1: set "
            "TF_NUM_INTEROP_THREADS=2, or call tf.config.threading.set_inter_op_parallelism_threads(2)"
        )
    if not _order:
        _order.append(outside(lambda: tf.Variable(0, trainable=False)))
    given = [(g.values, g.indices) if isinstance(g, tf.IndexedSlices) else () if g is None else (g,) for g in gradients]
    flat = [x for each in given for x in each]
    # TensorFlow keeps the order of what is done to a variable: the graph's own reads and this call
    handles = [v.handle for v in (_order[0], *touched)]
    shapes = [tuple(v.shape) for v in variables]

    def run(*arguments: tf.Tensor) -> list[tf.Tensor]:
        rate, steps, *values = arguments[len(handles) :]
        rest = iter(values)
        grads = [restored([next(rest) for _ in each], shape) for each, shape in zip(given, shapes, strict=True)]
        try:
            means = exchange(grads, rate, steps)
        except tf.errors.OpError as error:
            if has_failed(error):
                raise HorovodInternalError(str(error)) from error
            raise
        return [x for each, mean in zip(given, means, strict=True) for x in taken_apart(mean, len(each))]

    done = iter(tf.py_function(run, [*handles, rate, tf.cast(steps, tf.int64), *flat], [x.dtype for x in flat]))
    means = [restored([next(done) for _ in each], shape) for each, shape in zip(given, shapes, strict=True)]
    for mean, g in zip(means, gradients, strict=True):
        if isinstance(mean, tf.IndexedSlices):
            mean.values.set_shape([None, *g.values.shape[1:]])
            mean.indices.set_shape([None])
        elif mean is not None:
            mean.set_shape(g.shape)
    return means


def restored(parts: Sequence[tf.Tensor], shape: tuple[int, ...]) -> Any:
    if len(parts) == 2:
        return tf.IndexedSlices(*parts, tf.constant(shape, tf.int64))
    return parts[0] if parts else None


def taken_apart(mean: Any, parts: int) -> list[tf.Tensor]:
    """In as many parts as there is room for; where other ranks had a dense gradient, all rows are slices."""
    if parts < 2 or isinstance(mean, tf.IndexedSlices):
        return [mean.values, mean.indices] if parts == 2 else [mean][:parts]
    return [mean, tf.range(mean.shape[0])]


def threads() -> int:
    """Threads for operations of TensorFlow side by side: a call of Python out of a graph takes one as long as it lasts."""
    configured = tf.config.threading.get_inter_op_parallelism_threads() or os.environ.get("TF_NUM_INTEROP_THREADS")
    return int(configured or len(os.sched_getaffinity(0)))
