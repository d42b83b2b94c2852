"""Which ranks come to an update, with how many micro-batches: one small allreduce an update, which nothing waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.comm.transport import Transport


@dataclass(frozen=True)
class Turnout:
    """Of one update, the same on all ranks.

    Args:
        counts: micro-batches of each rank; 0: it has none.
        waits: whether each rank only waits for the others, in `join()` or `end_epoch()`, or computes gradients.
        new: whether each has a gradient that is not averaged yet.
        further: whether the update is one of a closure's later calls.
    """

    counts: tuple[int, ...]
    waits: tuple[bool, ...]
    new: tuple[bool, ...]
    further: bool

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        return self.total / len(self.counts)

    @property
    def all_wait(self) -> bool:
        return all(self.waits)

    @property
    def happens(self) -> bool:
        """Whether there is anything to exchange."""
        return any(self.new) or (self.all_wait and self.total > 0)

    @property
    def mixed(self) -> bool:
        return any(self.waits) and not self.all_wait

    @property
    def leader(self) -> int:
        """The first rank that computes gradients; 0 where none does."""
        return self.waits.index(False) if not self.all_wait else 0


class Turnouts:
    """Of the updates of one optimizer. `leader`: of the last update to which only some ranks came, until it is forgotten."""

    def __init__(self, prefix: Prefix, transport: Transport) -> None:
        self.prefix, self.transport = prefix, transport
        self.leader: int | None = None
        self._mine: torch.Tensor | None = None
        self._handle: Any = None

    def start(self, count: int, *, waits: bool = False, new: bool = False, further: bool = False) -> None:
        """Sends this rank's part in the update that comes next."""
        size = self.transport.size
        self._mine = torch.zeros(size, 4, dtype=torch.int32)
        self._mine[self.transport.rank] = torch.tensor([count, waits, new, further], dtype=torch.int32)
        if size > 1:
            self._handle = self.transport.allreduce([self._mine], f"{self.prefix}.turnout")

    @property
    def ready(self) -> bool:
        return self._handle is None or self.transport.poll(self._handle)

    def finish(self) -> Turnout:
        handle, self._handle = self._handle, None
        if handle is not None:
            (self._mine,) = self.transport.wait(handle)
        assert self._mine is not None
        counts, waits, new, further = self._mine.t().tolist()
        turnout = Turnout(tuple(counts), tuple(map(bool, waits)), tuple(map(bool, new)), any(further))
        if turnout.mixed and turnout.happens:
            self.leader = turnout.leader
        return turnout
