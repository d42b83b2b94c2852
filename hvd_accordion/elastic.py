"""Elastic training: whether ranks may come and go in this job, and how often they have been gathered anew.

After each gathering names of collectives start again as in a new process, so that ranks that were there and ranks that
have just come call them alike.
"""

from __future__ import annotations

import os

_generation = 0


def active() -> bool:
    """Whether Horovod's launcher started this process as one of an elastic job."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def generation() -> int:
    """How often this process has been gathered with others since its first time."""
    return _generation


def gathered() -> None:
    """Horovod has been initialised again, among other ranks than before."""
    global _generation
    _generation += 1
