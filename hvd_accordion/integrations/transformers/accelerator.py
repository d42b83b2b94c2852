"""Accelerate's Accelerator with Horovod's collectives in place of torch.distributed's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import recursively_apply
from torch.utils.data import DataLoader, RandomSampler

import hvd_accordion.torch as hvd

# what travels as another type of the same size
TRAVELS_AS = {torch.bool: torch.uint8, torch.bfloat16: torch.int16}


def gather(x: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, which may differ in number; of a number, a vector with one entry per rank."""
    x = x.detach().contiguous()
    x = x[None] if x.ndim == 0 else x
    joined = hvd.allgather(x.view(TRAVELS_AS.get(x.dtype, x.dtype)), name="transformers.gather")
    return joined.view(x.dtype)


def broadcast(tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives them, in place, the values of rank 0."""
    hvd.broadcast_parameters(
        {name: x.view(TRAVELS_AS.get(x.dtype, x.dtype)) for name, x in tensors.items()}, root_rank=0
    )


def padded(x: torch.Tensor, dim: int, value: float, first: bool) -> torch.Tensor:
    """`x` made as long in this dimension as the longest of any rank's."""
    if dim >= x.ndim:
        return x
    length = int(hvd.allreduce(torch.tensor(x.shape[dim]), op=hvd.Max, name="transformers.length"))
    if length == x.shape[dim]:
        return x
    shape = list(x.shape)
    shape[dim] = length
    longer = x.new_full(shape, value)
    longer.narrow(dim, length - x.shape[dim] if first else 0, x.shape[dim]).copy_(x)
    return longer


class HorovodAccelerator(Accelerator):
    """Has no state of its own, so that the Accelerator that a Trainer made can become one."""

    def gather(self, tensor: Any) -> Any:
        return recursively_apply(gather, tensor, error_on_other_type=True)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """All ranks' rows, without those that the last batch was filled up with."""
        if not use_gather_object and only_tensors(input_data):
            return super().gather_for_metrics(input_data)
        everyone = [x for part in hvd.allgather_object(input_data, name="transformers.objects") for x in part]
        state = self.gradient_state
        return everyone[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else everyone

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        return recursively_apply(padded, tensor, dim, pad_index, pad_first, error_on_other_type=True)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        if reduction == "none":
            return tensor
        op = {"sum": hvd.Sum, "mean": hvd.Average, "max": hvd.Max}[reduction]
        return recursively_apply(
            lambda x: hvd.allreduce(x, op=op, name="transformers.reduce") * scale, tensor, error_on_other_type=True
        )

    def wait_for_everyone(self) -> None:
        hvd.barrier()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        with self._first(self.is_main_process):
            yield

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        with self._first(self.is_local_main_process):
            yield

    @contextmanager
    def _first(self, first: bool) -> Iterator[None]:
        if not first:
            hvd.barrier()
        yield
        if first:
            hvd.barrier()

    def prepare_data_loader(
        self,
        data_loader: DataLoader,
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Callable[..., Any] | None = None,
    ) -> Any:
        """The rank's share of a loader's batches, from an order that is the same on all ranks."""
        sampler = data_loader.sampler
        if getattr(sampler, "generator", sampler) is None and not isinstance(sampler, RandomSampler):
            seeded(sampler, self.dataloader_config.data_seed)  # else it draws from the global generator, a rank's own
        loader = super().prepare_data_loader(data_loader, device_placement, slice_fn_for_dispatch)
        if isinstance(loader.batch_sampler, BatchSamplerShard) and not hasattr(loader.batch_sampler, "sampler"):
            loader.batch_sampler.sampler = sampler  # where Accelerate looks for `set_epoch` when it skips batches
        return loader


def seeded(sampler: Any, seed: int) -> None:
    """Lets a sampler draw from a generator of its own, by the epoch, as Accelerate's seedable one does."""
    sampler.generator = torch.Generator()

    def set_epoch(epoch: int) -> None:
        sampler.generator.manual_seed(seed + epoch)

    set_epoch(0)
    sampler.set_epoch = set_epoch


def only_tensors(data: Any) -> bool:
    try:
        recursively_apply(lambda x: x, data, error_on_other_type=True)
    except TypeError:
        return False
    return True
