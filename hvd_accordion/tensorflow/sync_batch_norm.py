"""SyncBatchNormalization for Keras 3: batch normalization over the batches of all ranks."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from hvd_accordion.tensorflow.transport import sum_by_place, world_size


@keras.saving.register_keras_serializable("hvd_accordion")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """As `keras.layers.BatchNormalization`, with mean and variance over the batches of all ranks while it trains.

    Each rank counts with its number of values: what comes out is that of one process on the whole batch, ranks with smaller
    batches and masks included. One allreduce of 3 numbers a channel.

    Args:
        fused: False; ValueError for anything else.
        options: of `keras.layers.BatchNormalization`.
    """

    def __init__(self, fused: bool = False, **options: Any) -> None:
        if fused is not False:
            raise ValueError(f"fused must be False for SyncBatchNormalization, got {fused!r}")
        super().__init__(**options)

    def _moments(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
        """Keras's `call` takes the moments of the batch from this; it is not public."""
        mean, variance = super()._moments(inputs, mask)
        if world_size() == 1:
            return mean, variance
        count = self._count(inputs, mask)
        mean, variance = tf.reshape(mean, (-1,)), tf.reshape(variance, (-1,))
        parts = tf.stack([mean * count, (variance + tf.square(mean)) * count, count])
        mean, square, count = tf.unstack(sum_by_place(parts))
        count = tf.maximum(count, 1.0)
        return mean / count, tf.maximum(square / count - tf.square(mean / count), 0.0)

    def _count(self, inputs: Any, mask: Any) -> tf.Tensor:
        """How many values each channel's moments are made of."""
        channels = inputs.shape[self.axis]
        if mask is None:
            return tf.fill([channels], tf.cast(tf.size(inputs) / channels, inputs.dtype))
        counted = tf.broadcast_to(tf.cast(mask, inputs.dtype)[..., None], tf.shape(inputs))
        return tf.reduce_sum(counted, self._reduction_axes)


if not callable(getattr(keras.layers.BatchNormalization, "_moments", None)):
    raise ImportError("keras.layers.BatchNormalization has no method _moments: this version of Keras is not supported")
