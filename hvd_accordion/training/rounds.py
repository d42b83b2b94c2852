"""Rounds: which fragments are exchanged after which local step, when windows and epochs end. Integers and floats only."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hvd_accordion.policy.local_steps import AutoSteps, LocalSteps
from hvd_accordion.training.counters import MAX_STEPS_OF_EPOCH, no_epochs

COUNTS = ("step", "position", "epoch", "step_of_epoch", "window", "rate_sum", "rates", "chosen")


@dataclass(frozen=True)
class AfterStep:
    """What follows a step.

    Args:
        fragments: numbers of those whose exchange begins now.
        window_ends: whether the rule is to observe its norm when all of them are exchanged.
        epoch_ends: whether the epoch has had all of its steps.
    """

    fragments: tuple[int, ...] = ()
    window_ends: bool = False
    epoch_ends: bool = False


class Rounds:
    """Counts the steps of a training with local steps.

    Args:
        settings: the user's; a rule is copied: its state is this training's.
        steps_per_epoch: steps after which an epoch ends by itself; None: only `end_epoch` ends one.
    """

    def __init__(self, settings: LocalSteps, steps_per_epoch: int | None = None) -> None:
        self.settings, self.steps_per_epoch = settings, steps_per_epoch
        self.rule = copy.deepcopy(settings.rule)
        self.step = self.epoch = self.step_of_epoch = self.window = 0
        self.position = 0  # steps since the round began; rounds of fragments begin later, by their offsets
        self.chosen = 0  # by AutoSteps; 0: not yet
        self.rate_sum, self.rates = 0.0, 0  # learning rates of the window's steps

    @property
    def every(self) -> int:
        """Steps between two exchanges of a fragment now."""
        every = self.settings.every
        if isinstance(every, AutoSteps):
            return self.chosen or every.least
        return every if isinstance(every, int) else self.rule.steps  # type: ignore[union-attr]

    @property
    def times(self) -> AutoSteps | None:
        """What waits for the seconds of steps and exchanges."""
        every = self.settings.every
        return every if isinstance(every, AutoSteps) and not self.chosen else None

    @property
    def measures(self) -> bool:
        """Whether a window is open."""
        return self.rule is not None and self.rule.window is not None and self.rule.window.is_open(self.epoch)

    def stepped(self, lr: float) -> AfterStep:
        """Counts a step that was made at this learning rate; says what follows.

        Raises ValueError if the rule counts in epochs and no end of an epoch was signalled for too long.
        """
        self.step += 1
        self.step_of_epoch += 1
        self.position += 1
        self.rate_sum, self.rates = self.rate_sum + lr, self.rates + 1
        if self.rule is not None:
            self.rule.observe_lr(lr)
        if self._by_epochs and self.steps_per_epoch is None and self.epoch == 0 and self.step > MAX_STEPS_OF_EPOCH:
            raise ValueError(no_epochs())
        epoch_ends = self.steps_per_epoch is not None and self.step_of_epoch >= self.steps_per_epoch
        by_steps = self.measures and self.rule is not None and self.rule.unit == "steps"
        window_ends = by_steps and self.rates >= self.rule.interval  # type: ignore[union-attr]
        if window_ends or epoch_ends:
            return AfterStep(self.all(), window_ends or (epoch_ends and self._by_epochs), epoch_ends)
        due = tuple(k for k in self.all() if due_at(self.position, k, self.settings.fragments, self.every))
        return AfterStep(due)

    @property
    def _by_epochs(self) -> bool:
        return self.rule is not None and self.rule.unit == "epochs" and self.measures

    def all(self) -> tuple[int, ...]:
        return tuple(range(self.settings.fragments))

    def end_epoch(self) -> AfterStep:
        """What an end of the epoch brings; nothing if one has just ended. `next_epoch` counts it."""
        if self.step_of_epoch == 0:
            return AfterStep()
        return AfterStep(self.all(), self._by_epochs, True)

    def window_begins(self, after: AfterStep) -> bool:
        """Whether a window begins with the step that comes after this one; an end of an epoch may lie within a window."""
        begins = after.epoch_ends if self.rule is not None and self.rule.unit == "epochs" else after.window_ends
        return begins and self.measures

    def restart(self) -> None:
        """All fragments have been exchanged: rounds begin anew."""
        self.position = 0

    def next_epoch(self) -> None:
        self.epoch += 1
        self.step_of_epoch = 0
        if self.rule is not None and self.rule.unit == "epochs":
            self.rate_sum, self.rates = 0.0, 0

    def observe(self, displacement: float, lr: float) -> float:
        """The window ends: how far the common parameters moved, the learning rate now. Returns the norm that counted."""
        assert self.rule is not None
        norm = displacement / self.rate_sum if self.rate_sum > 0 else displacement
        self.rule.observe(norm, lr)
        self.window += 1
        self.rate_sum, self.rates = 0.0, 0
        return norm

    def metrics(self) -> dict[str, float]:
        """What it does now, for a logger."""
        found = {"local_steps": float(self.every)}
        return found if self.rule is None else {**found, "critical_steps": float(self.rule.is_critical)}

    def line(self) -> str:
        """The same in words, for a report."""
        regime = "" if self.rule is None else " (critical)" if self.rule.is_critical else " (relaxed)"
        return f"local steps: an exchange every {self.every} steps{regime}"

    def state_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in COUNTS}
        return {**counts, "rule": None if self.rule is None else self.rule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """All or nothing, should `state` be broken. A rule without saved state starts anew."""
        counts = {name: type(getattr(self, name))(state[name]) for name in COUNTS}
        rule = copy.deepcopy(self.settings.rule)
        if rule is not None and state["rule"] is not None:
            rule.load_state_dict(state["rule"])
        vars(self).update(counts)
        self.rule = rule


def due_at(position: int, fragment: int, fragments: int, every: int) -> bool:
    """Whether a fragment is exchanged after so many steps of a round: at offset + i `every`, offset = k `every` / K."""
    offset = fragment * every // fragments
    return (position - offset) % every == 0 and position > 0


def fragments_of(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Cuts layers, in their order, into at most `count` parts of near to equal size: by the middle of each layer."""
    total, before = sum(sizes.values()), 0
    parts: list[list[str]] = [[] for _ in range(count)]
    for name, size in sizes.items():
        middle = before + size / 2
        parts[min(count - 1, int(middle * count / total)) if total else 0].append(name)
        before += size
    return parts
