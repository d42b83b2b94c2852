"""How many micro-batches make an update, and what the learning rate is multiplied with for it, in a graph."""

from __future__ import annotations

import tensorflow as tf

from hvd_accordion.tensorflow.exchange.state import State
from hvd_accordion.training.controller import Controller


def micro_batches(controller: Controller, state: State) -> tf.Tensor:
    """int64, of which the update to come is made."""
    counts = (v.read_value() for v in (state.step, state.step_of_epoch, state.passes))
    limits = [tf.cast(x, tf.int64) for x in controller.limits(*counts)]
    return tf.maximum(tf.reduce_min(tf.stack(limits)), 1)


def lr_scale(state: State, micro_batches: tf.Tensor) -> tf.Tensor:
    """float64, of an update of so many; to be read before its exchange, which may change the size of batches."""
    full = tf.cast(state.passes.read_value(), tf.float64)
    return state.lr_scale.read_value() * (tf.cast(micro_batches, tf.float64) / full)
