"""Connects a Trainer's events to the compression: start, steps, epochs, checkpoints and end of training."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import hvd_accordion.torch as hvd
from hvd_accordion.integrations.transformers.accelerator import broadcast
from hvd_accordion.torch.reports import STATE

log = logging.getLogger("hvd_accordion")


class HorovodCallback(TrainerCallback):
    """The callback that `HorovodTrainerMixin` adds.

    Args:
        trainer: the trainer whose optimizer it serves.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.epoch_ended = False
        self._stepping = ExitStack()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        optimizer, model = self.trainer.distributed_optimizer, self.trainer.model
        if self.trainer.checkpoint is not None:
            restore(optimizer, self.trainer.checkpoint)
        # Horovod creates missing optimizer state by a step, which would apply weight decay
        if hvd.broadcast_object(bool(optimizer.state), name="transformers.has_state"):
            hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        broadcast(model.state_dict())
        if hvd.rank() > 0:  # dropout differs between ranks; the data order depends on `data_seed`
            set_seed(args.seed + hvd.rank())

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.epoch_ended = False

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if not self.trainer.averaged:
            raise RuntimeError("training_step must call super().training_step(), which averages the gradients")
        self._stepping.enter_context(self.trainer.distributed_optimizer.skip_synchronize())

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._stepping.close()
        self.trainer.averaged = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.epoch is not None and state.epoch == int(state.epoch):  # before this step's checkpoint is saved
            self._end_epoch()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._end_epoch()

    def _end_epoch(self) -> None:
        if not self.epoch_ended:
            self.epoch_ended = True
            self.trainer.distributed_optimizer.end_epoch()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if not args.save_only_model and not args.should_save:
            save(self.trainer.distributed_optimizer, folder)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.load_best_model_at_end:  # the best model's files may exist on rank 0's host only
            broadcast(self.trainer.model.state_dict())


def file_of(folder: str) -> str:
    """Returns the file of this rank's state. Ranks that write the Trainer's files have it in optimizer.pt already."""
    return os.path.join(folder, f"hvd_accordion_{hvd.rank()}.pt")


def save(optimizer: Any, folder: str) -> None:
    """Saves this rank's compression state, such as residuals."""
    ours = optimizer.state_dict().get(STATE)
    if ours is None:
        return
    os.makedirs(folder, exist_ok=True)
    unfinished = file_of(folder) + ".part"
    torch.save(ours, unfinished)
    os.replace(unfinished, file_of(folder))


def restore(optimizer: Any, folder: str) -> None:
    """Restores this rank's compression state. `optimizer` must have loaded optimizer.pt."""
    if os.path.isfile(file_of(folder)):
        ours = torch.load(file_of(folder), map_location="cpu", weights_only=True)
        optimizer.load_state_dict({**optimizer.state_dict(), STATE: ours})
    elif STATE in optimizer.state_dict() and hvd.rank() > 0:
        log.warning("%s is missing: rank %d starts without residuals", file_of(folder), hvd.rank())
