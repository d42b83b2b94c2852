"""hvd.join(), for ranks that run out of data before others: what it can't do beside compression."""

from __future__ import annotations

import weakref
from typing import Any

from hvd_accordion.tensorflow import transport

_compressing: weakref.WeakSet[Any] = weakref.WeakSet()  # exchanges whose collectives join() would have to stand in for

REFUSED = (
    "hvd.join() knows Horovod's own allreduce alone, and gradients travel compressed: a rank that joins can't take part in "
    "the exchanges of the others. Give all ranks the same number of steps, by steps_per_epoch, dataset.repeat() or "
    "dataset.take(), or use compression=None"
)


def compresses(exchange: Any) -> None:
    """From now on, as long as it lives, this exchange's collectives are others than Horovod's own allreduce."""
    _compressing.add(exchange)


def join() -> Any:
    """As Horovod's: this rank has no more data, and waits until all ranks have joined; returns the last of them.

    Raises RuntimeError where gradients travel compressed.
    """
    if _compressing:
        raise RuntimeError(REFUSED)
    return transport.join()
