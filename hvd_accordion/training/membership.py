"""How an optimizer stands to the other ranks: whether all are known to be alike, and which of them tells the logger."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hvd_accordion.training import elastic
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.reports import Logger


class Membership:
    """Begins unknown to the others. In an elastic job every change of the ranks leads back there.

    Args:
        logger: the user's, as every rank was given it.
        logged: the run's parameters, of the number of ranks.
        state: how the user makes an elastic state, for a message.
    """

    def __init__(self, logger: Logger | None, logged: Callable[[int], Mapping[str, object]], state: str) -> None:
        self.agreed = False
        self._logger, self._logged, self._state = logger, logged, state
        self._told = False

    def agree(self, controller: Controller, rank: int | None, size: int) -> None:
        """All ranks are alike: they may exchange. The first of them tells the logger; None is the rank of an outsider."""
        self.agreed = True
        if rank != 0 or self._logger is None:
            return
        controller.log_to(self._logger)
        if not self._told:
            self._logger.start(self._logged(size))
            self._told = True

    def move(self, controller: Controller, size: int) -> None:
        """Ranks were gathered anew. ValueError where they can't share a small batch evenly."""
        self.agreed = False
        controller.move(size, None)

    def check(self) -> None:
        """RuntimeError where an exchange would reach ranks that are not known to be alike."""
        if not self.agreed:
            raise elastic.unsynchronised("a DistributedOptimizer", self._state)
