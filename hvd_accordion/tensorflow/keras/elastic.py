"""Mirrors horovod.tensorflow.keras.elastic, on Keras 3; see hvd_accordion.tensorflow.elastic."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow.keras.elastic as _horovod
import keras
from horovod._keras import elastic as _impl

from hvd_accordion.tensorflow.elastic import TensorFlowKerasState as TensorFlowKerasState
from hvd_accordion.tensorflow.elastic import run as run
from hvd_accordion.tensorflow.keras.epochs import EpochCallback

__all__ = [*_horovod.__all__]


class KerasState(TensorFlowKerasState):
    """A Keras model and its optimizers, with what compression keeps for them, and attributes of any kind.

    Args, errors: as `hvd_accordion.tensorflow.elastic.TensorFlowKerasState`'s.
    """

    def __init__(self, model: Any, optimizer: Any = None, **kwargs: Any) -> None:
        super().__init__(model, optimizer, keras.backend, **kwargs)


class CommitStateCallback(_impl.CommitStateCallbackImpl, EpochCallback):
    """Commits a state every so many batches, and at the end of an epoch.

    Args:
        state: a state of `hvd.elastic`.
        batches_per_commit: batches from commit to commit.
    """

    def __init__(self, state: Any, batches_per_commit: int = 1) -> None:
        super().__init__(keras.backend, state, batches_per_commit)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        EpochCallback.on_epoch_end(self, epoch, logs)  # before the commit, which then includes the end of the epoch
        super().on_epoch_end(epoch, logs)


class UpdateBatchStateCallback(EpochCallback):
    """Keeps the number of the batch in `state.batch`: 0 from the end of an epoch on.

    An epoch of a known number of steps that ranks were gathered in goes on where it was: its first `fit` after that ends it
    `state.batch` steps earlier.

    Args:
        state: a state of `hvd.elastic` with an attribute `batch`.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state, self.begun = state, 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.begun = self.state.batch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.state.batch = self.begun + batch
        steps = self.params.get("steps")
        if steps and self.begun and self.state.batch + 1 >= steps and not self.model.stop_training:
            self.model.stop_training = _EPOCH

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        self.state.batch = 0
        if self.model.stop_training is _EPOCH:  # unless another callback has stopped it since
            self.model.stop_training = False


_EPOCH = "epoch"  # as `stop_training`: this epoch, not the training


class UpdateEpochStateCallback(_impl.UpdateEpochStateCallbackImpl, EpochCallback):
    """Keeps the number of epochs that are over, those of earlier calls of `fit` included, in `state.epoch`.

    Args:
        state: a state of `hvd.elastic` with an attribute `epoch`.
    """

    def __init__(self, state: Any) -> None:
        super().__init__(keras.backend, state)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        EpochCallback.on_epoch_end(self, epoch, logs)
        super().on_epoch_end(epoch, logs)


for _name in (name for name in dir(_horovod) if not name.startswith("_")):
    globals().setdefault(_name, getattr(_horovod, _name))
