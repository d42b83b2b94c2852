"""What ranks tell each other outside the graph, before the first exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_accordion.comm import agreement


def require_equal(settings: Mapping[str, Any], name: str, process_set: hvd.ProcessSet) -> None:
    """Raises the same ValueError on all ranks, naming the first difference, if their settings differ."""
    if process_set.size() > 1:
        agreement.require_equal(settings, name, lambda data, its: gather(data, its, process_set))


def gather(data: bytes, name: str, process_set: hvd.ProcessSet) -> list[bytes]:
    """The bytes of every rank."""
    sizes = hvd.allgather(tf.constant([len(data)]), name=f"{name}.sizes", process_set=process_set).numpy()
    mine = tf.constant(np.frombuffer(data, np.uint8))
    joined = hvd.allgather(mine, name=name, process_set=process_set).numpy().tobytes()
    return [joined[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]


def largest(numbers: Sequence[int], name: str, process_set: hvd.ProcessSet) -> list[int]:
    """Of each number the largest that any rank has."""
    if process_set.size() == 1:
        return list(numbers)
    mine = tf.constant(numbers, tf.int32)
    return hvd.allreduce(mine, op=hvd.Max, name=name, process_set=process_set).numpy().tolist()


def from_rank_0(numbers: Sequence[float], name: str, process_set: hvd.ProcessSet) -> list[float]:
    """The numbers as the first rank of the process set has them; floats survive exactly."""
    mine = tf.constant(numbers, tf.float64)
    return hvd.broadcast(mine, root(process_set), name=name, process_set=process_set).numpy().tolist()


def root(process_set: hvd.ProcessSet) -> int:
    """Global rank of the process set's first member."""
    return process_set.ranks[0] if process_set.ranks else 0
