"""EpochCallback, which calls `end_epoch` of a model's distributed optimizers, and how these are found."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from hvd_accordion.tensorflow.keras.compressed_momentum import CompressedMomentum
from hvd_accordion.tensorflow.keras.distributed import Distributed
from hvd_accordion.tensorflow.transport import world_size

log = logging.getLogger("hvd_accordion")


class EpochCallback(keras.callbacks.Callback):
    """Calls `end_epoch` of every DistributedOptimizer of the model; the other callbacks of this package do, too."""

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


def optimizers_of(model: keras.Model) -> list[Any]:
    """Those of a model that average over the ranks, each once: among its attributes, and within optimizers that wrap them."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    left = list(members_of(model))
    while left:
        one = left.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Distributed | CompressedMomentum):
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
