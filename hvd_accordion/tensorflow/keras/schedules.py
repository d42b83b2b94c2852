"""Horovod's learning-rate schedules as Keras callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvd_accordion.tensorflow.keras.epochs import EpochCallback
from hvd_accordion.tensorflow.keras.learning_rate import innermost, learning_rate_of
from hvd_accordion.tensorflow.transport import world_rank, world_size


class LearningRateScheduleCallback(EpochCallback):
    """Sets the learning rate to `initial_lr * multiplier(epoch)` from `start_epoch` up to, not including, `end_epoch`.

    Args:
        multiplier: a function of the epoch, or a constant c, which stands for c^(epoch - start_epoch).
        staircase: change it at the beginning of an epoch; otherwise of every batch, and the epoch is a fraction.
        momentum_correction: scale the optimizer's velocity with the rate (Goyal et al. 2017, arXiv 1706.02677, 3.1).
        steps_per_epoch: needed if `staircase` is False and Keras does not give it.
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
            assert self.steps_per_epoch is not None  # since on_train_begin
            self._adjust(self.current_epoch + batch / self.steps_per_epoch)
        elif batch == 0:
            self._adjust(self.current_epoch)

    def _adjust(self, epoch: float) -> None:
        optimizer = innermost(self.model.optimizer)
        old, new = learning_rate_of(optimizer), self.initial_lr * self.multiplier(epoch)
        optimizer.learning_rate = new
        if self.momentum_correction and old > 0 and getattr(optimizer, "momentum", None):
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
            assert self.steps_per_epoch is not None
            epoch += 1.0 / self.steps_per_epoch  # round numbers at the ends of epochs
            return (epoch * (world_size() - 1) / warmup_epochs + 1) / world_size()

        super().__init__(initial_lr, multiplier, 0, warmup_epochs, False, momentum_correction, steps_per_epoch)
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        if epoch + 1 == self.end_epoch and self.verbose > 0 and world_rank() == 0:
            rate = learning_rate_of(self.model.optimizer)
            print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {rate:g}.")
