"""Counters: steps, epochs and windows of one training, and its running totals."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hvd_accordion.policy.window import Window
from hvd_accordion.training.reports import Stats

log = logging.getLogger("hvd_accordion")

MAX_STEPS_OF_EPOCH = 10_000  # of a first epoch that only end_epoch() can end

COUNTS = ("step", "epoch", "step_of_epoch", "window")


def no_epochs() -> str:
    """The error of a training that needs ends of epochs and has none."""
    return (
        f"steps_per_epoch is None and end_epoch() was not called in {MAX_STEPS_OF_EPOCH} steps, but an Accordion "
        "counts epochs and would never leave its initial regime or learning rate: pass steps_per_epoch=len(loader), "
        'call optimizer.end_epoch() after each epoch, or use Accordion(..., unit="steps")'
    )


@dataclass
class _Silence:
    """Whether a training that needs ends of epochs has had one; `unlogged`: whether a logger still waits for the first."""

    steps: int = 0
    broken: bool = False
    unlogged: bool = False

    def warn(self) -> None:
        if self.steps and self.unlogged:
            log.warning(
                "logger: no epoch ended in %d steps, so no metrics of epochs were logged: pass steps_per_epoch or call "
                "end_epoch()",
                self.steps,
            )
        if self.steps and not self.broken:
            log.warning(
                "An Accordion counts epochs, but no epoch ended in %d steps: pass steps_per_epoch or call end_epoch(). "
                "It never left its initial regime or learning rate",
                self.steps,
            )


class Counters:
    """Counts updates. A step is a call of the optimizer's `step()`; an update and its exchange may come with the last of
    several.

    Args:
        steps_per_epoch: steps after which an epoch ends by itself; None: only `end_epoch` ends one.
    """

    def __init__(self, steps_per_epoch: int | None) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.step = self.epoch = self.step_of_epoch = self.window = 0
        self.last_update_steps = 1  # steps of the last update
        self.stats, self._epoch_start = Stats(), Stats()
        self._silence = _Silence()
        weakref.finalize(self, self._silence.warn)

    def count(self, added: Stats, last_update_steps: int, needs_epochs: bool) -> None:
        """Adds `added.steps` steps, of which none but the last ends an epoch or a window.

        Raises ValueError if a policy needs ends of epochs and there was none for too long.
        """
        self.stats.add(added)
        self.last_update_steps = last_update_steps
        self.step += added.steps
        self.step_of_epoch += added.steps
        silent = needs_epochs and self.steps_per_epoch is None
        self._silence.steps = self.step
        self._silence.broken = self._silence.broken or not silent
        if silent and self.epoch == 0 and self.step_of_epoch > MAX_STEPS_OF_EPOCH:
            raise ValueError(no_epochs())

    def logged(self) -> None:
        """A logger waits for ends of epochs."""
        self._silence.unlogged = self.epoch == 0 and self.steps_per_epoch is None

    @property
    def epoch_is_over(self) -> bool:
        """Whether the epoch has had all of its steps."""
        return self.steps_per_epoch is not None and self.step_of_epoch >= self.steps_per_epoch

    def has_begun(self, window: Window) -> bool:
        """Whether the last update was the first of the window (of the epoch, where it counts epochs)."""
        if window.unit == "epochs":
            return self.step_of_epoch == self.last_update_steps
        return (self.step - self.last_update_steps) % window.interval == 0

    def ends_with_step(self, window: Window) -> bool:
        """Whether the last update was the last of a window that counts steps."""
        return window.unit == "steps" and self.step % window.interval == 0

    def ends_with_epoch(self, window: Window) -> bool:
        """Whether the end of this epoch ends a window that counts epochs."""
        return window.unit == "epochs" and window.is_open(self.epoch)

    def end_epoch(self) -> Stats:
        """The next epoch begins. Returns the totals of the one that ends."""
        done = self.stats.since(self._epoch_start)
        self._epoch_start = replace(self.stats)
        self.epoch += 1
        self.step_of_epoch = 0
        self._silence.broken = True
        self._silence.unlogged = False
        return done

    def state_dict(self) -> dict[str, Any]:
        counts = {key: getattr(self, key) for key in COUNTS}
        return {**counts, "stats": dict(vars(self.stats)), "epoch_start": dict(vars(self._epoch_start))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """All or nothing, should `state` be broken."""
        counts = {key: int(state[key]) for key in COUNTS}
        stats, epoch_start = Stats(**state["stats"]), Stats(**state["epoch_start"])
        vars(self).update(counts)
        self.stats, self._epoch_start = stats, epoch_start
        self._silence.broken = self._silence.broken or self.epoch > 0
