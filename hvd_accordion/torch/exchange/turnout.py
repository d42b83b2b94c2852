"""Who comes to an update with how many micro-batches: one small allreduce an update, for which nobody waits beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import torch

from hvd_accordion.comm.naming import Prefix


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


@dataclass(frozen=True)
class Update:
    """Of the parameters, as this rank sees it.

    Args:
        turnout: the ranks' parts in it, as far as they are known.
        own: whether this rank has a gradient of now, or only what waits.
    """

    turnout: Turnout | None
    own: bool = False


class Turnouts:
    """Of the updates of one optimizer. `leader`: of the last update to which only some ranks came, until it is forgotten."""

    def __init__(self, prefix: Prefix, process_set: hvd.ProcessSet) -> None:
        self.prefix, self.process_set = prefix, process_set
        self.leader: int | None = None
        self._mine: torch.Tensor | None = None
        self._handle: Any = None

    def start(self, count: int, *, waits: bool = False, new: bool = False, further: bool = False) -> None:
        """Tells the others of this rank's part in the update that comes next."""
        size = self.process_set.size()
        self._mine = torch.zeros(size, 4, dtype=torch.int32)
        self._mine[self.process_set.rank()] = torch.tensor([count, waits, new, further], dtype=torch.int32)
        if size > 1:
            name = f"{self.prefix}.turnout"
            self._handle = hvd.allreduce_async(self._mine, op=hvd.Sum, name=name, process_set=self.process_set)

    @property
    def ready(self) -> bool:
        return self._handle is None or hvd.poll(self._handle)

    def finish(self) -> Turnout:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._mine = hvd.synchronize(handle)
        assert self._mine is not None
        counts, waits, new, further = self._mine.t().tolist()
        turnout = Turnout(tuple(counts), tuple(map(bool, waits)), tuple(map(bool, new)), any(further))
        if turnout.mixed and turnout.happens:
            self.leader = turnout.leader
        return turnout
