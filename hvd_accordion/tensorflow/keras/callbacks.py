"""Horovod's callbacks for Keras, on Keras 3. Each of them tells the optimizer of the epochs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import horovod.tensorflow.keras.callbacks as theirs
import keras
import numpy as np
import tensorflow as tf

from hvd_accordion.comm import naming
from hvd_accordion.tensorflow.broadcasting import broadcast_variables
from hvd_accordion.tensorflow.exchange.agreement import require_equal
from hvd_accordion.tensorflow.exchange.variables import value_of
from hvd_accordion.tensorflow.keras.learning_rate import innermost, learning_rate_of
from hvd_accordion.tensorflow.keras.optimizer import _Distributed
from hvd_accordion.tensorflow.transport import Transport, global_process_set, world_rank, world_size

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "EpochCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
]

log = logging.getLogger("hvd_accordion")


class EpochCallback(keras.callbacks.Callback):
    """Tells every DistributedOptimizer of the model when an epoch is over; the other callbacks of this module do, too."""

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        if model is not None and optimizers_of(model) and getattr(model, "jit_compile", False):
            if tf.config.list_physical_devices("GPU"):  # what Keras makes of "auto" there
                model.jit_compile = False
                log.warning("jit_compile is off: Horovod's collectives can't be compiled by XLA")

    def on_train_begin(self, logs: Any = None) -> None:
        if world_size() > 1 and exchanges_nothing(self.model):
            log.warning(
                "%d ranks train, each for itself: the model's optimizer, %r, is no DistributedOptimizer and holds none; "
                "compile with hvd.DistributedOptimizer(...)",
                world_size(),
                self.model.optimizer,
            )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        for optimizer in optimizers_of(self.model):
            optimizer.end_epoch()


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
                sums = optimizer._hvd_sums
                count = sums.count if sums.passes > 1 else None
                optimizer._hvd.broadcast(self.root_rank, count, list(sums.sums.values()))
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
            ranks = Transport(global_process_set)
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


class LearningRateScheduleCallback(EpochCallback):
    """Sets the learning rate to `initial_lr * multiplier(epoch)` from `start_epoch` up to, not including, `end_epoch`.

    Args:
        multiplier: a function of the epoch, or a constant c, which stands for c^(epoch - start_epoch).
        staircase: change it at the beginning of an epoch; otherwise of every batch, and the epoch is a fraction.
        momentum_correction: scale the optimizer's velocity with the rate (Goyal et al. 2017, arXiv 1706.02677, 3.1).
        steps_per_epoch: where Keras does not know it and `staircase` is False.
    """

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if initial_lr is None:
            raise ValueError("Parameter `initial_lr` is required")
        self.initial_lr, self.start_epoch, self.end_epoch = initial_lr, start_epoch, end_epoch
        self.staircase, self.momentum_correction, self.steps_per_epoch = staircase, momentum_correction, steps_per_epoch
        constant = multiplier
        self.multiplier = multiplier if callable(multiplier) else lambda epoch: constant ** (epoch - start_epoch)
        self.current_epoch = 0

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise ValueError(
                    "Could not autodetect the number of steps per epoch. Please specify the steps_per_epoch parameter to "
                    f"the {type(self).__name__}()."
                )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.current_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.current_epoch < self.start_epoch or (
            self.end_epoch is not None and self.current_epoch >= self.end_epoch
        ):
            return
        if not self.staircase:
            self._adjust(self.current_epoch + batch / self.steps_per_epoch)
        elif batch == 0:
            self._adjust(self.current_epoch)

    def _adjust(self, epoch: float) -> None:
        optimizer = innermost(self.model.optimizer)
        old, new = learning_rate_of(optimizer), self.initial_lr * self.multiplier(epoch)
        optimizer.learning_rate = new
        if self.momentum_correction and old > 0 and getattr(optimizer, "momentum", 0):
            # Keras's velocity contains the rate: v = momentum v - lr g
            for velocity in getattr(optimizer, "momentums", None) or getattr(optimizer, "_momentums", []):
                velocity.assign(velocity * (new / old))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        if logs is not None:
            logs["lr"] = learning_rate_of(self.model.optimizer)


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate from `initial_lr / size` to `initial_lr` over the first epochs, batch by batch.

    (Goyal et al. 2017, arXiv 1706.02677, 2.2.)
    """

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        def multiplier(epoch: float) -> float:
            epoch += 1.0 / self.steps_per_epoch  # round numbers at the ends of epochs
            return (epoch * (world_size() - 1) / warmup_epochs + 1) / world_size()

        super().__init__(initial_lr, multiplier, 0, warmup_epochs, False, momentum_correction, steps_per_epoch)
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        if epoch == self.end_epoch - 1 and self.verbose > 0 and world_rank() == 0:
            rate = learning_rate_of(self.model.optimizer)
            print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {rate:g}.")


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


def optimizers_of(model: keras.Model) -> list[Any]:
    """The distributed optimizers of a model, each once: among its attributes, and within optimizers that wrap them."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    left = list(members_of(model))
    while left:
        one = left.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, _Distributed):
            found[id(one)] = one
        left += members_of(one)
    return list(found.values())


def members_of(owner: Any) -> Iterator[Any]:
    """The optimizers among an object's attributes, in lists and dicts too."""
    for value in vars(owner).values():
        several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        yield from (one for one in several if isinstance(one, keras.optimizers.Optimizer))


def exchanges_nothing(model: keras.Model) -> bool:
    """Whether Keras's own training step will run an optimizer that no DistributedOptimizer is part of."""
    own_step = type(model).train_step is not keras.Model.train_step
    return model.optimizer is not None and not own_step and not optimizers_of(model)
