"""Names of collectives: the same on all ranks of a process set, different for whatever else exchanges there."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

_drawn: defaultdict[int, itertools.count[int]] = defaultdict(itertools.count)  # by process set


class Prefix:
    """What the names of one optimizer's collectives begin with, drawn when it is first written.

    Ranks must agree in the order of first collectives alone: objects that only one of them makes, and never uses to
    exchange, don't count.
    """

    def __init__(self, process_set: Any) -> None:
        self._process_set, self._text = process_set, ""

    def __str__(self) -> str:
        if not self._text:
            number = self._process_set.process_set_id
            self._text = f"hvd_accordion.{number}.{next(_drawn[number])}"
        return self._text
