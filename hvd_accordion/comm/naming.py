"""Names of collectives: the same on all ranks of a process set, different for whatever else exchanges there."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

from hvd_accordion.training import elastic

_drawn: defaultdict[tuple[int, int], itertools.count[int]] = defaultdict(itertools.count)  # by generation, process set


class Prefix:
    """What the names of one optimizer's collectives begin with, drawn when it is first written.

    Ranks must agree in the order of first collectives alone: objects that only one of them makes, and never uses to
    exchange, don't count. Drawn again, from 0, when ranks of an elastic job were gathered anew: those that have just come
    begin there.
    """

    def __init__(self, process_set: Any) -> None:
        self._process_set, self._text, self._of = process_set, "", -1

    def __str__(self) -> str:
        generation = elastic.generation()
        if self._of != generation:
            number = self._process_set.process_set_id
            self._text = f"hvd_accordion.{number}.{next(_drawn[generation, number])}"
            self._of = generation
        return self._text
