"""Runs exchanges outside of any graph, all side by side: what all of them ask for at once is one call of a small graph.

An eager collective waits for its end, and Horovod's eager operations are not to be called from several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from hvd_accordion.comm.collectives import AllFinite, AllReduce, Request, Rounds, payload, sent
from hvd_accordion.compression.feedback import ExchangeResult
from hvd_accordion.tensorflow.exchange.driver import Driver, n_bytes

Wave = tuple[tuple[str, type], ...]  # the names of the collectives, and of which kind they are


class EagerDriver:
    """Args: as `Driver`'s."""

    def __init__(self, prefix: str, process_set: Any) -> None:
        self.prefix, self.process_set = prefix, process_set
        self._driver = Driver(prefix, process_set, (1 / process_set.size(), 1.0))
        self._traced: dict[Wave, Callable[..., Any]] = {}

    def run(self, rounds: Mapping[str, Rounds[ExchangeResult]]) -> tuple[dict[str, ExchangeResult], float]:
        """What came of each exchange, and the bytes that this rank sent."""
        requests = {name: exchange.send(None) for name, exchange in rounds.items()}
        number, nbytes, size = 0, 0.0, self.process_set.size()
        while asked := {name: r for name, r in requests.items() if not isinstance(r, AllFinite)}:
            nbytes += sum(sent(type(r), n_bytes(x), size) for r in asked.values() for x in payload(r))
            for name, answer in self._carried_out(asked, number).items():
                requests[name] = rounds[name].send(answer)
            number += 1
        ok = all(bool(question.is_finite()) for question in requests.values())
        return {name: settled(exchange, ok) for name, exchange in rounds.items()}, nbytes

    def _carried_out(self, requests: Mapping[str, Request], number: int) -> dict[str, Any]:
        wave = tuple((f"{self.prefix}.{name}.{number}", type(r)) for name, r in requests.items())
        if wave not in self._traced:
            self._traced[wave] = tf.function(lambda given: self._collectives(wave, given), autograph=False)
        return dict(zip(requests, self._traced[wave]([payload(r) for r in requests.values()]), strict=True))

    def _collectives(self, wave: Wave, given: list[list[tf.Tensor]]) -> list[Any]:
        made = [
            kind(tensors if kind is AllReduce else tensors[0]) for (_, kind), tensors in zip(wave, given, strict=True)
        ]
        return [self._driver.carry_out(request, name) for request, (name, _) in zip(made, wave, strict=True)]


def settled(exchange: Rounds[ExchangeResult], ok: bool) -> ExchangeResult:
    """What an exchange returns, once it is known whether the step was sound everywhere."""
    try:
        exchange.send(ok)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("a collective was asked for after Agree")
