"""The exchanges of gradients that have state, in the order in which they got it: the same on all ranks of a job."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from hvd_accordion.tensorflow.exchange.shared import Shared

_built: list[weakref.ref[Any]] = []
_waiting: list[Shared] = []  # of exchanges that rank 0 has and this rank will have
_synchronised = False


def synchronised() -> bool:
    """Whether an elastic state has synchronised this rank with the others."""
    return _synchronised


def alive() -> list[Any]:
    return [exchange for exchange in (ref() for ref in _built) if exchange is not None]


def add(exchange: Any) -> None:
    """It has got state for its first variables."""
    _built[:] = [*map(weakref.ref, alive()), weakref.ref(exchange)]
    found = next((its for its in _waiting if its.fits(exchange)), None)
    if found is not None:
        _waiting.remove(found)
        exchange.take(found)


def wait(states: Sequence[Shared]) -> None:
    """Exchanges that are made later take their state from these."""
    global _synchronised
    _waiting[:], _synchronised = states, True


def move() -> None:
    """This process has another place among other ranks."""
    for exchange in alive():
        exchange.move()
