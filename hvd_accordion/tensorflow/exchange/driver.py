"""Unrolls the rounds of an exchange into the graph that is being traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from hvd_accordion.comm.collectives import AllFinite, AllGather, AllReduce, AllToAll, Request, Rounds, payload, sent
from hvd_accordion.compression.feedback import ExchangeResult


@dataclass(frozen=True)
class Driver:
    """Exchanges know nothing of each other: what they have in common is for TensorFlow's executor to run side by side.

    Args:
        prefix: of the names of all collectives; unique to an exchange of gradients, equal on all ranks.
        process_set: the ranks that exchange.
        scales: what a mean multiplies with before and after its sum.
    """

    prefix: str
    process_set: hvd.ProcessSet
    scales: tuple[float, float]

    def run(self, rounds: Rounds[ExchangeResult], name: str) -> tuple[ExchangeResult, tf.Tensor, float]:
        """What came of the exchange, as if the step were sound; whether it is, as far as this one saw; bytes sent."""
        size = self.process_set.size()
        answer: Any = None
        ok, nbytes, count = None, 0.0, 0
        while True:
            try:
                request = rounds.send(answer)
            except StopIteration as stop:
                assert ok is not None, "an exchange ended without asking whether the step was sound"
                return stop.value, ok, nbytes
            if isinstance(request, AllFinite):
                ok, answer = request.is_finite(), True
            else:
                nbytes += sum(sent(type(request), n_bytes(x), size) for x in payload(request))
                answer = self.carry_out(request, f"{self.prefix}.{name}.{count}")
                count += 1

    def carry_out(self, request: Request, name: str) -> Any:
        """The result of one collective."""
        where = {"name": name, "process_set": self.process_set, "ignore_name_scope": True}
        if isinstance(request, AllReduce):
            return self._allreduce(request.tensors, where)
        if isinstance(request, AllGather):
            rows = hvd.allgather(request.tensor, **where)
            return tf.reshape(rows, (self.process_set.size(), request.tensor.shape[0]))
        assert isinstance(request, AllToAll)
        return tf.reshape(hvd.alltoall(request.tensor, **where), request.tensor.shape)

    def _allreduce(self, tensors: Sequence[tf.Tensor], where: dict[str, Any]) -> list[tf.Tensor]:
        before, after = self.scales
        return hvd.grouped_allreduce(list(tensors), op=hvd.Sum, prescale_factor=before, postscale_factor=after, **where)


def n_bytes(x: tf.Tensor) -> int:
    return x.shape.num_elements() * x.dtype.size
