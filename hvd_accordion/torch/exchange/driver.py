"""Runs many exchanges at once over Horovod's asynchronous collectives."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import horovod.torch as hvd
import torch

from hvd_accordion.comm.collectives import AllFinite, AllGather, AllReduce, AllToAll, Request, Rounds, payload, sent
from hvd_accordion.compression.feedback import ExchangeResult

PAUSE = 1e-4  # seconds between two looks at what is on its way; Horovod's own wait looks every millisecond


@dataclass
class Running:
    """An exchange on its way: what it waits for, how many rounds it has had, what it sent."""

    name: str
    rounds: Rounds[ExchangeResult]
    request: Request | None = None
    handle: Any = None
    round: int = 0
    nbytes: float = 0.0


@dataclass
class Driver:
    """Starts exchanges, takes each up again when its collective is done, ends all of them together.

    Collectives are named after the exchange and its round, so that ranks may start and resume in any order.

    Args:
        prefix: of all names; unique to an optimizer, equal on all ranks.
        process_set: the ranks that exchange.
        scales: what a mean multiplies with before and after its sum.
    """

    prefix: str
    process_set: hvd.ProcessSet
    scales: tuple[float, float]
    running: dict[str, Running] = field(default_factory=dict)

    def start(self, name: str, rounds: Rounds[ExchangeResult]) -> None:
        self.running[name] = Running(name, rounds)
        self._resume(self.running[name], None)

    def poll(self) -> bool:
        """Takes up every exchange whose collective is done, and tells whether there was one; never waits."""
        done = [r for r in self.running.values() if r.handle is not None and hvd.poll(r.handle)]
        for running in done:
            self._receive(running)
        return bool(done)

    def wait(self, name: str) -> None:
        """Until nothing of an exchange is on its way."""
        self.until(lambda: self.running[name].handle is None)

    def until(self, done: Callable[[], bool]) -> None:
        """Goes on with all exchanges until `done()`."""
        while not done():
            if not self.poll():
                time.sleep(PAUSE)

    def finish(self, asked: bool, others: Sequence[torch.Tensor] = ()) -> dict[str, tuple[ExchangeResult, float]]:
        """Waits for all rounds of all exchanges. Name -> result and the bytes that this rank sent for it.

        Args:
            asked: whether anybody wants to know if the step was sound.
            others: flags of what else was exchanged in this step, which is sound only if they hold too.
        """
        self.until(lambda: all(running.handle is None for running in self.running.values()))
        # all wait for the same answer now: was the step sound in every exchange
        questions = [running.request for running in self.running.values() if isinstance(running.request, AllFinite)]
        assert len(questions) == len(self.running), "an exchange ended without asking whether the step was sound"
        flags = [*(question.is_finite() for question in questions), *others] if asked else []
        results = {}
        for name, running in self.running.items():
            try:
                running.rounds.send(all_true(flags, flags[0].device) if flags else True)
            except StopIteration as stop:
                results[name] = (stop.value, running.nbytes)
            else:
                raise RuntimeError(f"{name}: a collective was asked for after Agree")
        self.running = {}
        return results

    def reset(self) -> None:
        """Forgets what is on its way, after an error."""
        self.running = {}

    def _receive(self, running: Running) -> None:
        handle, running.handle = running.handle, None
        result = hvd.synchronize(handle)
        if isinstance(running.request, AllReduce):
            answer: Any = list(result)
        elif isinstance(running.request, AllGather):
            answer = result.view(self.process_set.size(), -1)
        else:
            answer = result[0] if isinstance(result, tuple) else result  # alltoall: (output, received splits)
        self._resume(running, answer)

    def _resume(self, running: Running, answer: Any) -> None:
        request = running.rounds.send(answer)
        running.request = request
        running.nbytes += sum(sent(type(request), x.nbytes, self.process_set.size()) for x in payload(request))
        running.handle = self._launch(request, f"{self.prefix}.{running.name}.{running.round}")
        running.round += 1

    def _launch(self, request: Request, name: str) -> Any:
        if isinstance(request, AllReduce):
            return self._allreduce(request.tensors, name)
        if isinstance(request, AllGather):
            return hvd.allgather_async(request.tensor, name=name, process_set=self.process_set)
        if isinstance(request, AllToAll):
            return hvd.alltoall_async(request.tensor, name=name, process_set=self.process_set)
        return None

    def _allreduce(self, tensors: Sequence[torch.Tensor], name: str) -> Any:
        before, after = self.scales
        return hvd.grouped_allreduce_async_(
            list(tensors),
            name=name,
            op=hvd.Sum,
            prescale_factor=before,
            postscale_factor=after,
            process_set=self.process_set,
        )


def all_true(flags: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.stack([flag.to(device) for flag in flags]).all()
