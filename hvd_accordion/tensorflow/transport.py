"""Horovod's collectives in TensorFlow, eager or traced into a graph: all that the exchange of gradients calls of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as _horovod
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError
from horovod.tensorflow import Adasum, Average, Compression, ProcessSet, Sum, global_process_set

__all__ = ["Adasum", "Average", "Compression", "HorovodInternalError", "ProcessSet", "Sum", "global_process_set"]


class Transport:
    """The ranks of a process set and their named collectives.

    Eagerly a call returns when its result is there; in a graph it is a node. A name is equal on all ranks, and no two
    collectives under way have the same. The number of ranks is that of now: in an elastic job it may change.
    """

    def __init__(self, process_set: ProcessSet) -> None:
        self.process_set = process_set

    @property
    def included(self) -> bool:
        """Whether this rank is one of them."""
        return bool(self.process_set.included())

    @property
    def rank(self) -> int:
        """This rank's number among them; 0 of an outsider, which is a set of its own."""
        return int(self.process_set.rank()) if self.included else 0

    @property
    def size(self) -> int:
        return int(self.process_set.size()) if self.included else 1

    @property
    def root(self) -> int:
        """The global rank of the first of them."""
        return int(self.process_set.ranks[0]) if self.process_set.ranks else 0

    def _where(self, name: str) -> dict[str, Any]:
        return {"name": name, "process_set": self.process_set, "ignore_name_scope": True}

    def allreduce(
        self, tensors: Sequence[tf.Tensor], name: str, before: float = 1.0, after: float = 1.0
    ) -> list[tf.Tensor]:
        """The sums over the ranks, as one message; values are multiplied with `before`, sums with `after`."""
        factors = {"prescale_factor": before, "postscale_factor": after}
        return list(_horovod.grouped_allreduce(list(tensors), op=Sum, **factors, **self._where(name)))

    def mean(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """Horovod's own averages over the ranks, as one message."""
        return list(_horovod.grouped_allreduce(list(tensors), op=Average, **self._where(name)))

    def maximum(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """The largest number of each entry."""
        return _horovod.allreduce(tensor, op=_horovod.Max, **self._where(name))

    def allgather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """The tensors of all ranks, one behind the other; their first dimensions may differ."""
        return _horovod.allgather(tensor, **self._where(name))

    def alltoall(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Row r goes to rank r; row r of the result came from it."""
        return _horovod.alltoall(tensor, **self._where(name))

    def broadcast(self, tensor: tf.Tensor, name: str, root_rank: int | None = None) -> tf.Tensor:
        """The tensor as a global rank has it; None: the first of these ranks."""
        return _horovod.broadcast(tensor, self.root if root_rank is None else root_rank, **self._where(name))

    def broadcast_object(self, value: Any, name: str, root_rank: int, session: Any = None) -> Any:
        """What pickle can carry, as a global rank has it. Eagerly, or in a session of TensorFlow 1."""
        return _horovod.broadcast_object(value, root_rank, session, name, self.process_set)

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


def broadcast_in_place(variable: tf.Variable, root_rank: int, process_set: ProcessSet) -> None:
    """Gives the variable the value that it has on a global rank, without a copy."""
    _horovod.broadcast_variables([variable], root_rank, process_set, inplace=True)


def has_failed(error: tf.errors.OpError) -> bool:
    """Whether the error is that of a collective that has failed, as it does where another rank is gone."""
    kinds = (
        tf.errors.UnknownError,
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.FailedPreconditionError,
    )
    return isinstance(error, kinds) and "horovod" in error.message.lower()
