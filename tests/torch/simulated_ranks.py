"""Ranks as threads of one process, whose collectives match by name as Horovod's do: errors in place of hangs."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as horovod
import torch

from hvd_accordion.torch import horovod_takeover, transport
from hvd_accordion.torch.exchange import rivals

SECONDS = 2.0  # after which a rank that waits for others counts as hanging


class Hang(Exception):
    """A rank waits for a collective that another one never enters."""


class Id:
    """Of a process set: written alike on all ranks, a key of its own on each."""

    def __str__(self) -> str:
        return "0"


class ProcessSet(horovod.ProcessSet):
    """All simulated ranks, as one of them sees them."""

    def __init__(self, rank: int, size: int) -> None:
        self.process_set_id, self.ranks = Id(), list(range(size))
        self._rank = rank

    def size(self) -> int:
        return len(self.ranks)

    def rank(self) -> int:
        return self._rank

    def included(self) -> bool:
        return True


class Collective:
    """One named collective: what each rank has given, and the answers once all have."""

    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.name = kind, name
        self.given: dict[int, Any] = {}
        self.answers: list[Any] | None = None
        self.since: float | None = None  # when somebody first asked for an answer that was not there


class Meeting:
    """Where the ranks' collectives meet."""

    def __init__(self, size: int) -> None:
        self.size, self.alive, self.changed = size, set(range(size)), threading.Condition()
        self._open: dict[tuple[str, int], Collective] = {}
        self._count: dict[int, defaultdict[str, int]] = {r: defaultdict(int) for r in range(size)}

    def enter(
        self, rank: int, kind: str, name: str, given: Any, carry_out: Callable[[list[Any]], list[Any]]
    ) -> Collective:
        assert name, "every collective has a name of its own"
        with self.changed:
            number = self._count[rank][name]
            self._count[rank][name] += 1
            collective = self._open.setdefault((name, number), Collective(kind, name))
            assert collective.kind == kind, f"{name}: {collective.kind} on one rank, {kind} on another"
            collective.given[rank] = given
            if len(collective.given) == self.size:
                collective.answers = carry_out([collective.given[r] for r in range(self.size)])
                del self._open[name, number]
                self.changed.notify_all()
        return collective

    def leave(self, rank: int) -> None:
        with self.changed:
            self.alive.discard(rank)
            self.changed.notify_all()

    def is_done(self, collective: Collective) -> bool:
        """Hang where it never will be."""
        with self.changed:
            if collective.answers is not None:
                return True
            gone = set(range(self.size)) - self.alive - collective.given.keys()
            collective.since = collective.since or time.monotonic()
            if gone or time.monotonic() - collective.since > SECONDS:
                raise Hang(f"{collective.name}: entered by ranks {sorted(collective.given)} of {self.size}")
            return False

    def wait(self, collective: Collective) -> list[Any]:
        while not self.is_done(collective):
            with self.changed:
                if collective.answers is None:
                    self.changed.wait(0.2)
        assert collective.answers is not None
        return collective.answers


class Handle:
    """Of a collective that one rank has started. `into`: the tensors that hold the result in the end."""

    def __init__(self, collective: Collective, into: Sequence[torch.Tensor] | None = None) -> None:
        self.collective, self.into = collective, into
        self.restore: Callable[[], None] = lambda: None


class SimulatedTransport:
    """See `Transport`. As under Horovod the result of allreduce and broadcast is in the memory of what was given."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size, self.ranks = meeting, rank, meeting.size, range(meeting.size)
        self.included = True

    def allreduce(self, tensors: Any, name: str, op: str = "sum", scales: tuple[float, float] = (1.0, 1.0)) -> Handle:
        before, after = scales

        def reduced(column: Sequence[torch.Tensor]) -> torch.Tensor:
            stacked = torch.stack([x * before if before != 1.0 else x for x in column])
            whole = stacked.amax(0) if op == "max" else stacked.sum(0, dtype=column[0].dtype)
            return whole * after if after != 1.0 else whole

        def carry_out(everyone: list[Any]) -> list[Any]:
            return [[reduced(column) for column in zip(*everyone, strict=True)]] * self.size

        given = [x.clone() for x in tensors]
        return self._started(f"allreduce {op}", name, given, carry_out, tensors, list(tensors))

    def allgather(self, tensor: torch.Tensor, name: str) -> Handle:
        def carry_out(everyone: list[Any]) -> list[Any]:
            return [torch.cat(everyone)] * self.size

        return self._started("allgather", name, tensor.clone(), carry_out, [tensor])

    def alltoall(self, tensor: torch.Tensor, name: str) -> Handle:
        def carry_out(everyone: list[Any]) -> list[Any]:
            rows = [x.chunk(self.size) for x in everyone]
            return [torch.cat([row[rank] for row in rows]) for rank in range(self.size)]

        return self._started("alltoall", name, tensor.clone(), carry_out, [tensor])

    def broadcast(self, tensor: torch.Tensor, root: int, name: str) -> Handle:
        def carry_out(everyone: list[Any]) -> list[Any]:
            return [[everyone[root]]] * self.size

        return self._started(f"broadcast {root}", name, tensor.clone(), carry_out, [tensor], [tensor])

    def _started(self, kind: str, name: str, given: Any, carry_out: Any, tensors: Any, into: Any = None) -> Handle:
        del tensors
        return Handle(self.meeting.enter(self.rank, kind, name, given, carry_out), into)

    def poll(self, handle: Handle) -> bool:
        return self.meeting.is_done(handle.collective)

    def wait(self, handle: Handle) -> Any:
        answer = self.meeting.wait(handle.collective)[self.rank]
        handle.restore()
        if handle.into is None:
            return answer.clone()
        for x, result in zip(handle.into, answer, strict=True):
            x.copy_(result)
        return handle.into[0] if handle.collective.kind.startswith("broadcast") else handle.into


class HostileTransport(SimulatedTransport):
    """Does all that a communication library may do.

    Collectives end in random order and late. Inputs are copied when they start; till the end the originals hold NaN, or
    noise if they are of integers. A result is nowhere to be seen before `wait`.
    """

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__(meeting, rank)
        self._random = random.Random(rank)

    def _started(self, kind: str, name: str, given: Any, carry_out: Any, tensors: Any, into: Any = None) -> Handle:
        handle = super()._started(kind, name, given, carry_out, tensors, into)
        originals = [x.clone() for x in tensors]
        for x in tensors:
            x.fill_(float("nan") if x.is_floating_point() else 1 if x.dtype == torch.bool else 85)

        def restore() -> None:
            for x, original in zip(tensors, originals, strict=True):
                x.copy_(original)

        handle.restore = restore
        handle.late = self._random.randrange(6)  # type: ignore[attr-defined]  # polls that it takes at least
        return handle

    def poll(self, handle: Any) -> bool:
        handle.late -= 1
        return handle.late < 0 and super().poll(handle)


class SimulatedRanks:
    """Runs a function once a rank, each in a thread of its own, whose optimizers exchange over `kind` of transport."""

    def __init__(self, size: int, monkeypatch: Any, kind: type[SimulatedTransport] = SimulatedTransport) -> None:
        self.size = size
        self.process_sets = [ProcessSet(rank, size) for rank in range(size)]
        self._here, self._meeting = threading.local(), Meeting(size)
        self._transports = [kind(self._meeting, rank) for rank in range(size)]
        monkeypatch.setattr(transport, "connect", self._connect)
        monkeypatch.setattr(horovod_takeover, "job_size", lambda: size)
        monkeypatch.setattr(horovod_takeover, "broadcast_optimizer_state", lambda *_: None)  # of what all ranks share
        claim, one_by_one = rivals.claim, threading.Lock()

        def claim_alone(engine: Any) -> None:
            with one_by_one:
                claim(engine)

        monkeypatch.setattr(rivals, "claim", claim_alone)

    def _connect(self, process_set: Any) -> SimulatedTransport:
        return self._transports[process_set.rank()]

    @property
    def transport(self) -> SimulatedTransport:
        """Of the rank that calls."""
        return self._transports[self.rank()]

    def rank(self) -> int:
        return self._here.rank

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """The results in the order of the ranks; raises what the first of the failed ones raised."""
        results: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}

        def work(rank: int) -> None:
            self._here.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException as error:
                errors[rank] = error
            finally:
                self._meeting.leave(rank)

        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * SECONDS)
        assert not any(thread.is_alive() for thread in threads), "a rank never ended"
        for error in sorted(errors.values(), key=lambda error: isinstance(error, Hang)):
            raise error
        return [results[rank] for rank in range(self.size)]
