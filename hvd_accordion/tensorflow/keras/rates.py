"""The learning rate of a Keras optimizer, and its scaling for one update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf


def innermost(optimizer: Any) -> Any:
    """The optimizer whose rate and velocity count."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def learning_rate_of(optimizer: Any) -> float:
    return float(tf.convert_to_tensor(optimizer.learning_rate))


@contextmanager
def scaled_rate(optimizer: Any, scale: tf.Tensor | None) -> Iterator[None]:
    """Within it the optimizer reads its rate times `scale`; the variable or schedule that holds the rate stays as it is."""
    if scale is None:
        yield
        return
    inner = innermost(optimizer)
    rate = tf.convert_to_tensor(inner.learning_rate)
    rate *= tf.cast(scale, rate.dtype)
    # what the property `learning_rate` asks; in the object's dict it hides the method of its class
    inner.__dict__["_get_current_learning_rate"] = lambda: rate
    try:
        yield
    finally:
        del inner.__dict__["_get_current_learning_rate"]
