"""What ranks must have in common, and what one of them decides for all, over a transport under torch."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import cloudpickle
import torch

from hvd_accordion.comm import agreement
from hvd_accordion.comm.transport import Transport


def require_equal(settings: Mapping[str, Any], name: str, transport: Transport) -> None:
    """Raises the same ValueError on all ranks, naming the first difference, if their settings differ."""
    if transport.size > 1:
        agreement.require_equal(settings, name, lambda data, its: gather(data, its, transport))


def gather(data: bytes, name: str, transport: Transport) -> list[bytes]:
    """The bytes of every rank."""
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    sizes = transport.wait(transport.allgather(torch.tensor([len(data)]), f"{name}.sizes")).tolist()
    joined = bytes(transport.wait(transport.allgather(mine, name)).tolist())
    return [joined[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]


def from_rank_0(numbers: Sequence[float], name: str, transport: Transport, source: int = 0) -> list[float]:
    """The numbers as the first of the ranks has them, or another; floats survive exactly."""
    values = torch.tensor(numbers, dtype=torch.float64)
    if transport.size > 1:
        values = transport.wait(transport.broadcast(values, source, name))
    return values.tolist()


def any_rank(flag: bool, name: str, transport: Transport) -> bool:
    """Whether it is true on any rank."""
    if transport.size == 1:
        return flag
    (largest,) = transport.wait(transport.allreduce([torch.tensor([int(flag)])], name, "max"))
    return bool(largest)


def broadcast_object(thing: Any, root: int, name: str, transport: Transport) -> Any:
    """What the rank of number `root` holds: anything that can be pickled. The root gets its own back."""
    data = cloudpickle.dumps(thing) if transport.rank == root else b""
    (size,) = from_rank_0([len(data)], f"{name}.size", transport, root)
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(size), dtype=torch.uint8)
    buffer = transport.wait(transport.broadcast(buffer, root, f"{name}.data"))
    return thing if transport.rank == root else pickle.loads(buffer.numpy().tobytes())
