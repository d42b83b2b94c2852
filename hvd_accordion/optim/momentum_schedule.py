"""When 1-bit Adam and 0/1 Adam exchange what: pure functions of counts, which may be scalar tensors."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from hvd_accordion.utils import validation

STABLE = 0.96  # of 1-bit Adam's paper, section 7.1
MARKS = 10  # measurements of the second moment within the steps that its change is measured over


@dataclass(frozen=True)
class Schedule:
    """Steps of three kinds.

    * dense: gradients are averaged dense, and both moments follow the mean.
    * momentum: first moments are averaged, compressed.
    * local: nothing is sent.

    In the warm-up a dense step comes `variance_interval` steps after the last, and the others are momentum steps. Afterwards
    the second moment is frozen. A momentum step comes `exchange_interval` steps after the last, and the others are local.

    Args:
        warmup_steps: of the warm-up, >= 1; None: until the second moment has become stable, see `is_stable`.
        kappa: dense steps after which their distance doubles, >= 1; None: every step of the warm-up is dense.
        double_every: steps after the warm-up after which the distance of momentum steps doubles, >= 1.
        max_interval: the largest distance of momentum steps, >= 1.
    """

    warmup_steps: int | None = None
    kappa: int | None = None
    double_every: int = 1
    max_interval: int = 1

    def __post_init__(self) -> None:
        if self.warmup_steps is not None:
            validation.integer("warmup_steps", self.warmup_steps, 1)
        if self.kappa is not None:
            validation.integer("kappa", self.kappa, 1)
        validation.integer("double_every", self.double_every, 1)
        validation.integer("max_interval", self.max_interval, 1)

    def variance_interval(self, updates: Any) -> Any:
        """Steps from a dense step to the next: 2^floor(j / kappa) from number j on, which is `updates` - 1."""
        return 1 if self.kappa is None else 2 ** (greatest(updates - 1, 0) // self.kappa)

    def exchange_interval(self, steps: Any) -> Any:
        """Steps from a momentum step to the next, `steps` after the warm-up."""
        doublings = least(steps // self.double_every, self.max_interval.bit_length())
        return least(2**doublings, self.max_interval)


class Kind(enum.IntEnum):
    """What a step exchanges, see `Schedule`."""

    DENSE = 0
    MOMENTUM = 1
    LOCAL = 2


@dataclass
class Counts:
    """Where a training stands in its schedule, equal on all ranks.

    Attributes:
        step: steps so far.
        updates: dense steps so far.
        since_dense, since_exchange: steps since the last dense step, and since parameters were last equal on all ranks.
        warmup: steps of the warm-up, once it has ended; -1 before.
        norms: ||v||_1 at the last measurements, oldest first; 0 where there were none.
    """

    step: int = 0
    updates: int = 0
    since_dense: int = 0
    since_exchange: int = 0
    warmup: int = -1
    norms: list[float] = field(default_factory=lambda: [0.0] * (MARKS + 1))

    def kind(self, schedule: Schedule) -> Kind:
        """Of the step to come."""
        if self.warmup < 0:
            is_dense = self.since_dense + 1 >= schedule.variance_interval(self.updates)
            return Kind.DENSE if is_dense else Kind.MOMENTUM
        return Kind.MOMENTUM if self.since_exchange + 1 >= self.interval(schedule) else Kind.LOCAL

    def interval(self, schedule: Schedule) -> int:
        """Steps from an exchange to the next."""
        return 1 if self.warmup < 0 else int(schedule.exchange_interval(self.step - self.warmup))

    def advance(self, schedule: Schedule, kind: Kind) -> None:
        """Counts a step."""
        self.step += 1
        self.updates += kind is Kind.DENSE
        self.since_dense = 0 if kind is Kind.DENSE else self.since_dense + 1
        self.since_exchange = self.since_exchange + 1 if kind is Kind.LOCAL else 0
        if self.warmup < 0 and self.step == schedule.warmup_steps:
            self.warmup = self.step

    def is_mark(self, schedule: Schedule, interval: int) -> bool:
        """Whether the second moment is to be measured after the step that was counted last."""
        return self.warmup < 0 and schedule.warmup_steps is None and self.step % interval == 0

    def measured(self, norm: float) -> None:
        """Takes ||v||_1 of now, equal on all ranks; ends the warm-up where it has become stable."""
        self.norms = [*self.norms[1:], norm]
        if is_stable(self.norms[0], norm):
            self.warmup = self.step


def least(a: Any, b: Any) -> Any:
    """The smaller of two whole numbers."""
    return (a + b - abs(a - b)) // 2


def greatest(a: Any, b: Any) -> Any:
    """The larger of two whole numbers."""
    return (a + b + abs(a - b)) // 2


def mark_interval(beta2: float) -> int:
    """Steps between two measurements of the second moment; `MARKS` of them are about 1 / (1 - beta2) steps."""
    return max(1, round(1 / (1 - beta2) / MARKS))


def is_stable(before: Any, now: Any) -> Any:
    """Whether the second moment has changed little over `MARKS` measurements, about 1 / (1 - beta2) steps.

    The rule of 1-bit Adam (arXiv 2102.02888, section 7.1), ||v_t||_1 / ||v_(t - 1/(1 - beta2))||_1 >= 0.96, taken of v
    corrected for its start at 0, and in both directions: neither may be less than 0.96 of the other.

    Args:
        before, now: ||v||_1; `before` is 0 where there was no measurement.
    """
    return (now > 0) & (now >= STABLE * before) & (before >= STABLE * now)
