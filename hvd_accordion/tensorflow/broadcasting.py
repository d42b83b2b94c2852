"""broadcast_variables for tf.Variable and keras.Variable alike; Horovod's own takes only the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from hvd_accordion.tensorflow.exchange.variables import value_of
from hvd_accordion.tensorflow.transport import (
    ProcessSet,
    broadcast_in_place,
    connect,
    global_process_set,
)


def broadcast_variables(
    variables: Sequence[Any],
    root_rank: int,
    process_set: ProcessSet = global_process_set,
    inplace: bool = False,
) -> Any:
    """Gives every rank the values that the variables have on `root_rank`.

    Args:
        variables: tf.Variable and keras.Variable, of any dtype of numbers, the same on every rank.
        inplace: as Horovod's, without temporary copies.
    """
    values = [value_of(v) for v in variables]
    if inplace:  # one by one: Horovod takes the variables' names, of which two may be the same
        for v in values:
            broadcast_in_place(v, root_rank, process_set)
        return None

    def broadcast() -> list[Any]:
        transport = connect(process_set)
        names = (f"hvd_accordion.broadcast.{i}" for i in range(len(values)))
        sent = [
            transport.broadcast_from(v.read_value(), root_rank, name) for v, name in zip(values, names, strict=True)
        ]
        return [v.assign(value) for v, value in zip(values, sent, strict=True)]

    if not tf.executing_eagerly():
        return tf.group(*broadcast())
    tf.function(lambda: tf.group(*broadcast()) and None, autograph=False).get_concrete_function()()  # all at once
    return None


def broadcast_object_fn(
    root_rank: int = 0,
    session: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Callable[[Any], Any]:
    """A function that gives every rank the object that `root_rank` calls it with; Horovod's own needs TensorFlow 1."""
    name = name or "broadcast_object_fn"
    return lambda obj: connect(process_set).broadcast_object(obj, root_rank, name, session)


def broadcast_global_variables(root_rank: int) -> Any:
    """An op that gives every rank the global variables of `root_rank`, in a graph of TensorFlow 1.

    RuntimeError where TensorFlow executes eagerly: there are no global variables there.
    """
    if tf.executing_eagerly():
        raise RuntimeError(
            "hvd.broadcast_global_variables() does not support eager execution. Please use "
            "`hvd.broadcast_variables(<model/optimizer variables>)` instead."
        )
    return broadcast_variables(tf.compat.v1.global_variables(), root_rank)
