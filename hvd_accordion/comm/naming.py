"""Names of collectives: the same on all ranks of a process set, different for whatever else exchanges there."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

_drawn: defaultdict[tuple[int, int], itertools.count[int]] = defaultdict(itertools.count)  # by generation, process set
_generation = 0


def generation() -> int:
    """How often the ranks of an elastic job were gathered anew while this process was one of them."""
    return _generation


def gathered() -> None:
    """Horovod has been initialised again, among other ranks than before.

    Names start again as in a new process, so that ranks that were there and ranks that have just come use the same.
    """
    global _generation
    _generation += 1


class Prefix:
    """What the names of one optimizer's collectives begin with, drawn when it is first written.

    Ranks must agree in the order of first collectives alone: objects that only one of them makes, and never uses to
    exchange, don't count. Drawn again, from 0, when ranks of an elastic job were gathered anew: those that have just come
    begin there.
    """

    def __init__(self, process_set: Any) -> None:
        self._process_set, self._text, self._of = process_set, "", -1

    def __str__(self) -> str:
        if self._of != _generation:
            number = self._process_set.process_set_id
            self._text = f"hvd_accordion.{number}.{next(_drawn[_generation, number])}"
            self._of = _generation
        return self._text
