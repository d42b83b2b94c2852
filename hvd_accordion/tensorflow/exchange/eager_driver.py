"""Runs exchanges outside of any graph, all side by side: their collectives of a round are one call of a small graph.

An eager collective waits for its end, and Horovod's eager operations are not to be called from several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from hvd_accordion.comm.collectives import AllFinite, AllReduce, Request, Rounds, payload, sent
from hvd_accordion.comm.transport import Transport
from hvd_accordion.compression.feedback import ExchangeResult
from hvd_accordion.tensorflow.exchange.driver import Driver, n_bytes

Round = tuple[tuple[str, type], ...]  # the names of the collectives, and of which kind they are


class EagerDriver:
    """Args: as `Driver`'s."""

    def __init__(self, prefix: str, transport: Transport) -> None:
        self.prefix, self.transport = prefix, transport
        self._driver = Driver(prefix, transport, (1 / transport.size, 1.0))
        self._traced: dict[Round, Callable[..., Any]] = {}

    def run(self, rounds: Mapping[str, Rounds[ExchangeResult]]) -> tuple[dict[str, ExchangeResult], float]:
        """What came of each exchange, and the bytes that this rank sent."""
        requests = {name: exchange.send(None) for name, exchange in rounds.items()}
        number, nbytes, size = 0, 0.0, self.transport.size
        while open_requests := {name: r for name, r in requests.items() if not isinstance(r, AllFinite)}:
            nbytes += sum(sent(type(r), n_bytes(x), size) for r in open_requests.values() for x in payload(r))
            for name, answer in self._carried_out(open_requests, number).items():
                requests[name] = rounds[name].send(answer)
            number += 1
        ok = all(bool(r.is_finite()) for r in requests.values() if isinstance(r, AllFinite))
        return {name: finished(exchange, ok) for name, exchange in rounds.items()}, nbytes

    def _carried_out(self, requests: Mapping[str, Request], number: int) -> dict[str, Any]:
        collectives = tuple((f"{self.prefix}.{name}.{number}", type(r)) for name, r in requests.items())
        if collectives not in self._traced:
            self._traced[collectives] = tf.function(
                lambda given: self._collectives(collectives, given), autograph=False
            )
        return dict(zip(requests, self._traced[collectives]([payload(r) for r in requests.values()]), strict=True))

    def _collectives(self, collectives: Round, given: list[list[tf.Tensor]]) -> list[Any]:
        made = [
            kind(tensors if kind is AllReduce else tensors[0])
            for (_, kind), tensors in zip(collectives, given, strict=True)
        ]
        return [self._driver.carry_out(request, name) for request, (name, _) in zip(made, collectives, strict=True)]


def finished(exchange: Rounds[ExchangeResult], ok: bool) -> ExchangeResult:
    """What an exchange returns, given whether all ranks' values were finite."""
    try:
        exchange.send(ok)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("an exchange yielded a collective after AllFinite")
