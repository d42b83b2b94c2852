"""Runs many exchanges at once over a transport's asynchronous collectives."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hvd_accordion.comm.collectives import AllFinite, AllGather, AllReduce, AllToAll, Request, Rounds, payload, sent
from hvd_accordion.comm.naming import Prefix
from hvd_accordion.comm.transport import Transport
from hvd_accordion.compression.feedback import ExchangeResult

PAUSE = 1e-4  # seconds between two polls; Horovod's own wait polls every millisecond


@dataclass
class Running:
    """An exchange under way: what it waits for, how many rounds it has had, what it sent."""

    name: str
    rounds: Rounds[ExchangeResult]
    request: Request | None = None
    handle: Any = None
    round: int = 0
    nbytes: float = 0.0


@dataclass
class Driver:
    """Starts exchanges, resumes each when its collective is done, ends all of them together.

    Collectives are named after the exchange and its round, so that ranks may start and resume in any order.

    Args:
        prefix: of all names; unique to an optimizer, equal on all ranks.
        scales: what a mean multiplies with before and after its sum.
    """

    prefix: Prefix | str
    transport: Transport
    scales: tuple[float, float]
    running: dict[str, Running] = field(default_factory=dict)

    def start(self, name: str, rounds: Rounds[ExchangeResult]) -> None:
        self.running[name] = Running(name, rounds)
        self._resume(self.running[name], None)

    def poll(self) -> bool:
        """Resumes every exchange whose collective is done; returns whether there was one. Never waits."""
        done = [r for r in self.running.values() if r.handle is not None and self.transport.poll(r.handle)]
        for running in done:
            self._receive(running)
        return bool(done)

    def wait(self, name: str) -> None:
        """Until no collective of an exchange is under way."""
        self.until(lambda: self.running[name].handle is None)

    def until(self, done: Callable[[], bool]) -> None:
        """Goes on with all exchanges until `done()`."""
        while not done():
            if not self.poll():
                time.sleep(PAUSE)

    def finish(
        self, check_finite: bool, others: Sequence[torch.Tensor] = ()
    ) -> dict[str, tuple[ExchangeResult, float]]:
        """Waits for all rounds of all exchanges. Name -> result and the bytes that this rank sent for it.

        Args:
            check_finite: whether anything depends on NaN or Inf in this step.
            others: flags of what else was exchanged in this step, which is finite only if they hold too.
        """
        self.until(lambda: all(running.handle is None for running in self.running.values()))
        # all wait for the same answer now: was every exchange of this step finite
        questions = [running.request for running in self.running.values() if isinstance(running.request, AllFinite)]
        assert len(questions) == len(self.running), "an exchange ended without AllFinite"
        flags = [*(question.is_finite() for question in questions), *others] if check_finite else []
        results = {}
        for name, running in self.running.items():
            try:
                running.rounds.send(all_true(flags, flags[0].device) if flags else True)
            except StopIteration as stop:
                results[name] = (stop.value, running.nbytes)
            else:
                raise RuntimeError(f"{name}: a collective was requested after AllFinite")
        self.running = {}
        return results

    def reset(self) -> None:
        """Drops what is under way, after an error."""
        self.running = {}

    def _receive(self, running: Running) -> None:
        handle, running.handle = running.handle, None
        result = self.transport.wait(handle)
        rows = isinstance(running.request, AllGather)
        self._resume(running, result.view(self.transport.size, -1) if rows else result)

    def _resume(self, running: Running, answer: Any) -> None:
        request = running.rounds.send(answer)
        running.request = request
        running.nbytes += sum(sent(type(request), x.nbytes, self.transport.size) for x in payload(request))
        running.handle = self._launch(request, f"{self.prefix}.{running.name}.{running.round}")
        running.round += 1

    def _launch(self, request: Request, name: str) -> Any:
        if isinstance(request, AllReduce):
            return self.transport.allreduce(request.tensors, name, scales=self.scales)
        if isinstance(request, AllGather):
            return self.transport.allgather(request.tensor, name)
        if isinstance(request, AllToAll):
            return self.transport.alltoall(request.tensor, name)
        return None


def all_true(flags: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.stack([flag.to(device) for flag in flags]).all()
