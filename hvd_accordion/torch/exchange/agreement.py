"""What ranks must have in common, and the numbers that rank 0 decides for all, by Horovod's collectives under torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import horovod.torch as hvd
import torch

from hvd_accordion.comm import agreement


def require_equal(settings: Mapping[str, Any], name: str, process_set: hvd.ProcessSet) -> None:
    """Raises the same ValueError on all ranks, naming the first difference, if their settings differ."""
    if process_set.size() > 1:
        agreement.require_equal(settings, name, lambda data, its: gather(data, its, process_set))


def gather(data: bytes, name: str, process_set: hvd.ProcessSet) -> list[bytes]:
    """The bytes of every rank."""
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    sizes = hvd.allgather(torch.tensor([len(data)]), name=f"{name}.sizes", process_set=process_set).tolist()
    joined = bytes(hvd.allgather(mine, name=name, process_set=process_set).tolist())
    return [joined[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]


def from_rank_0(numbers: Sequence[float], name: str, process_set: hvd.ProcessSet, source: int = 0) -> list[float]:
    """The numbers as the first rank of the process set has them, or another; floats survive exactly."""
    values = torch.tensor(numbers, dtype=torch.float64)
    if process_set.size() > 1:
        values = hvd.broadcast(values, root_rank=root(process_set, source), name=name, process_set=process_set)
    return values.tolist()


def any_rank(flag: bool, name: str, process_set: hvd.ProcessSet) -> bool:
    """Whether it is true on any rank."""
    if process_set.size() == 1:
        return flag
    return bool(hvd.allreduce(torch.tensor([int(flag)]), op=hvd.Max, name=name, process_set=process_set))


def root(process_set: hvd.ProcessSet, member: int = 0) -> int:
    """Global rank of the process set's first member, or another."""
    return process_set.ranks[member] if process_set.ranks else member
