"""Accordion's rule: the more the norm of a gradient changed, the less it is compressed. Floats in, regimes out.

Agarwal, Wang, Lee, Venkataraman, Papailiopoulos, "Accordion: Adaptive Gradient Communication via Critical Learning
Regime Identification", MLSys 2021, Algorithm 1.
"""

from __future__ import annotations

import enum
import logging
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from hvd_accordion.policy.window import Window
from hvd_accordion.utils import validation

log = logging.getLogger("hvd_accordion")


class Regime(str, enum.Enum):
    CRITICAL = "critical"
    RELAXED = "relaxed"

    def __str__(self) -> str:
        return self.value


def change(previous: float, now: float) -> float:
    """|previous - now| / previous, the relative change of a gradient norm; infinite where it has no meaning.

    A zero previous norm, NaN and Inf give infinity: what can't be measured counts as critical.
    """
    if previous == 0 or not math.isfinite(previous) or not math.isfinite(now):
        return math.inf
    return abs(previous - now) / previous


def regime_of(level: int, levels: int) -> str:
    """The word for level 0 ("critical"), levels - 1 ("relaxed") or one between ("level 1/3"), among `levels` >= 2."""
    last = levels - 1
    return Regime.CRITICAL if level == 0 else Regime.RELAXED if level == last else f"level {level}/{last}"


def relaxation(regime: str) -> Fraction:
    """0 of "critical", 1 of "relaxed", i/n of "level i/n". ValueError for any other word."""
    if regime in set(Regime):
        return Fraction(int(regime == Regime.RELAXED))
    found = re.fullmatch(r"level (\d+)/(\d+)", regime)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise ValueError(f"a regime must be critical, relaxed or level i/n, got {regime!r}")
    return Fraction(int(found[1]), int(found[2]))


def level_of(regime: str, levels: int) -> int:
    """The level that a word stands for; of a word from another number of levels the next one that compresses less."""
    return math.floor(relaxation(regime) * (levels - 1))


def level_for(ratio: float, eta: float, levels: int) -> int:
    """The least i with ratio >= eta / 2^i, at most levels - 1."""
    return next((i for i in range(levels - 1) if ratio >= eta / 2**i), levels - 1)


class Rule:
    """The settings and the memory of one who decides by the rule; a dataclass below it declares the settings."""

    eta: float
    interval: int
    unit: str
    lr_drop: float
    norm: str

    window: Window | None
    needs_epochs: bool

    # what it has seen: the norms and the rate at the last check, the regimes that follow from them
    norms: dict[str, float]
    ratios: dict[str, float]
    regimes: dict[str, str]
    lr: float | None

    def _begin(self, count: int = 2) -> None:
        """Checks the settings; nothing is seen yet. `count`: of levels."""
        self.count = count
        self.eta = validation.real("eta", self.eta, 0.0)
        self.window = window = Window(self.interval, self.unit, self.norm)
        self.interval, self.unit, self.norm = window.interval, window.unit, window.norm
        self.needs_epochs = self.unit == "epochs"
        self.lr_drop = validation.real("lr_drop", self.lr_drop, 0.0, 1.0, open_high=True)
        self.norms, self.ratios, self.regimes, self.lr = {}, {}, {}, None

    def _shown(self) -> str:
        """The settings that matter most, for a line of a report."""
        norm = "" if self.norm == "sampled" else f", {self.norm} norm"
        return f"eta={self.eta:g}, every {self.interval} {self.unit}{norm}"

    def regime(self, name: str) -> str:
        return self.regimes.get(name, Regime.CRITICAL)

    def change(self, name: str) -> float | None:
        """The relative change of the norm at the last check; None before the first comparison."""
        return self.ratios.get(name)

    def _decide(self, norms: Mapping[str, float], lr: float) -> None:
        """A check: new regimes of these names."""
        dropped = self._dropped(lr)
        first = not self.norms
        for name, norm in norms.items():
            if not math.isfinite(norm):
                log.warning("Accordion: gradient norm of %s is %s; it counts as critical", name, norm)
            previous = self.norms.get(name)
            ratio = math.inf if previous is None else change(previous, norm)
            ratio_for_level = math.inf if dropped or first else ratio
            self.regimes[name] = regime_of(level_for(ratio_for_level, self.eta, self.count), self.count)
            if previous is not None:
                self.ratios[name] = ratio
            self.norms[name] = float(norm)
        self.lr = float(lr)

    def observe_lr(self, lr: float) -> bool:
        """Makes every name critical until the next check if the learning rate dropped; tells whether it did."""
        if self.lr is None:
            self.lr = float(lr)
        if not self._dropped(lr):
            return False
        self.regimes = dict.fromkeys(self.regimes, Regime.CRITICAL)
        self.lr = float(lr)
        return True

    def _dropped(self, lr: float) -> bool:
        return self.lr is not None and lr <= self.lr_drop * self.lr and lr < self.lr

    def state_dict(self) -> dict[str, Any]:
        """Plain dicts, strings and floats."""
        return {
            "norms": dict(self.norms),
            "ratios": dict(self.ratios),
            "regimes": {name: str(regime) for name, regime in self.regimes.items()},
            "lr": self.lr,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.norms = {name: float(norm) for name, norm in state["norms"].items()}
        self.ratios = {name: float(ratio) for name, ratio in state["ratios"].items()}
        self.regimes = {name: self._known(regime) for name, regime in state["regimes"].items()}
        self.lr = None if state["lr"] is None else float(state["lr"])

    def _known(self, regime: str) -> str:
        """A saved word as one of its own."""
        return regime_of(level_of(regime, self.count), self.count)
