"""Unrolls the rounds of an exchange into the graph that is being traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from hvd_accordion.comm.collectives import AllFinite, AllGather, AllReduce, AllToAll, Request, Rounds, payload, sent
from hvd_accordion.comm.transport import Transport
from hvd_accordion.compression.feedback import ExchangeResult


class Driven(NamedTuple):
    """What an exchange returned, as if the step had no NaN or Inf; whether it had none; the bytes that this rank sent."""

    result: ExchangeResult
    ok: tf.Tensor
    nbytes: float


@dataclass(frozen=True)
class Driver:
    """Exchanges are independent nodes of the graph, which TensorFlow's executor runs side by side.

    Args:
        prefix: of the names of all collectives; unique to an exchange of gradients, equal on all ranks.
        scales: what a mean multiplies with before and after its sum.
    """

    prefix: str
    transport: Transport
    scales: tuple[float, float]

    def run(self, rounds: Rounds[ExchangeResult], name: str) -> Driven:
        """Runs an exchange to its end."""
        size = self.transport.size
        answer: Any = None
        ok, nbytes, count = None, 0.0, 0
        while True:
            try:
                request = rounds.send(answer)
            except StopIteration as stop:
                assert ok is not None, "an exchange ended without asking for AllFinite"
                return Driven(stop.value, ok, nbytes)
            if isinstance(request, AllFinite):
                ok, answer = request.is_finite(), True
            else:
                nbytes += sum(sent(type(request), n_bytes(x), size) for x in payload(request))
                answer = self.carry_out(request, f"{self.prefix}.{name}.{count}")
                count += 1

    def carry_out(self, request: Request, name: str) -> Any:
        """The result of one collective."""
        if isinstance(request, AllReduce):
            return self.transport.wait(self.transport.allreduce(request.tensors, name, scales=self.scales))
        if isinstance(request, AllGather):
            rows = self.transport.wait(self.transport.allgather(request.tensor, name))
            return tf.reshape(rows, (self.transport.size, request.tensor.shape[0]))
        assert isinstance(request, AllToAll)
        received = self.transport.wait(self.transport.alltoall(request.tensor, name))
        return tf.reshape(received, request.tensor.shape)


def n_bytes(x: tf.Tensor) -> int:
    return x.shape.num_elements() * x.dtype.size
