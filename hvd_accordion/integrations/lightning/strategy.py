"""HorovodStrategy: runs Lightning's Trainer on Horovod ranks."""

from __future__ import annotations

import os
from typing import Any

import torch

import hvd_accordion.torch as hvd
from hvd_accordion.integrations.lightning import checkpoints, ranks
from hvd_accordion.integrations.lightning.callback import GradientExchange, HorovodCallback
from hvd_accordion.integrations.lightning.framework import ClusterEnvironment, ParallelStrategy


class HorovodEnvironment(ClusterEnvironment):
    """Reports Horovod's ranks to Lightning. Processes are started before Lightning."""

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
        """Does nothing: Horovod sets it."""

    def set_global_rank(self, rank: int) -> None:
        """Does nothing: Horovod sets it."""


class HorovodStrategy(ParallelStrategy):
    """Trains on one device per rank and exchanges compressed gradients by Horovod.

    It does what Lightning does with DDP. Each rank gets its share of the data. `self.log(..., sync_dist=True)` and
    torchmetrics are averaged. Averaged gradients are clipped. Gradients are exchanged after the last of
    `accumulate_grad_batches`. Early stopping and checkpoints are decided equally on all ranks, and rank 0 writes. Learning
    rates are not scaled.

    Beside rank 0's checkpoint, each other rank saves its own residuals (`NAME.ckpt.rank1`, ...). With the same number of
    ranks, `ckpt_path=` resumes bit for bit.

    Args:
        compression: as in `hvd_accordion.torch.DistributedOptimizer`, for each optimizer of `configure_optimizers` that is
            not a DistributedOptimizer yet.
        accelerator: as in Lightning's strategies.
        checkpoint_io: as in Lightning's strategies.
        precision_plugin: as in Lightning's strategies.
        options: further arguments of `DistributedOptimizer`, except those derived from the module and the Trainer:
            `named_parameters`, `backward_passes_per_step`, `steps_per_epoch` and `process_set`.

    Raises:
        TypeError: an option is unknown.
        ValueError: on all ranks, for `devices` that do not fit the ranks, `sync_batchnorm=True`, a GradScaler with manual
            optimization, `batch_size` with either or with `accumulate_grad_batches`, or ranks with different numbers of
            batches.
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

    # devices

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._parallel_devices = [device_of(devices)] if devices else None

    @property
    def root_device(self) -> torch.device:
        assert self._parallel_devices is not None  # the Trainer sets them first
        return self._parallel_devices[0]

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
            raise ValueError("HorovodStrategy includes HorovodCallback; give the Trainer one of the two")
        if self._exchange not in trainer.callbacks:
            trainer.callbacks.insert(0, self._exchange)  # first, so that other callbacks see averaged gradients
        super().setup(trainer)
        ranks.broadcast_module(self.lightning_module)
        for module in self.lightning_module.modules():
            if hasattr(module, "dist_sync_fn") and module.dist_sync_fn is None:  # a metric of torchmetrics
                module.dist_sync_fn, module.distributed_available_fn = ranks.gather, several_ranks

    # collectives

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        ranks.refuse_group(group)
        return ranks.reduce(tensor, reduce_op) if isinstance(tensor, torch.Tensor) else tensor

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        ranks.refuse_group(group)
        return ranks.stack(tensor, sync_grads)

    def barrier(self, name: str | None = None) -> None:
        if hvd.size() > 1:
            hvd.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return ranks.broadcast_object(obj, src)

    # checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        filepath = self.broadcast(filepath)  # a metric in the name may differ between ranks
        own = checkpoints.split_own_state(checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if own is not None and not self.is_global_zero:
            file = checkpoints.file_of(filepath, self.global_rank)
            self.checkpoint_io.save_checkpoint(own, file, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        absent = [i for i, exists in enumerate(ranks.gather_object(found(checkpoint_path), "found")) if not exists]
        if absent:
            raise FileNotFoundError(
                f"{checkpoint_path} does not exist on ranks {', '.join(map(str, absent))}: all ranks must see the file"
            )
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if self.lightning_module.trainer.training:
            checkpoints.restore_own_state(
                checkpoint,
                checkpoint_path,
                lambda file: self.checkpoint_io.load_checkpoint(file, weights_only=weights_only),
            )
        return checkpoint

    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            for file in checkpoints.files_of_all_ranks(filepath):
                self.checkpoint_io.remove_checkpoint(file)


def device_of(devices: list[torch.device]) -> torch.device:
    """Returns this rank's device among those of the Trainer.

    Raises:
        ValueError: neither one device nor as many as ranks on the host.
    """
    if len(devices) == 1:
        is_default = devices[0].type == "cuda" and devices[0].index in (None, 0)
        shared = (
            is_default and 1 < hvd.local_size() <= torch.cuda.device_count()
        )  # false if each rank sees only its own device
        return torch.device("cuda", hvd.local_rank()) if shared else devices[0]
    if len(devices) < hvd.local_size() or (devices[0].type == "cpu" and len(devices) != hvd.local_size()):
        raise ValueError(
            f"devices={len(devices)}, but Horovod runs {hvd.local_size()} ranks on this host; use devices=1"
        )
    return devices[hvd.local_rank()]


def found(path: Any) -> bool:
    """Returns whether this rank sees the file. Remote addresses are checked by Lightning."""
    return "://" in str(path) or os.path.exists(path)


def several_ranks() -> bool:
    """Returns whether there is more than one rank."""
    return hvd.size() > 1
