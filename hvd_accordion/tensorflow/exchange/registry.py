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
    """Whether an elastic state has told this rank what the others know."""
    return _synchronised


def alive() -> list[Any]:
    return [exchange for exchange in (ref() for ref in _built) if exchange is not None]


def add(exchange: Any) -> None:
    """It has got state for its first variables."""
    _built[:] = [*map(weakref.ref, alive()), weakref.ref(exchange)]
    found = next((told for told in _waiting if told.fits(exchange)), None)
    if found is not None:
        _waiting.remove(found)
        exchange.take(found)


def wait(told: Sequence[Shared]) -> None:
    """Exchanges to come take up what is theirs of this; all others have."""
    global _synchronised
    _waiting[:], _synchronised = told, True


def move() -> None:
    """This process has another place among other ranks."""
    for exchange in alive():
        exchange.move()
