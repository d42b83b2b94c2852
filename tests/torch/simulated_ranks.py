"""Horovod's collectives for torch among threads of one process: a rank each, with errors in place of hangs."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import horovod.torch as horovod
import torch

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

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.given: dict[int, Any] = {}
        self.answers: dict[int, Any] = {}


class SimulatedRanks:
    """Runs a function once a rank, each in a thread of its own, over collectives that match by name as Horovod's do.

    Tensors that are reduced in place hold NaN until the collective is done: whoever reads or keeps them meanwhile shows.
    """

    def __init__(self, size: int, monkeypatch: Any) -> None:
        self.size = size
        self.process_sets = [ProcessSet(rank, size) for rank in range(size)]
        self._here = threading.local()
        self._changed = threading.Condition()
        self._open: dict[tuple[str, int], Collective] = {}
        self._count: dict[int, defaultdict[str, int]] = {r: defaultdict(int) for r in range(size)}
        self._alive = set(range(size))
        names = (
            "allreduce allreduce_ allreduce_async allgather allgather_async alltoall_async broadcast broadcast_object"
        )
        for name in (
            *names.split(),
            "grouped_allreduce_async_",
            "sparse_allreduce_async",
            "poll",
            "synchronize",
            "rank",
        ):
            monkeypatch.setattr(horovod, name, getattr(self, name))
        monkeypatch.setattr(horovod, "size", lambda: size)
        claim, one_by_one = rivals.claim, threading.Lock()

        def claim_alone(engine: Any) -> None:
            with one_by_one:
                claim(engine)

        monkeypatch.setattr(rivals, "claim", claim_alone)
        monkeypatch.setattr(horovod, "broadcast_optimizer_state", lambda *_: None)  # of what is equal on all ranks

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
                with self._changed:
                    self._alive.discard(rank)
                    self._changed.notify_all()

        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * SECONDS)
        assert not any(thread.is_alive() for thread in threads), "a rank never ended"
        for error in sorted(errors.values(), key=lambda error: isinstance(error, Hang)):
            raise error
        return [results[rank] for rank in range(self.size)]

    def rank(self) -> int:
        return self._here.rank

    # one collective

    def _enter(self, kind: str, name: str, given: Any, carry_out: Callable[[list[Any]], list[Any]]) -> Any:
        assert name, "every collective has a name of its own"
        me = self.rank()
        with self._changed:
            number = self._count[me][name]
            self._count[me][name] += 1
            collective = self._open.setdefault((name, number), Collective(kind))
            assert collective.kind == kind, f"{name}: {collective.kind} on one rank, {kind} on another"
            collective.given[me] = given
            if len(collective.given) == self.size:
                answers = carry_out([collective.given[rank] for rank in range(self.size)])
                collective.answers = dict(enumerate(answers))
                del self._open[name, number]
                self._changed.notify_all()
        return name, collective

    def poll(self, handle: Any) -> bool:
        _, collective = handle
        if not collective.answers:
            self._fail_if_alone(*handle)
        return bool(collective.answers)

    def _fail_if_alone(self, name: str, collective: Collective) -> None:
        with self._changed:
            gone = set(range(self.size)) - self._alive - collective.given.keys()
            since = collective.__dict__.setdefault("since", time.monotonic())
            if not collective.answers and (gone or time.monotonic() - since > SECONDS):
                raise Hang(f"{name}: entered by ranks {sorted(collective.given)} of {self.size}")

    def synchronize(self, handle: Any) -> Any:
        name, collective = handle
        while True:
            with self._changed:
                if collective.answers:
                    return collective.answers[self.rank()](self.rank())
                self._changed.wait(0.2)
            self._fail_if_alone(name, collective)

    # Horovod's functions

    def grouped_allreduce_async_(
        self, tensors: Any, name: str, op: Any, prescale_factor: float, postscale_factor: float, **_: Any
    ) -> Any:
        copies = [x.clone() for x in tensors]
        for x in tensors:
            x.fill_(float("nan") if x.is_floating_point() else -1)

        def carry_out(everyone: list[Any]) -> list[Any]:
            sums = [torch.stack([x * prescale_factor for x in column]).sum(0) for column in zip(*everyone, strict=True)]
            means = [x * postscale_factor for x in sums]
            return [lambda rank: means] * self.size

        name, collective = self._enter("allreduce", name, copies, carry_out)
        return name, _Into(collective, tensors)

    def allreduce_async(self, tensor: torch.Tensor, name: str, op: Any, **_: Any) -> Any:
        def carry_out(everyone: list[Any]) -> list[Any]:
            stacked = torch.stack(everyone)
            result = stacked.amax(0) if op == horovod.Max else stacked.amin(0) if op == horovod.Min else stacked.sum(0)
            result = result / self.size if op == horovod.Average else result
            return [lambda rank: result.clone()] * self.size

        return self._enter("allreduce", name, tensor.clone(), carry_out)

    def allreduce(self, tensor: torch.Tensor, name: str, op: Any = horovod.Average, **_: Any) -> torch.Tensor:
        return self.synchronize(self.allreduce_async(tensor, name, op))

    def allreduce_(self, tensor: torch.Tensor, name: str, op: Any = horovod.Average, **_: Any) -> torch.Tensor:
        return tensor.copy_(self.allreduce(tensor, name, op))

    def allgather_async(self, tensor: torch.Tensor, name: str, **_: Any) -> Any:
        return self._enter(
            "allgather", name, tensor.clone(), lambda everyone: [lambda rank: torch.cat(everyone)] * self.size
        )

    def allgather(self, tensor: torch.Tensor, name: str, **_: Any) -> torch.Tensor:
        return self.synchronize(self.allgather_async(tensor, name))

    def alltoall_async(self, tensor: torch.Tensor, name: str, **_: Any) -> Any:
        def carry_out(everyone: list[Any]) -> list[Any]:
            rows = [x.chunk(self.size) for x in everyone]
            return [lambda rank: torch.cat([row[rank] for row in rows])] * self.size

        return self._enter("alltoall", name, tensor.clone(), carry_out)

    def broadcast(self, tensor: torch.Tensor, root_rank: int, name: str, **_: Any) -> torch.Tensor:
        handle = self._enter(
            "broadcast", name, tensor.clone(), lambda everyone: [lambda rank: everyone[root_rank].clone()] * self.size
        )
        return self.synchronize(handle)

    def broadcast_object(self, thing: Any, root_rank: int = 0, name: str | None = None, **_: Any) -> Any:
        handle = self._enter(
            "broadcast", name or "object", thing, lambda everyone: [lambda rank: everyone[root_rank]] * self.size
        )
        return self.synchronize(handle)

    def sparse_allreduce_async(self, tensor: torch.Tensor, name: str, op: Any, process_set: Any) -> Any:
        handle = self._enter("sparse", name, tensor.clone(), lambda everyone: [lambda rank: sum(everyone)] * self.size)
        return lambda: self.synchronize(handle) / (self.size if op == horovod.Average else 1)


class _Into:
    """A collective whose answer is written into the tensors that one rank gave."""

    def __init__(self, collective: Collective, tensors: Any) -> None:
        self._collective, self._tensors = collective, list(tensors)

    @property
    def given(self) -> dict[int, Any]:
        return self._collective.given

    @property
    def answers(self) -> dict[int, Any]:
        return {rank: self._write for rank in self._collective.answers}

    def _write(self, rank: int) -> Any:
        means = self._collective.answers[rank](rank)
        return [x.copy_(mean) for x, mean in zip(self._tensors, means, strict=True)]
