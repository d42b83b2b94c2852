"""Norms of gradient estimates that are summed over a window, as an Accordion asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hvd_accordion.comm.collectives import Tensor
from hvd_accordion.ops.protocol import Ops
from hvd_accordion.policy import norm_sampling
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.vectors import Vectors

Share = Callable[[Sequence[float]], list[float]]  # the numbers as rank 0 has them


@dataclass
class NormWindow:
    """Adds up the watched entries of layers whose regime is to be decided, and tells the controller when it is due."""

    ops: Ops
    controller: Controller
    seed: int
    share: Share
    summed: dict[str, Tensor] = field(default_factory=dict)

    @property
    def asked(self) -> bool:
        return bool(self.controller.measured)

    def add(self, estimate: Vectors) -> None:
        """A step's gradient estimate, equal on all ranks."""
        for name, value in zip(self.controller.layers, estimate, strict=True):
            if name in self.controller.measured:
                seen = self._entries(name, value)
                self.summed[name] = self.summed[name] + seen if name in self.summed else seen

    def _entries(self, name: str, value: Tensor) -> Tensor:
        flat = self.ops.reshape(value, (-1,))
        count = self.controller.layers[name].numel
        size = self.controller.watched(name, count)
        if size == count:
            return flat
        return self.ops.take(flat, norm_sampling.entries(self.ops, name, count, size, self.seed, flat))

    def check(self) -> None:
        """Between steps: new regimes from the norms that are due."""
        names = self.controller.due()
        if not names:
            return
        sums = [self.summed.pop(name, None) for name in names]
        norms = [0.0 if x is None else float(self.ops.sum(x * x, 0, keepdims=False)) ** 0.5 for x in sums]
        self.controller.observe(dict(zip(names, self.share(norms), strict=True)), 1.0)
