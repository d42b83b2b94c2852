"""Counts what plain Horovod sends, so that it reports and logs like compressed training."""

from __future__ import annotations

import time
from collections.abc import Callable

from hvd_accordion.compression import CompressionSpec
from hvd_accordion.controller import Controller


class PlainEngine:
    """Wraps Horovod's `synchronize`. `spec` has the cost of what Horovod sends."""

    completes_batch = True  # every step is an update

    def __init__(self, controller: Controller, spec: CompressionSpec, synchronize: Callable[[], None]) -> None:
        self.controller, self.spec, self._synchronize = controller, spec, synchronize
        self._sent = sum(self.bytes_per_step().values())

    def bytes_per_step(self) -> dict[str, float]:
        n = self.controller.world_size
        return {name: self.spec.bytes_per_step(x.shape, x.dtype, n) for name, x in self.controller.layers.items()}

    def synchronize(self) -> None:
        begin = time.perf_counter()
        self._synchronize()
        if self.controller.advance(self._sent, time.perf_counter() - begin):
            self.controller.end_epoch()

    def end_epoch(self) -> None:
        self.controller.end_epoch()
