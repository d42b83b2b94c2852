"""Numbers and settings that ranks compare outside of graphs, before the first exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_accordion.comm import agreement
from hvd_accordion.tensorflow.transport import HorovodTransport


def require_equal(settings: Mapping[str, Any], name: str, transport: HorovodTransport) -> None:
    """Raises the same ValueError on all ranks, naming the first difference, if their settings differ."""
    if transport.size > 1:
        agreement.require_equal(settings, name, lambda data, its: gather(data, its, transport))


def gather(data: bytes, name: str, transport: HorovodTransport) -> list[bytes]:
    """The bytes of every rank."""
    sizes = transport.allgather(tf.constant([len(data)]), f"{name}.sizes").numpy()
    joined = transport.allgather(tf.constant(np.frombuffer(data, np.uint8)), name).numpy().tobytes()
    return [joined[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]


def largest(numbers: Sequence[int], name: str, transport: HorovodTransport) -> list[int]:
    """Of each number the largest that any rank has."""
    if transport.size == 1:
        return list(numbers)
    (most,) = transport.allreduce([tf.constant(numbers, tf.int32)], name, "max")
    found: list[int] = most.numpy().tolist()
    return found


def from_rank_0(numbers: Sequence[float], name: str, transport: HorovodTransport) -> list[float]:
    """The numbers as the first rank has them; floats survive exactly."""
    found: list[float] = transport.broadcast(tf.constant(numbers, tf.float64), 0, name).numpy().tolist()
    return found
