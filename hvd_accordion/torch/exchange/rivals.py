"""Optimizers that would exchange the same gradients: each starts in backward, so only one of them may be alive then."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

_engines: weakref.WeakSet[Any] = weakref.WeakSet()
_shared: set[int] = set()  # identities of parameters that belong to two


def claim(engine: Any) -> None:
    """To be called when an engine has taken in parameters. An older one may be on its way out, so nothing is raised yet."""
    _engines.add(engine)
    _look()


def withdraw(engine: Any) -> None:
    """The engine starts nothing in backward any more."""
    _engines.discard(engine)
    _look()


def check(p: int, name: str) -> None:
    """ValueError where the parameter of this identity belongs to two optimizers that are alive."""
    if p not in _shared:
        return
    gc.collect()  # on all ranks the same are alive then
    _look()
    if p in _shared:
        raise ValueError(
            f"parameter {name} belongs to two DistributedOptimizers, which would both exchange its gradient: call "
            "release() of one of them, or let go of it and of all that holds it, such as schedulers, before backward()"
        )


def _look() -> None:
    count = Counter(id(p) for engine in _engines if engine.size > 1 for p in engine.params.values())
    _shared.clear()
    _shared.update(p for p, engines in count.items() if engines > 1)
