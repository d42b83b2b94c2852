"""What follows an update: the numbers that are due go from one rank to all, and the controller decides from them."""

from __future__ import annotations

from collections.abc import Callable

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.comm.transport import Transport
from hvd_accordion.torch.exchange.agreement import from_rank_0
from hvd_accordion.torch.exchange.norms import GradientNorms
from hvd_accordion.training.controller import Controller, Due


class Decisions:
    """Of the controller, on all ranks alike.

    Args:
        lr: gives the learning rate of now.
        norms: of the gradients since the window's start.
    """

    def __init__(self, controller: Controller, lr: Callable[[], float], norms: GradientNorms, prefix: Prefix) -> None:
        self.controller, self.lr, self.norms, self.prefix = controller, lr, norms, prefix

    def decide(self, due: Due, transport: Transport, source: int) -> None:
        """Between steps: new levels from the numbers that are due. `source`: the rank whose numbers count."""
        names, all_names = due.layers, list(self.controller.layers) if due.model else []
        if not due.needs_lr:
            self.controller.decide(due)
            return
        mine = [*self.norms.take(names, all_names), self.lr()]
        *shared, lr = from_rank_0(mine, f"{self.prefix}.norms", transport, source)
        norms = dict(zip(names, shared, strict=False))
        self.controller.decide(due, lr, norms, dict(zip(all_names, shared[len(names) :], strict=True)))
