"""What follows an update: the numbers that are due go from one rank to all, and the controller decides from them."""

from __future__ import annotations

from collections.abc import Callable

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.comm.transport import Transport
from hvd_accordion.torch.exchange.agreement import from_rank_0
from hvd_accordion.torch.exchange.norms import GradientNorms
from hvd_accordion.training.controller import Controller


class Decisions:
    """Of the controller, on all ranks alike.

    Args:
        lr: gives the learning rate of now.
        norms: of the gradients since the window's start.
    """

    def __init__(self, controller: Controller, lr: Callable[[], float], norms: GradientNorms, prefix: Prefix) -> None:
        self.controller, self.lr, self.norms, self.prefix = controller, lr, norms, prefix

    def count(self, transport: Transport, sent: float, seconds: float, steps: int, source: int) -> None:
        """Counts an update of so many steps, and an epoch that ends with it. `source`: the rank whose rate counts."""
        ended = self.controller.advance(sent, seconds, steps)
        if self.controller.wants_lr:
            (lr,) = from_rank_0([self.lr()], f"{self.prefix}.lr", transport, source)
            self.controller.observe_lr(lr)
        if ended:
            self.controller.end_epoch()

    def decide(self, transport: Transport, source: int) -> None:
        """Between steps: new levels from the norms that are due. `source`: the rank whose norms count."""
        names = self.controller.due()
        all_names = list(self.controller.layers) if self.controller.model_norm_due else []
        if names or all_names:
            mine = [*self.norms.take(names, all_names), self.lr()]
            *shared, lr = from_rank_0(mine, f"{self.prefix}.norms", transport, source)
            norms = dict(zip(names, shared, strict=False))
            self.controller.observe(norms, lr, dict(zip(all_names, shared[len(names) :], strict=True)))
