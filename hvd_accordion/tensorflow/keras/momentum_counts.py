"""Where a training stands in a `Schedule`, in variables that a graph reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvd_accordion.optim.momentum_schedule import MARKS, Counts, Kind, Schedule, is_stable

COUNTS = ("step", "updates", "since_dense", "since_exchange", "warmup")  # of `Counts`


class CountVariables:
    """`Counts` in a graph.

    Args:
        add_variable: the optimizer's, which saves what it makes.
    """

    def __init__(self, schedule: Schedule, add_variable: Callable[..., Any]) -> None:
        self.schedule = schedule
        minus_one = keras.initializers.Constant(-1)
        self.of = {name: add_variable((), dtype="int64", name=name) for name in COUNTS if name != "warmup"}
        self.of["warmup"] = add_variable((), initializer=minus_one, dtype="int64", name="warmup")
        self.norms = add_variable((MARKS + 1,), dtype="float64", name="norms")

    def __getitem__(self, name: str) -> tf.Tensor:
        return tf.convert_to_tensor(self.of[name])

    def now(self) -> Counts:
        """Their values, eagerly."""
        step, updates, since_dense, since_exchange, warmup = (int(self[name]) for name in COUNTS)
        return Counts(step, updates, since_dense, since_exchange, warmup)

    def kind(self) -> tf.Tensor:
        """See `Counts.kind`."""
        schedule, warmup = self.schedule, self["warmup"]
        dense = self["since_dense"] + 1 >= schedule.variance_interval(self["updates"])
        # in the warm-up there is no number of steps after it, but it must not be negative either
        after = tf.where(warmup < 0, tf.zeros_like(warmup), self["step"] - warmup)
        momentum = self["since_exchange"] + 1 >= schedule.exchange_interval(after)
        early = tf.where(dense, Kind.DENSE.value, Kind.MOMENTUM.value)
        return tf.where(warmup < 0, early, tf.where(momentum, Kind.MOMENTUM.value, Kind.LOCAL.value))

    def advance(self, kind: tf.Tensor) -> None:
        """See `Counts.advance`."""
        dense, local = tf.equal(kind, Kind.DENSE.value), tf.equal(kind, Kind.LOCAL.value)
        zero, step, warmup = tf.constant(0, tf.int64), self["step"] + 1, self["warmup"]
        self.of["step"].assign(step)
        self.of["updates"].assign(self["updates"] + tf.cast(dense, tf.int64))
        self.of["since_dense"].assign(tf.where(dense, zero, self["since_dense"] + 1))
        self.of["since_exchange"].assign(tf.where(local, self["since_exchange"] + 1, zero))
        if self.schedule.warmup_steps is not None:
            ends = tf.equal(step, self.schedule.warmup_steps)
            self.of["warmup"].assign(tf.where(ends & (warmup < 0), step, warmup))

    def measure(self, interval: int, norm: Callable[[], tf.Tensor]) -> None:
        """Takes ||v||_1, equal on all ranks, if that is due; see `Counts.is_mark` and `Counts.measured`."""
        if self.schedule.warmup_steps is not None:
            return

        def measured() -> tf.Tensor:
            norms = tf.concat([tf.convert_to_tensor(self.norms)[1:], [norm()]], 0)
            self.norms.assign(norms)
            self.of["warmup"].assign(tf.where(is_stable(norms[0], norms[-1]), self["step"], self["warmup"]))
            return tf.constant(True)

        due = (self["warmup"] < 0) & tf.equal(self["step"] % interval, 0)
        tf.cond(due, measured, lambda: tf.constant(False))
