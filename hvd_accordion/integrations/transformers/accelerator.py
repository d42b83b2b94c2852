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

# dtypes that Horovod cannot send, and dtypes of equal size that it can
SENT_AS = {torch.bool: torch.uint8, torch.bfloat16: torch.int16}


def gather(x: torch.Tensor) -> torch.Tensor:
    """Concatenates the rows of all ranks, which may differ in number. Scalars give a vector with one entry per rank."""
    x = x.detach().contiguous()
    x = x[None] if x.ndim == 0 else x
    rows = hvd.allgather(x.view(SENT_AS.get(x.dtype, x.dtype)), name="transformers.gather")
    return rows.view(x.dtype)


def broadcast(tensors: Mapping[str, torch.Tensor]) -> None:
    """Overwrites the tensors with the values of rank 0."""
    hvd.broadcast_parameters({name: x.view(SENT_AS.get(x.dtype, x.dtype)) for name, x in tensors.items()}, root_rank=0)


def pad_to_longest(x: torch.Tensor, dim: int, value: float, first: bool) -> torch.Tensor:
    """Pads `x` in dimension `dim` to the largest length among the ranks."""
    if dim >= x.ndim:
        return x
    length = int(hvd.allreduce(torch.tensor(x.shape[dim]), op=hvd.Max, name="transformers.length"))
    if length == x.shape[dim]:
        return x
    shape = list(x.shape)
    shape[dim] = length
    result = x.new_full(shape, value)
    result.narrow(dim, length - x.shape[dim] if first else 0, x.shape[dim]).copy_(x)
    return result


class HorovodAccelerator(Accelerator):
    """Accelerate's Accelerator on Horovod's collectives. It adds no state, so a Trainer's Accelerator can become one."""

    def gather(self, tensor: Any) -> Any:
        return recursively_apply(gather, tensor, error_on_other_type=True)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Returns the rows of all ranks, without the padding of the last batch."""
        if not use_gather_object and only_tensors(input_data):
            return super().gather_for_metrics(input_data)
        gathered = [x for part in hvd.allgather_object(input_data, name="transformers.objects") for x in part]
        state = self.gradient_state
        return gathered[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else gathered

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        return recursively_apply(pad_to_longest, tensor, dim, pad_index, pad_first, error_on_other_type=True)

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
        data_loader: DataLoader[Any],
        device_placement: bool | None = None,
        slice_fn_for_dispatch: Callable[..., Any] | None = None,
    ) -> Any:
        """Returns a loader of this rank's share of the batches. Their order is equal on all ranks."""
        sampler = data_loader.sampler
        if getattr(sampler, "generator", sampler) is None and not isinstance(sampler, RandomSampler):
            # otherwise it draws from the global generator, which differs between ranks
            use_own_generator(sampler, self.dataloader_config.data_seed)
        loader = super().prepare_data_loader(data_loader, device_placement, slice_fn_for_dispatch)
        if isinstance(loader.batch_sampler, BatchSamplerShard) and not hasattr(loader.batch_sampler, "sampler"):
            loader.batch_sampler.sampler = sampler  # Accelerate calls its `set_epoch` when it skips batches
        return loader


def use_own_generator(sampler: Any, seed: int) -> None:
    """Gives a sampler its own generator, seeded by the epoch like Accelerate's seedable sampler."""
    sampler.generator = torch.Generator()

    def set_epoch(epoch: int) -> None:
        sampler.generator.manual_seed(seed + epoch)

    set_epoch(0)
    sampler.set_epoch = set_epoch


def only_tensors(data: Any) -> bool:
    """Returns whether all leaves of nested containers are tensors."""
    try:
        recursively_apply(lambda x: x, data, error_on_other_type=True)
    except TypeError:
        return False
    return True
