"""The learning rate of a Keras optimizer, and its scaling for one update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf


def innermost(optimizer: Any) -> Any:
    """The optimizer whose rate and velocity count."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def members(optimizer: Any) -> list[Any]:
    """The optimizers that hold a rate: the innermost, or those that a MultiOptimizer chooses from."""
    inner = innermost(optimizer)
    return list(inner.optimizers) if isinstance(inner, keras.optimizers.MultiOptimizer) else [inner]


def counters(optimizer: Any) -> list[Any]:
    """The variables in which an optimizer counts its updates."""
    return [one._iterations for one in dict.fromkeys([innermost(optimizer), *members(optimizer)])]


def rate_of(optimizer: Any) -> Any:
    """The learning rate of now; the largest, where there are several."""
    rates = [tf.cast(tf.convert_to_tensor(one.learning_rate), tf.float64) for one in members(optimizer)]
    return rates[0] if len(rates) == 1 else tf.reduce_max(tf.stack(rates))


def learning_rate_of(optimizer: Any) -> float:
    return float(tf.convert_to_tensor(optimizer.learning_rate))


@contextmanager
def scaled_rate(optimizer: Any, scale: tf.Tensor | None) -> Iterator[None]:
    """Within it the optimizer reads its rate times `scale`, and what it sets is taken to be so scaled.

    The variable or schedule that holds the rate has the rate itself, whatever the optimizer does to it in its step.
    """
    if scale is None:
        yield
        return

    def scaled(one: Any) -> tf.Tensor:
        rate = tf.convert_to_tensor(type(one)._get_current_learning_rate(one))
        return rate * tf.cast(scale, rate.dtype)

    scaled_now = members(optimizer)
    for one in scaled_now:
        # the property `learning_rate` calls it; in the object's dict it hides the method of the class
        one.__dict__["_get_current_learning_rate"] = lambda one=one: scaled(one)
    optimizer.__dict__["_hvd_scale"] = scale
    try:
        yield
    finally:
        optimizer.__dict__["_hvd_scale"] = None
        for one in scaled_now:
            del one.__dict__["_get_current_learning_rate"]
