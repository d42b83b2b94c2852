"""Horovod's named collectives under TensorFlow, eager or in a graph: the only module that calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as _horovod
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError
from horovod.tensorflow import Adasum, Average, Compression, ProcessSet, Sum, global_process_set
from horovod.tensorflow import DistributedOptimizer as HorovodOptimizer

from hvd_accordion.comm.transport import Reduction

__all__ = [
    "Adasum",
    "Average",
    "Compression",
    "HorovodInternalError",
    "HorovodOptimizer",
    "HorovodTransport",
    "ProcessSet",
    "Sum",
    "connect",
    "global_process_set",
]

OPS = {"sum": Sum, "max": _horovod.Max}
# what Horovod can't broadcast, as what it can
CARRIED_AS = {tf.bfloat16: tf.uint16, tf.uint32: tf.int32, tf.uint64: tf.int64}


class HorovodTransport:
    """The ranks of a process set and their named collectives; see `hvd_accordion.comm.transport.Transport`.

    A collective's handle is its result: eagerly a call returns when that is there, in a graph it is a node. Nothing
    handed over is written to. The number of ranks is that of now: in an elastic job it may change. A rank outside of the
    process set is alone: number 0 of 1.
    """

    def __init__(self, process_set: ProcessSet) -> None:
        self.process_set = process_set

    @property
    def included(self) -> bool:
        """Whether this rank is one of them."""
        return bool(self.process_set.included())

    @property
    def rank(self) -> int:
        return int(self.process_set.rank()) if self.included else 0

    @property
    def size(self) -> int:
        return int(self.process_set.size()) if self.included else 1

    @property
    def ranks(self) -> Sequence[int]:
        return self.process_set.ranks or range(self.process_set.size())

    def _where(self, name: str) -> dict[str, Any]:
        return {"name": name, "process_set": self.process_set, "ignore_name_scope": True}

    def allreduce(
        self,
        tensors: Sequence[tf.Tensor],
        name: str,
        op: Reduction = "sum",
        scales: tuple[float, float] = (1.0, 1.0),
    ) -> list[tf.Tensor]:
        how = {"op": OPS[op], "prescale_factor": scales[0], "postscale_factor": scales[1]}
        return list(_horovod.grouped_allreduce(list(tensors), **how, **self._where(name)))

    def allgather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return _horovod.allgather(tensor, **self._where(name))

    def alltoall(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return _horovod.alltoall(tensor, **self._where(name))

    def broadcast(self, tensor: tf.Tensor, root: int, name: str) -> tf.Tensor:
        return self.broadcast_from(tensor, self.ranks[root], name)

    def poll(self, handle: Any) -> bool:
        return True

    def wait(self, handle: Any) -> Any:
        return handle

    # what only Horovod has

    def broadcast_from(self, tensor: tf.Tensor, global_rank: int, name: str) -> tf.Tensor:
        """As `broadcast`, from a rank by its number among all ranks of the job; of any dtype of numbers."""
        carrier = CARRIED_AS.get(tensor.dtype)
        sent = tensor if carrier is None else tf.bitcast(tensor, carrier)
        received = _horovod.broadcast(sent, global_rank, **self._where(name))
        return received if carrier is None else tf.bitcast(received, tensor.dtype)

    def mean(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """Horovod's own averages over the ranks, as one message."""
        return list(_horovod.grouped_allreduce(list(tensors), op=Average, **self._where(name)))

    def broadcast_object(self, value: Any, global_rank: int, name: str, session: Any = None) -> Any:
        """What pickle can carry, as a rank of the job has it. Eagerly, or in a session of TensorFlow 1."""
        return _horovod.broadcast_object(value, global_rank, session, name, self.process_set)

    def plain(
        self, grads: Sequence[tf.Tensor], name: str, op: Any, compression: Any, predivide: float, grouped: bool
    ) -> list[tf.Tensor]:
        """Horovod's own allreduce of gradients under one of `hvd.Compression`; one message if `grouped`."""
        how = {"op": op, "compression": compression, **self._where(name)}
        how |= {"prescale_factor": 1 / predivide, "postscale_factor": predivide} if predivide != 1.0 else {}
        if grouped:
            return list(_horovod.grouped_allreduce(list(grads), **how))
        (grad,) = grads
        return [_horovod.allreduce(grad, **how)]


def connect(process_set: ProcessSet) -> HorovodTransport:
    """The transport among the ranks of a process set."""
    return HorovodTransport(process_set)


def is_initialized() -> bool:
    return bool(_horovod.is_initialized())


def world_size() -> int:
    return int(_horovod.size())


def world_rank() -> int:
    return int(_horovod.rank())


def join() -> Any:
    """Horovod's own: waits until all ranks have joined; returns the last of them."""
    return _horovod.join()


def sum_by_place(tensor: tf.Tensor) -> tf.Tensor:
    """The sum over all ranks, in a collective that Horovod names after its place in the graph."""
    return _horovod.allreduce(tensor, op=Sum)


def broadcast_in_place(variable: tf.Variable, global_rank: int, process_set: ProcessSet) -> None:
    """Gives the variable the value that it has on a rank of the job, without a copy."""
    _horovod.broadcast_variables([variable], global_rank, process_set, inplace=True)


def has_failed(error: tf.errors.OpError) -> bool:
    """Whether the error is that of a collective that has failed, as it does where another rank is gone."""
    kinds = (
        tf.errors.UnknownError,
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.FailedPreconditionError,
    )
    return isinstance(error, kinds) and "horovod" in error.message.lower()
