"""What ranks must have in common before they exchange anything, and the numbers that rank 0 decides for all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import horovod.torch as hvd
import torch


def require_equal(settings: Mapping[str, Any], name: str, process_set: hvd.ProcessSet) -> None:
    """Raises the same ValueError on all ranks, naming the first difference, if their settings differ.

    One allgather of 32 bytes where they agree.
    """
    if process_set.size() == 1:
        return
    lines = [f"{key} = {value}" for key, value in settings.items()]
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    digests = hvd.allgather(mine, name=f"{name}.settings", process_set=process_set).view(process_set.size(), -1)
    if all(torch.equal(digests[0], other) for other in digests[1:]):
        return
    everyone = [text.split("\n") for text in gather_texts("\n".join(lines), f"{name}.settings", process_set)]
    raise ValueError(f"DistributedOptimizer is configured differently on different ranks: {first_difference(everyone)}")


def gather_texts(text: str, name: str, process_set: hvd.ProcessSet) -> list[str]:
    """The text of every rank."""
    mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    sizes = hvd.allgather(torch.tensor([mine.numel()]), name=f"{name}.sizes", process_set=process_set).tolist()
    joined = bytes(hvd.allgather(mine, name=f"{name}.text", process_set=process_set).tolist())
    return [joined[sum(sizes[:i]) : sum(sizes[: i + 1])].decode() for i in range(len(sizes))]


def first_difference(everyone: Sequence[Sequence[str]]) -> str:
    reference = everyone[0]
    for rank, lines in enumerate(everyone[1:], 1):
        for i in range(max(len(reference), len(lines))):
            theirs, ours = (at[i] if i < len(at) else "nothing" for at in (lines, reference))
            if theirs != ours:
                return f"rank 0 has {ours!r}, rank {rank} has {theirs!r}"
    return "their texts are equal but not their digests"


def from_rank_0(numbers: Sequence[float], name: str, process_set: hvd.ProcessSet) -> list[float]:
    """The numbers as the first rank of the process set has them; floats survive exactly."""
    values = torch.tensor(numbers, dtype=torch.float64)
    if process_set.size() > 1:
        values = hvd.broadcast(values, root_rank=root(process_set), name=name, process_set=process_set)
    return values.tolist()


def root(process_set: hvd.ProcessSet) -> int:
    """Global rank of the process set's first member."""
    return process_set.ranks[0] if process_set.ranks else 0
