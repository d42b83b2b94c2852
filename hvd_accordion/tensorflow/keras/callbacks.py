"""Mirrors horovod.tensorflow.keras.callbacks, on Keras 3. Each also calls the optimizer's `end_epoch`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import horovod.tensorflow.keras.callbacks as theirs
import keras
import numpy as np
import tensorflow as tf

from hvd_accordion.comm import naming
from hvd_accordion.tensorflow.broadcasting import broadcast_variables
from hvd_accordion.tensorflow.exchange.agreement import require_equal
from hvd_accordion.tensorflow.exchange.variables import value_of
from hvd_accordion.tensorflow.keras.epochs import EpochCallback, optimizers_of
from hvd_accordion.tensorflow.keras.schedules import LearningRateScheduleCallback, LearningRateWarmupCallback
from hvd_accordion.tensorflow.transport import connect, global_process_set, world_size

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "EpochCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
]


class BroadcastGlobalVariablesCallback(EpochCallback):
    """Gives every rank the variables of the model and of its optimizers that `root_rank` has, before the first step.

    Whatever `root_rank` restored from a checkpoint comes along, what compression keeps included, but for residuals,
    which are each rank's own. So are the states of random seeds: ranks drop out different units.

    Args:
        root_rank: rank that sends.
        device: where the broadcast runs, such as "/cpu:0".
        local_variables: a variable or a collection of those that stay each rank's own.
    """

    def __init__(self, root_rank: int, device: str = "", local_variables: Any = None) -> None:
        super().__init__()
        self.root_rank, self.device = root_rank, device
        self._done: int | None = None  # in which generation of ranks
        self._local: set[int] = set()
        single = local_variables is not None and hasattr(local_variables, "assign")
        for v in [local_variables] if single else local_variables or ():
            if not hasattr(v, "assign"):
                raise ValueError("All local variables must be of tf.Variable type.")
            self.register_local_var(v)

    def register_local_var(self, var: Any) -> None:
        """This variable stays each rank's own."""
        self._local.add(id(value_of(var)))

    @property
    def broadcast_done(self) -> bool:
        """Whether the ranks of now have been given their variables."""
        return self._done == naming.generation()

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        if self.broadcast_done or not self.model.built:
            return
        optimizer = self.model.optimizer
        if optimizer is not None and not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        if all(optimizer.built for optimizer in optimizers_of(self.model)):
            self._broadcast()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if not self.broadcast_done:  # variables that the first step had to make
            self._broadcast()

    def _broadcast(self) -> None:
        optimizers = optimizers_of(self.model)
        found = [*self.model.variables]
        for optimizer in optimizers or [self.model.optimizer]:
            found += optimizer.variables if optimizer is not None else []
        unique = {id(value_of(v)): v for v in found if v.name != "seed_generator_state"}
        with tf.device(self.device or None):
            broadcast_variables([v for key, v in unique.items() if key not in self._local], self.root_rank)
            for optimizer in optimizers:
                optimizer.broadcast(self.root_rank)
        self._done = naming.generation()


class MetricAverageCallback(EpochCallback):
    """Averages the metrics of an epoch over the ranks, for itself and for the callbacks behind it in the list.

    Numbers and arrays of any shape; anything else in the logs is left as it is. ValueError, on every rank the same, where
    ranks have different metrics: one that only some ranks validate has some that the others lack.
    """

    def __init__(self, device: str = "") -> None:
        super().__init__()
        self.device = device

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        if logs is None or world_size() == 1:
            return
        found = {name: np.asarray(value) for name, value in sorted(logs.items())}
        mine = {name: value.astype(np.float64) for name, value in found.items() if value.dtype.kind in "biuf"}
        shapes = {f"metric {name}": value.shape for name, value in mine.items()}
        with tf.device(self.device or None):
            ranks = connect(global_process_set)
            require_equal(shapes, "hvd_accordion.metrics.names", ranks)
            if mine:
                joined = tf.constant(np.concatenate([value.reshape(-1) for value in mine.values()]))
                (means,) = ranks.mean([joined], "hvd_accordion.metrics")
                logs.update(split(means.numpy(), mine))


def split(joined: np.ndarray, like: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays of these shapes out of one vector; numbers as floats."""
    ends = np.cumsum([value.size for value in like.values()])
    parts = np.split(joined, ends[:-1])
    named = zip(like.items(), parts, strict=True)
    return {name: part.reshape(value.shape) if value.ndim else float(part[0]) for (name, value), part in named}


class BestModelCheckpoint(theirs.BestModelCheckpoint):
    """Saves the best model so far, as `keras.callbacks.ModelCheckpoint(..., save_best_only=True)`.

    Args:
        filepath: where to; may be set as an attribute later, as Horovod's estimators do. ValueError where a training begins
            without.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        filepath: Any = None,
    ) -> None:
        some = "best.weights.h5" if save_weights_only else "best.keras"  # Keras wants to see one
        options = {"verbose": verbose, "save_best_only": True, "save_weights_only": save_weights_only, "mode": mode}
        keras.callbacks.ModelCheckpoint.__init__(self, filepath or some, monitor, save_freq=save_freq, **options)
        if filepath is None:
            self.filepath = None

    def on_train_begin(self, logs: Any = None) -> None:
        if self.filepath is None:
            raise ValueError("filepath must be a path, got None: pass it, or set it before the training")
        super().on_train_begin(logs)
