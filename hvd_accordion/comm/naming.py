"""Names of collectives: equal on all ranks of a process set, unique to one optimizer there."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

_drawn: defaultdict[tuple[int, int], itertools.count[int]] = defaultdict(itertools.count)  # by generation, process set
_generation = 0


def generation() -> int:
    """Number of times that Horovod was initialised again in this process, in an elastic job."""
    return _generation


def gathered() -> None:
    """Counts another initialisation of Horovod, with other ranks.

    Names count from 0 again, as in a new process, so that old and new ranks use the same names.
    """
    global _generation
    _generation += 1


class Prefix:
    """The prefix of one optimizer's collectives, numbered when it is first converted to text.

    Only the order of first collectives must be equal on all ranks: an object that never exchanges takes no number. In an
    elastic job numbers start at 0 again after each new initialisation, as they do on a new rank.
    """

    def __init__(self, process_set: Any) -> None:
        self._process_set, self._text, self._of = process_set, "", -1

    def __str__(self) -> str:
        if self._of != _generation:
            number = self._process_set.process_set_id
            self._text = f"hvd_accordion.{number}.{next(_drawn[_generation, number])}"
            self._of = _generation
        return self._text
