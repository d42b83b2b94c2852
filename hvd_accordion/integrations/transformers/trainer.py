"""The mix-in that runs a Hugging Face Trainer on Horovod ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import DistributedType
from accelerate.utils import find_batch_size, recursively_apply
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import hvd_accordion.torch as hvd
from hvd_accordion.integrations.transformers.accelerator import HorovodAccelerator, broadcast
from hvd_accordion.integrations.transformers.arguments import HorovodArgumentsMixin, check, place
from hvd_accordion.integrations.transformers.callback import HorovodCallback
from hvd_accordion.policy.assignment import Compression
from hvd_accordion.torch.exchange.agreement import require_equal
from hvd_accordion.torch.optim.error_compensated import ErrorCompensated
from hvd_accordion.torch.transport import connect
from hvd_accordion.training.reports import Logger

SET_BY_TRAINER = {"named_parameters", "backward_passes_per_step", "process_set", "steps_per_epoch", "batch_size"}
NOT_YET = {"local_steps", "buffers"}  # the Trainer evaluates and saves between exchanges

if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase  # the mix-in's methods call those of the class beside it
else:
    TrainerBase = object


class HorovodTrainerMixin(TrainerBase):
    """Mix-in that must precede a Trainer: `class MyTrainer(HorovodTrainerMixin, Trainer)`.

    Gradients are compressed and averaged over the ranks once per update, before clipping. Each rank trains on its share of
    the data. Loss and metrics are those of all ranks. Rank 0 logs and writes the Trainer's files; every rank writes its own
    compression state. All arguments of the Trainer keep their meaning.

    Args:
        compression: as in `hvd_accordion.torch.DistributedOptimizer`.
        logger: as there; called on rank 0.
        distributed: further arguments of `DistributedOptimizer`, such as `{"groups": 4}`. Not allowed are those that the
            Trainer sets: named_parameters, backward_passes_per_step, process_set, steps_per_epoch, batch_size.

    Raises:
        ValueError: on all ranks, if an argument is not supported or the ranks' arguments differ.
        TypeError: the mix-in does not precede the Trainer, or the optimizer needs a closure.
    """

    optimizer: Any
    current_flos: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(HorovodTrainerMixin):
            raise TypeError(f"{cls.__name__}: HorovodTrainerMixin must come before the Trainer among its bases")

    def __init__(
        self,
        *args: Any,
        compression: Compression = None,
        logger: Logger | None = None,
        distributed: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._options = dict(distributed or {}, compression=compression, logger=logger)
        if wrong := sorted(SET_BY_TRAINER & self._options.keys()):
            raise ValueError(f"distributed must not hold {', '.join(wrong)}: the Trainer sets them")
        if wrong := sorted(NOT_YET & self._options.keys()):
            raise ValueError(f"distributed must not hold {', '.join(wrong)}: they do not work under a Trainer yet")
        self.averaged = False  # whether the gradients of the next update are averaged
        self.checkpoint: str | None = None  # the checkpoint from which training resumes
        self._loss: torch.Tensor | None = None  # sum over the micro-batches of the current update
        super().__init__(*args, **options)
        self.add_callback(HorovodCallback(self))

    def create_accelerator_and_postprocess(self) -> None:
        args = self.args
        if (
            not isinstance(args, HorovodArgumentsMixin)
            and args.distributed_state.distributed_type is not DistributedType.NO
        ):
            raise ValueError(
                "args must be HorovodTrainingArguments here: Accelerate read the launcher's variables and "
                f"started torch.distributed ({args.distributed_state.distributed_type})"
            )
        args.__dict__["_setup_devices"] = place(args)  # again, because TrainingArguments created later have reset it
        check(args)
        if args.accelerator_config.dispatch_batches is None:
            args.accelerator_config.dispatch_batches = False
        super().create_accelerator_and_postprocess()
        self.accelerator.__class__ = HorovodAccelerator
        self.accelerator.dataloader_config.data_seed = args.seed if args.data_seed is None else args.data_seed
        gather = self.accelerator.gather_for_metrics
        self.gather_function = partial(gather, use_gather_object=args.eval_use_gather_object)

    def _check_place(self) -> None:
        """Checks Accelerate's state, which all trainers of a process share and TrainingArguments reset."""
        sizes = self.args.world_size, getattr(self.accelerator.state, "num_processes", None)
        if sizes != (hvd.size(), hvd.size()):
            raise RuntimeError(
                "TrainingArguments or an Accelerator created after this trainer have taken it out of Horovod's ranks; "
                "create them before it, or use HorovodTrainingArguments"
            )

    # the optimizer

    @property
    def distributed_optimizer(self) -> Any:
        """hvd_accordion's DistributedOptimizer inside the Trainer's wrapper."""
        optimizer = unwrapped(self.optimizer)
        if not hasattr(optimizer, "_hvd"):
            raise RuntimeError("create_optimizer must call super().create_optimizer(), which makes it distributed")
        return optimizer

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        super().create_optimizer(*args, **options)
        optimizer = unwrapped(self.optimizer)
        if isinstance(optimizer, ErrorCompensated):
            raise TypeError(f"optimizers: a Trainer can't call {type(optimizer).__name__}, which needs a closure")
        if not hasattr(optimizer, "_hvd"):
            self.optimizer = hvd.DistributedOptimizer(optimizer, self.model.named_parameters(), **self._options)
            rebind(self.lr_scheduler, optimizer, self.optimizer)
        elif self.optimizer is optimizer and any(x is not None for x in self._options.values()):
            raise ValueError(
                "compression, logger and distributed must be None with a DistributedOptimizer in optimizers"
            )
        elif optimizer._hvd.controller.batch.adapts:
            raise ValueError("optimizers: batch_size of DistributedOptimizer must be None under a Trainer")
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        not_optimized = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in known]
        if not_optimized and self.args.max_grad_norm > 0:
            raise ValueError(
                "optimizers must hold all trainable parameters if max_grad_norm > 0: the norm would include gradients that "
                f"are not averaged; freeze {', '.join(not_optimized)}"
            )
        return self.optimizer

    # training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        self._check_place()
        self.checkpoint = agreed_checkpoint(resume_from_checkpoint, self.args.output_dir)
        return super().train(self.checkpoint, *args, **options)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        values = super().set_initial_training_values(args, dataloader)
        self._iterable = isinstance(getattr(dataloader, "dataset", None), IterableDataset)
        if hvd.size() > 1:
            names = ("epochs", "updates of an epoch", "examples", "samples", "batch", "batches of an epoch", "steps")
            require_equal(dict(zip(names, values, strict=False)), "transformers.steps", connect(hvd.global_process_set))
        return values

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Returns the micro-batches of an update, equally many on every rank; none once a rank has no more data."""
        batches = list(islice(epoch_iterator, num_batches))
        if self._iterable:
            counts = hvd.allreduce(torch.tensor(len(batches)), op=hvd.Min, name="transformers.batches")
            batches = batches if int(counts) == num_batches else []
        self.averaged, self._loss = False, None
        if batches:
            self.distributed_optimizer.set_backward_passes_per_step(len(batches))
        return super().get_batch_samples(iter(batches), len(batches), device)

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """Runs forward and backward, and averages the gradients after the last micro-batch of an update.

        Returns:
            After the last micro-batch, the loss of the update over its micro-batches and all ranks; otherwise 0.
        """
        loss = super().training_step(*args, **options).float()
        self._loss = loss if self._loss is None else self._loss + loss
        if not self.accelerator.sync_gradients:
            return torch.zeros_like(loss)
        mean = hvd.allreduce_async(self._loss, name="transformers.loss")  # fused with the gradients
        self.distributed_optimizer.synchronize()
        self.averaged = True
        return hvd.synchronize(mean)

    def store_flos(self) -> None:
        total = hvd.allreduce(torch.tensor(float(self.current_flos)).double(), op=hvd.Sum, name="transformers.flos")
        self.current_flos = total.item()
        super().store_flos()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if _internal_call:  # called on all ranks, which read the files next
            hvd.barrier()

    def hyperparameter_search(self, *_: Any, **__: Any) -> Any:
        raise ValueError("hyperparameter_search is not supported under Horovod: only rank 0 would run a trial")

    # evaluation

    def evaluation_loop(self, dataloader: Any, *args: Any, **options: Any) -> Any:
        self._check_place()
        if isinstance(getattr(dataloader, "dataset", None), IterableDataset) and hvd.size() > 1:
            raise ValueError(
                "eval_dataset must have a length under Horovod, got an IterableDataset; pass list(dataset)"
            )
        broadcast(dict(self.model.named_buffers()))  # running statistics, for example, differ between ranks
        return super().evaluation_loop(dataloader, *args, **options)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Like the Trainer's, but the loss is the mean over the examples of all ranks, without padding."""
        rows = find_batch_size(inputs)
        state = self.accelerator.gradient_state
        remainder = state.remainder if state.end_of_dataloader and state.remainder > 0 else None
        valid = rows if remainder is None else min(rows, max(0, remainder - hvd.rank() * rows))
        with rank_mean(self.args):
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            if loss is None:
                return loss, logits, labels
            if 0 < valid < rows:  # the rest of the last batch is padding
                inputs = recursively_apply(lambda x: x[:valid] if x.ndim and len(x) == rows else x, inputs)
                loss = super().prediction_step(model, inputs, True, ignore_keys)[0]
            items = self._get_num_items_in_batch([inputs], loss.device) if valid else 0
        weight = torch.as_tensor(valid if items is None else items, device=loss.device).float()
        parts = torch.stack([torch.where(weight > 0, loss.float() * weight, 0.0), weight])
        total = hvd.allreduce(parts, op=hvd.Sum, name="transformers.eval_loss")
        return total[0] / total[1], logits, labels


class HorovodTrainer(HorovodTrainerMixin, Trainer):
    """Hugging Face's Trainer on Horovod ranks."""


def unwrapped(optimizer: Any) -> Any:
    """Returns the optimizer inside Accelerate's wrappers."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def rebind(scheduler: Any, old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Binds a scheduler, and those that it combines, to the new optimizer."""
    for part in getattr(scheduler, "_schedulers", ()):
        rebind(part, old, new)
    if getattr(scheduler, "optimizer", None) is old:
        scheduler.optimizer = new
        if getattr(scheduler, "_step_count", None) == 1:
            scheduler._step_count = 2  # a count of 1 would warn that optimizer.step() was replaced


def agreed_checkpoint(requested: str | bool | None, folder: str) -> str | None:
    """Returns the checkpoint that rank 0 resumes from.

    Raises:
        ValueError: on all ranks, if a rank does not find it.
    """
    if requested is True:
        last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        requested = last or os.path.join(folder, "checkpoint-*")
    path = hvd.broadcast_object(requested or None, name="transformers.checkpoint")
    if path is None:
        return None
    found = hvd.allgather_object(os.path.isdir(path), name="transformers.found")
    missing = [str(rank) for rank, exists in enumerate(found) if not exists]
    if missing:
        raise ValueError(f"resume_from_checkpoint must exist on every rank; rank {', '.join(missing)}: no {path}")
    return path


@contextmanager
def rank_mean(args: TrainingArguments) -> Iterator[None]:
    """Within this context a loss is the mean over this rank's items."""
    previous, args.average_tokens_across_devices = args.average_tokens_across_devices, False
    try:
        yield
    finally:
        args.average_tokens_across_devices = previous
