"""Ranks with different numbers of batches: who has none left takes part in the others' updates until all wait."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from hvd_accordion.torch import horovod_takeover
from hvd_accordion.torch.exchange.agreement import broadcast_object
from hvd_accordion.torch.exchange.driver import PAUSE
from hvd_accordion.torch.exchange.turnout import Turnout

live: weakref.WeakSet[Any] = weakref.WeakSet()  # the compressing optimizers


def join(device: int = -1) -> int:
    """Tells that this rank has no more batches, and returns when none has: as `horovod.torch.join`.

    Till then the rank takes part in the updates of all compressing optimizers that were made with `uneven_inputs=True`:
    with its residuals, or zeros in place of gradients. At the end it takes parameters and optimizer state of a rank that
    had batches till the last; its buffers are its own, as under Horovod.

    Returns a rank that joined last. Without compressing optimizers it is Horovod's own `join`.

    Raises ValueError where a compressing optimizer was made without `uneven_inputs=True`.
    """
    gc.collect()  # an optimizer that nobody can use any more is not waited for
    optimizers = [x for x in live if x._hvd.active]
    for optimizer in optimizers:
        optimizer._hvd.membership.check()
    optimizers.sort(key=lambda x: str(x._hvd.prefix))
    if not optimizers:
        return horovod_takeover.join(device)
    if any(x._hvd.participation.turnouts is None for x in optimizers):
        raise ValueError(
            "hvd.join() needs DistributedOptimizer(..., uneven_inputs=True) with compression; or give every rank the same "
            "number of batches, such as DistributedSampler(..., drop_last=True)"
        )
    leaders = [leader for leader in wait(optimizers) if leader is not None]
    return leaders[0] if leaders else horovod_takeover.job_size() - 1


def wait(optimizers: Iterable[Any]) -> list[int | None]:
    """Takes part in the updates of these optimizers until all ranks wait; what micro-batches are left is applied then.

    Gives for each the global rank that all follow by now, None where all stepped alike.
    """
    waiting = [_Wait(x) for x in optimizers if x._hvd.participation.turnouts is not None]
    while not all(x.over for x in waiting):
        if not any([x.proceed() for x in waiting]):
            time.sleep(PAUSE)
    return [x.end() for x in waiting]  # in one order on all ranks


class _Wait:
    """For the other ranks, at one optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.engine = optimizer, optimizer._hvd
        self.turnouts = self.engine.participation.turnouts
        self.turnout: Turnout | None = None
        self._start()

    def _start(self) -> None:
        self.turnouts.start(self.engine.batch.count, waits=True)

    @property
    def over(self) -> bool:
        return self.turnout is not None and self.turnout.all_wait

    def proceed(self) -> bool:
        """Takes part in an update, if there is one; returns whether the others have sent their parts. Never waits."""
        if self.over or not self.turnouts.ready:
            return False
        self.turnout = self.turnouts.finish()
        if not self.over:
            if self.turnout.happens:
                self.engine.take_part(self.turnout)
            self._start()
        return True

    def end(self) -> int | None:
        """All ranks wait."""
        assert self.turnout is not None
        if self.turnout.happens:
            self.engine.take_part(self.turnout)
            self.optimizer._apply_what_waited()
        leader, self.turnouts.leader = self.turnouts.leader, None
        if leader is None:
            return None
        self.optimizer._follow(leader)
        return self.engine.transport.ranks[leader]


def from_leader(engine: Any, leader: int, state: dict[str, Any]) -> dict[str, Any]:
    """Makes the parameters those of a rank; gives its optimizer state."""
    transport = engine.transport
    with torch.no_grad():
        for name, p in engine.params.items():
            values = p.detach().clone(memory_format=torch.contiguous_format)
            p.copy_(transport.wait(transport.broadcast(values, leader, f"{engine.prefix}.follow.{name}")))
    return broadcast_object(state, leader, f"{engine.prefix}.follow", transport)
