"""Exchanges gradients in the events of Lightning's training loop."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch

import hvd_accordion.torch as hvd
from hvd_accordion.integrations.lightning import ranks
from hvd_accordion.integrations.lightning.framework import Callback, LightningOptimizer, rank_zero_only
from hvd_accordion.integrations.lightning.optimizers import check_options, distribute

WAIT = 1 << 30  # backward passes per step: gradients are exchanged only by an explicit synchronize()


class GradientExchange(Callback):
    """The part shared by strategy and callback: all events from the start of training to its end.

    Args:
        compression: as in `hvd_accordion.torch.DistributedOptimizer`, for each optimizer of `configure_optimizers` that is
            not a DistributedOptimizer yet.
        options: further arguments of `DistributedOptimizer`, except those derived from the module and the Trainer:
            `named_parameters`, `backward_passes_per_step`, `steps_per_epoch` and `process_set`.
    """

    def __init__(self, compression: Any, options: Mapping[str, Any]) -> None:
        check_options(options)
        ranks.start()
        rank_zero_only.rank = hvd.rank()  # loggers write on rank 0
        self.compression, self.options = compression, options
        self._distributed: list[torch.optim.Optimizer] = []  # references keep the results of `distribute` alive
        self._stepping = ExitStack()
        self._exchanged: set[int] = set()  # ids of optimizers whose gradients are averaged

    # training as a whole

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        refuse_scaler(trainer, pl_module)
        steps = None
        if (
            self.options.get("batch_size") is not None
        ):  # needs the epoch's length, because its last batch may be smaller
            refuse_accumulation(trainer, pl_module)
            steps = steps_of_epoch(trainer)
        ranks.broadcast_module(pl_module)
        self._distributed = [
            distribute(optimizer, pl_module, self.compression, self.options, steps)
            for optimizer in trainer.optimizers
            if optimizer.param_groups and not hasattr(optimizer, "_hvd")
        ]
        trainer.optimizers = trainer.optimizers  # Lightning's wrappers copy the class of what they wrap
        if not pl_module.automatic_optimization:
            self._exchange_before_clipping(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in distributed(trainer):
            self._set_passes(optimizer, 1 if pl_module.automatic_optimization else WAIT)
            self._stepping.enter_context(optimizer.skip_synchronize())  # this callback exchanges the gradients

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._agree(trainer, float(trainer.num_training_batches))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in distributed(trainer):
            optimizer.end_epoch()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._agree(trainer, 0.0)
        self._end(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end(trainer, pl_module)

    def _end(self, trainer: Any, pl_module: Any) -> None:
        self._stepping.close()
        for optimizer in distributed(trainer):
            optimizer.release()  # the module may be trained again while this trainer still exists
        vars(pl_module).pop("clip_gradients", None)

    def _agree(self, trainer: Any, batches: float) -> None:
        """Checks that all ranks have the same number of remaining batches, 0 if a rank stops.

        Raises:
            ValueError: on all ranks, if they differ.
        """
        counts = ranks.gather_object(batches, "batches")
        if len(set(counts)) > 1:
            raise ValueError(
                f"in epoch {trainer.current_epoch} the ranks have {', '.join(f'{x:g}' for x in counts)} remaining batches "
                "(0: stops training); all must have the same number and stop together: check the sampler, "
                "limit_train_batches and early stopping"
            )

    # a step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._exchanged.clear()
        if trainer.num_training_batches == float("inf"):  # the length of the epoch is unknown
            self._agree(trainer, 1.0 if trainer.is_last_batch else 2.0)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        overlap = self._is_last(trainer, pl_module) and scaler_of(trainer) is None
        self._exchanged.clear()
        for optimizer in distributed(trainer):
            self._set_passes(optimizer, 1 if overlap else WAIT)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self._is_last(trainer, pl_module):
            for optimizer in distributed(trainer):
                self._exchange(optimizer, scaler_of(trainer))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        if hasattr(optimizer, "_hvd"):
            self._exchange(optimizer)
            if not pl_module.automatic_optimization:  # it may step again without another backward pass
                self._exchanged.discard(id(optimizer))

    def _exchange(self, optimizer: Any, scaler: torch.amp.GradScaler | None = None) -> None:
        if id(optimizer) not in self._exchanged:
            self._exchanged.add(id(optimizer))
            if scaler is None:
                optimizer.synchronize()
            else:
                synchronize_unscaled(optimizer, scaler)

    def _is_last(self, trainer: Any, pl_module: Any) -> bool:
        """Returns whether the current backward pass is the last before the optimizer steps."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        ready = progress.current.ready
        return pl_module.automatic_optimization and (
            ready % trainer.accumulate_grad_batches == 0
            or ready == trainer.num_training_batches
            or progress.is_last_batch
        )

    def _set_passes(self, optimizer: Any, passes: int) -> None:
        if optimizer.backward_passes_per_step != passes:
            optimizer.set_backward_passes_per_step(passes)

    def _exchange_before_clipping(self, pl_module: Any) -> None:
        """Wraps `clip_gradients`: in manual optimization it is called before the step, and must see averaged gradients."""
        clip = pl_module.clip_gradients

        def clip_gradients(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
            if hasattr(inner, "_hvd"):
                self._exchange(inner)
            clip(optimizer, *args, **kwargs)

        vars(pl_module)["clip_gradients"] = clip_gradients


def distributed(trainer: Any) -> list[Any]:
    """Returns the trainer's DistributedOptimizers."""
    return [optimizer for optimizer in trainer.optimizers if hasattr(optimizer, "_hvd")]


def scaler_of(trainer: Any) -> Any:
    """Returns the trainer's GradScaler or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def refuse_scaler(trainer: Any, pl_module: Any) -> None:
    """Raises ValueError for a GradScaler with manual optimization."""
    if scaler_of(trainer) is not None and not pl_module.automatic_optimization:
        raise ValueError(
            f"precision={trainer.precision!r} does not work with manual optimization: its GradScaler checks for overflow "
            "before gradients are exchanged, and ranks would differ; use 'bf16-mixed' or '32-true'"
        )


def refuse_accumulation(trainer: Any, pl_module: Any) -> None:
    """Raises ValueError for settings that do not work with AccordionBatchSize, which accumulates the Trainer's steps."""
    if not pl_module.automatic_optimization:
        raise ValueError("batch_size does not work with manual optimization; use automatic optimization")
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"accumulate_grad_batches must be 1 with batch_size, which accumulates itself, got "
            f"{trainer.accumulate_grad_batches}"
        )
    if scaler_of(trainer) is not None:
        raise ValueError(
            f"batch_size does not work with precision={trainer.precision!r}; use 'bf16-mixed' or '32-true'"
        )


def steps_of_epoch(trainer: Any) -> int | None:
    """Returns the steps of an epoch, None if unknown."""
    if trainer.estimated_stepping_batches and trainer.num_training_batches != float(
        "inf"
    ):  # estimated_stepping_batches loads the data
        return int(trainer.num_training_batches)
    return None


@torch.no_grad()
def synchronize_unscaled(optimizer: Any, scaler: torch.amp.GradScaler) -> None:
    """Exchanges gradients without their loss scale, because residuals are used at later scales too."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    scale = scaler.scale(torch.ones((), device=params[0].device))
    for p in params:
        if p.grad is not None:
            p.grad.div_(scale)
    optimizer.synchronize()
    for p in params:
        if p.grad is not None:
            p.grad.mul_(scale)


class HorovodCallback(GradientExchange):
    """Averages compressed gradients over the ranks, for a Trainer with one device on each rank.

    Before training, rank 0's weights are broadcast. Gradients are exchanged in the last backward pass of an update, before
    clipping. The script itself must divide the data, average metrics and agree on early stopping, which `HorovodStrategy`
    does automatically.

    Args:
        compression: as in `hvd_accordion.torch.DistributedOptimizer`, for each optimizer of `configure_optimizers` that is
            not a DistributedOptimizer yet.
        options: further arguments of `DistributedOptimizer`, except those derived from the module and the Trainer:
            `named_parameters`, `backward_passes_per_step`, `steps_per_epoch` and `process_set`.

    Raises:
        TypeError: an option is unknown.
        ValueError: when training starts, on all ranks, for a Trainer of several devices, a GradScaler with manual
            optimization, or checkpoint folders shared by several ranks.
    """

    def __init__(self, compression: Any = None, **options: Any) -> None:
        super().__init__(compression, options)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.world_size != 1:
            raise ValueError(
                f"HorovodCallback requires a Trainer of one device, got {type(trainer.strategy).__name__} with "
                f"{trainer.world_size}; use strategy=HorovodStrategy(...) alone, or devices=1"
            )
        folders = ranks.gather_object([getattr(x, "dirpath", None) for x in trainer.checkpoint_callbacks], "folders")
        used = [folder for its_folders in folders for folder in set(its_folders) - {None}]
        shared = sorted({str(folder) for folder in used if used.count(folder) > 1})
        if shared:
            raise ValueError(
                f"several ranks would write checkpoints to {shared[0]}: give each rank a folder of its own, as with "
                "ModelCheckpoint(dirpath=f'checkpoints/rank{hvd.rank()}'), or enable_checkpointing=False, or use "
                "HorovodStrategy"
            )
        super().on_fit_start(trainer, pl_module)
