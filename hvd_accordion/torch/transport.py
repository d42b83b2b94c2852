"""Horovod's named collectives under torch: the only module that calls them. Others hold a `Transport`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch import Average, ProcessSet, Sum, global_process_set

from hvd_accordion.comm.transport import Reduction

__all__ = ["Average", "HorovodTransport", "ProcessSet", "Sum", "connect", "global_process_set"]

OPS = {"sum": hvd.Sum, "max": hvd.Max}


@dataclass(frozen=True)
class Started:
    """A collective under way: Horovod's handle, and what turns its output into the result."""

    handle: int
    result: Callable[[Any], Any] = lambda output: output


class HorovodTransport:
    """See `Transport`. A rank outside of the process set is alone: number 0 of 1.

    Results of allreduce and broadcast are in the memory of the tensors handed over.
    """

    def __init__(self, process_set: hvd.ProcessSet) -> None:
        self.process_set, self.included = process_set, process_set.included()
        self.rank: int = process_set.rank() if self.included else 0
        self.size: int = process_set.size() if self.included else 1
        self.ranks: Sequence[int] = process_set.ranks or range(process_set.size())

    def allreduce(
        self,
        tensors: Sequence[torch.Tensor],
        name: str,
        op: Reduction = "sum",
        scales: tuple[float, float] = (1.0, 1.0),
    ) -> Started:
        before, after = scales
        where = {"name": name, "op": OPS[op], "process_set": self.process_set}
        scaled = {"prescale_factor": before, "postscale_factor": after}
        return Started(hvd.grouped_allreduce_async_(list(tensors), **where, **scaled), list)

    def allgather(self, tensor: torch.Tensor, name: str) -> Started:
        return Started(hvd.allgather_async(tensor, name=name, process_set=self.process_set))

    def alltoall(self, tensor: torch.Tensor, name: str) -> Started:
        # Horovod gives the received parts and their sizes
        return Started(hvd.alltoall_async(tensor, name=name, process_set=self.process_set), lambda output: output[0])

    def broadcast(self, tensor: torch.Tensor, root: int, name: str) -> Started:
        return Started(hvd.broadcast_async_(tensor, self.ranks[root], name=name, process_set=self.process_set))

    def poll(self, handle: Started) -> bool:
        return hvd.poll(handle.handle)

    def wait(self, handle: Started) -> Any:
        return handle.result(hvd.synchronize(handle.handle))


def connect(process_set: hvd.ProcessSet) -> HorovodTransport:
    """The transport among the ranks of a process set, as they are now."""
    return HorovodTransport(process_set)
