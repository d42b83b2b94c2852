"""HorovodStrategy: Lightning's Trainer on the ranks that Horovod started."""

from __future__ import annotations

import os
from typing import Any

import torch

import hvd_accordion.torch as hvd
from hvd_accordion.integrations.lightning import checkpoints, ranks
from hvd_accordion.integrations.lightning.callback import GradientExchange, HorovodCallback
from hvd_accordion.integrations.lightning.framework import ClusterEnvironment, ParallelStrategy


class HorovodEnvironment(ClusterEnvironment):
    """Ranks as Horovod counts them; whatever starts processes has done so before Lightning."""

    creates_processes_externally = True
    main_address, main_port = "127.0.0.1", 0  # of torch.distributed, which is not used

    @staticmethod
    def detect() -> bool:
        return hvd.is_initialized()

    def world_size(self) -> int:
        return hvd.size()

    def global_rank(self) -> int:
        return hvd.rank()

    def local_rank(self) -> int:
        return hvd.local_rank()

    def node_rank(self) -> int:
        return hvd.cross_rank()

    def set_world_size(self, size: int) -> None:
        """Horovod's stays."""

    def set_global_rank(self, rank: int) -> None:
        """Horovod's stays."""


class HorovodStrategy(ParallelStrategy):
    """Trains on one device a rank; gradients are exchanged by Horovod, compressed.

    What Lightning does under DDP it does here: it shares the data out, averages `self.log(..., sync_dist=True)` and
    torchmetrics, clips averaged gradients, exchanges nothing before the last of `accumulate_grad_batches`, decides early
    stopping and checkpoints alike on all ranks, and writes on rank 0. Learning rates stay as they are given. Beside a
    checkpoint of rank 0 each other rank keeps its own residuals (`NAME.ckpt.rank1`, ...), so that
    `ckpt_path=` goes on bit for bit on as many ranks.

    Args:
        compression: as of `hvd_accordion.torch.DistributedOptimizer`, for each optimizer that `configure_optimizers`
            returns; those that are DistributedOptimizers already stay as they are.
        options: its other arguments, but for `named_parameters`, `backward_passes_per_step`, `steps_per_epoch` and
            `process_set`, which follow from the module and the Trainer.

    Raises TypeError for an unknown option; ValueError on all ranks for `devices` that do not fit the ranks,
    `sync_batchnorm=True`, a GradScaler with manual optimization, `batch_size` with either or with
    `accumulate_grad_batches`, ranks with different numbers of batches.
    """

    strategy_name = "horovod"
    is_distributed = True

    def __init__(
        self,
        compression: Any = None,
        *,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        **options: Any,
    ) -> None:
        self._exchange = GradientExchange(compression, options)
        super().__init__(
            accelerator=accelerator,
            cluster_environment=HorovodEnvironment(),
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )

    # places

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._parallel_devices = [device_of(devices)] if devices else None

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[0]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": hvd.size(), "rank": hvd.rank()}

    def model_to_device(self) -> None:
        self.model.to(self.root_device)

    def setup(self, trainer: Any) -> None:
        if self._layer_sync is not None:
            raise ValueError(
                "sync_batchnorm=True needs torch.distributed; build the module with hvd_accordion.torch.SyncBatchNorm"
            )
        if any(isinstance(callback, HorovodCallback) for callback in trainer.callbacks):
            raise ValueError("HorovodStrategy does what HorovodCallback does; give the Trainer one of the two")
        if self._exchange not in trainer.callbacks:
            trainer.callbacks.insert(0, self._exchange)  # first: other callbacks see means, and save what it has done
        super().setup(trainer)
        ranks.broadcast_module(self.lightning_module)
        for module in self.lightning_module.modules():
            if hasattr(module, "dist_sync_fn") and module.dist_sync_fn is None:  # a metric of torchmetrics
                module.dist_sync_fn, module.distributed_available_fn = ranks.gathered, several_ranks

    # collectives

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        ranks.refuse_group(group)
        return ranks.reduced(tensor, reduce_op) if isinstance(tensor, torch.Tensor) else tensor

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        ranks.refuse_group(group)
        return ranks.stacked(tensor, sync_grads)

    def barrier(self, name: str | None = None) -> None:
        if hvd.size() > 1:
            hvd.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return ranks.from_rank(obj, src)

    # checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        filepath = self.broadcast(filepath)  # a metric in the name may differ between ranks
        own = checkpoints.parted(checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if own is not None and not self.is_global_zero:
            file = checkpoints.beside(filepath, self.global_rank)
            self.checkpoint_io.save_checkpoint(own, file, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        absent = [i for i, there in enumerate(ranks.everywhere(found(checkpoint_path), "found")) if not there]
        if absent:
            raise FileNotFoundError(
                f"{checkpoint_path} is not there on ranks {', '.join(map(str, absent))}: all ranks must see the file"
            )
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if self.lightning_module.trainer.training:
            checkpoints.joined(
                checkpoint,
                checkpoint_path,
                lambda file: self.checkpoint_io.load_checkpoint(file, weights_only=weights_only),
            )
        return checkpoint

    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            for file in checkpoints.of_all_ranks(filepath):
                self.checkpoint_io.remove_checkpoint(file)


def device_of(devices: list[torch.device]) -> torch.device:
    """This rank's device, of those that the Trainer found.

    Raises ValueError where there are fewer or more than ranks on the host; one is always right.
    """
    if len(devices) == 1:
        first = devices[0].type == "cuda" and devices[0].index in (None, 0)
        shared = first and 1 < hvd.local_size() <= torch.cuda.device_count()  # not where each rank sees only its own
        return torch.device("cuda", hvd.local_rank()) if shared else devices[0]
    if len(devices) < hvd.local_size() or (devices[0].type == "cpu" and len(devices) != hvd.local_size()):
        raise ValueError(
            f"devices={len(devices)}, but Horovod runs {hvd.local_size()} ranks on this host; use devices=1"
        )
    return devices[hvd.local_rank()]


def found(path: Any) -> bool:
    """Whether this rank sees the file; of an address, Lightning tells."""
    return "://" in str(path) or os.path.exists(path)


def several_ranks() -> bool:
    return hvd.size() > 1
