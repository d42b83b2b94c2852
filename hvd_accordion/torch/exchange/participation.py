"""Which ranks take part in the update under way, and what that makes of a mean over the ranks."""

from __future__ import annotations

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.comm.transport import Transport
from hvd_accordion.torch.exchange.turnout import Turnout, Turnouts
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.settings import Settings


class Participation:
    """Of this rank and the others; all ranks alike, and without a message, where each has a gradient for every update.

    Attributes:
        turnouts: exchange the ranks' parts; None where all ranks always come.
        turnout: the ranks' parts in the update under way, as far as they are known.
        writes: whether this rank's optimizer steps after the update.
        last_update_steps: micro-batches of the last update, in the mean over the ranks.
        lr_scale: of the update that was exchanged last.
    """

    def __init__(
        self, settings: Settings, controller: Controller, prefix: Prefix, transport: Transport, included: bool
    ) -> None:
        self.settings, self.controller, self.size = settings, controller, transport.size
        uneven = included and (settings.uneven_inputs or settings.batch_size is not None)
        self.turnouts = Turnouts(prefix, transport) if uneven else None
        self.begin()
        self.last_update_steps = self.lr_scale = 1.0

    def begin(self, turnout: Turnout | None = None, own: bool = True) -> None:
        """`own`: whether this rank has a gradient of now, or only what waits."""
        self.turnout = turnout
        self.writes = own or (turnout is not None and turnout.all_wait)

    def announce(self, count: int, further: bool) -> None:
        """Sends that this rank comes with `count` micro-batches, unless the others' parts are known."""
        if self.turnouts is not None and self.turnout is None:
            self.turnouts.start(count, new=True, further=further)

    def happens(self, count: int, new: bool, further: bool) -> bool:
        """Whether any rank has a new gradient for the update; waits for their parts."""
        assert self.turnouts is not None
        self.turnouts.start(count, new=new, further=further)
        self.turnout = self.turnouts.finish()
        return self.turnout.happens

    def factor(self, divisor: float) -> float:
        """What the mean over the ranks of sums over `divisor` is multiplied with; waits for the ranks' parts."""
        if self.turnouts is None:
            return 1.0
        if self.turnout is None:
            self.turnout = self.turnouts.finish()
        if self.settings.batch_size is None:
            return 1.0
        mean = self.last_update_steps = self.turnout.mean
        self.lr_scale = self.controller.lr_scale * (mean / self.controller.batch.passes)
        return self.size * divisor / self.turnout.total

    @property
    def steps_and_source(self) -> tuple[int, int]:
        """The steps that the update counts for, and the number of the rank whose numbers all take."""
        return (1, 0) if self.turnout is None else (max(self.turnout.counts), self.turnout.leader)
