"""Seconds of steps and of exchanges, from which AutoSteps chooses."""

from __future__ import annotations

import statistics
import time

EXCHANGES = 3  # of each fragment; the first warms up


class Clock:
    """Times what a training does.

    Args:
        fragments: exchanges of which the model needs one of each.
    """

    def __init__(self, fragments: int) -> None:
        self.fragments = fragments
        self.steps: list[float] = []
        self.exchanges: list[float] = []
        self._step_began: float | None = None
        self._step_ended = self._waited = 0.0

    def step_ends(self) -> None:
        """What comes until `step_begins` is the exchange."""
        self._step_ended = time.perf_counter()
        if self._step_began is not None:
            self.steps.append(self._step_ended - self._step_began)

    def step_begins(self, exchanged: int) -> None:
        """`exchanged`: how many fragments were since the step ended. With a delay they are waited for after later steps."""
        self._step_began = time.perf_counter()
        self._waited += self._step_began - self._step_ended
        if exchanged:
            self.exchanges += [self._waited / exchanged] * exchanged
            self._waited = 0.0

    @property
    def is_done(self) -> bool:
        return len(self.exchanges) >= EXCHANGES * self.fragments and bool(self.steps)

    def seconds(self) -> list[float]:
        """Of a step, and of an exchange of the whole model."""
        return [statistics.median(self.steps), self.fragments * statistics.median(self.exchanges[self.fragments :])]
