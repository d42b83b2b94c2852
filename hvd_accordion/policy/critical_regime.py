"""Accordion's rule: names whose gradient norm changed much are critical, the others relaxed. Floats in, regimes out.

Agarwal, Wang, Lee, Venkataraman, Papailiopoulos, "Accordion: Adaptive Gradient Communication via Critical Learning
Regime Identification", MLSys 2021, Algorithm 1.
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Mapping
from typing import Any

from hvd_accordion.utils import validation

log = logging.getLogger("hvd_accordion")

NORM_SAMPLES = (
    8192  # entries of a layer: with them examples/benchmarks/norm_agreement.py finds 99 of 100 regimes the same
)


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


class Rule:
    """The settings and the memory of one who decides by the rule; a dataclass below it declares the settings."""

    eta: float
    interval: int
    unit: str
    lr_drop: float
    norm: str

    # what it has seen: the norms and the rate at the last check, the regimes that follow from them
    norms: dict[str, float]
    ratios: dict[str, float]
    regimes: dict[str, Regime]
    lr: float | None

    def _begin(self) -> None:
        """Checks the settings; nothing is seen yet."""
        self.eta = validation.real("eta", self.eta, 0.0)
        self.interval = validation.integer("interval", self.interval, 1)
        self.unit = validation.choice("unit", self.unit, ("epochs", "steps"))
        self.lr_drop = validation.real("lr_drop", self.lr_drop, 0.0, 1.0, open_high=True)
        self.norm = validation.choice("norm", self.norm, ("sampled", "exact"))
        self.norms, self.ratios, self.regimes, self.lr = {}, {}, {}, None

    def _told(self) -> str:
        """The settings that matter most, for a line of a report."""
        norm = "" if self.norm == "sampled" else f", {self.norm} norm"
        return f"eta={self.eta:g}, every {self.interval} {self.unit}{norm}"

    @property
    def needs_epochs(self) -> bool:
        """Whether it comes to nothing where nobody tells of epochs."""
        return self.unit == "epochs"

    def regime(self, name: str) -> Regime:
        return self.regimes.get(name, Regime.CRITICAL)

    def watched(self, count: int) -> int:
        """How many of a layer's `count` entries its norm is made of."""
        return min(count, NORM_SAMPLES) if self.norm == "sampled" else count

    def measures(self, epoch: int) -> bool:
        """Whether gradients of this epoch (counted from 0) are summed: with `unit="steps"` always, else before a check."""
        return self.unit == "steps" or epoch % self.interval == 0

    def _decide(self, norms: Mapping[str, float], lr: float) -> None:
        """A check: new regimes of these names."""
        dropped = self._dropped(lr)
        first = not self.norms
        for name, norm in norms.items():
            if not math.isfinite(norm):
                log.warning("Accordion: gradient norm of %s is %s; it counts as critical", name, norm)
            previous = self.norms.get(name)
            ratio = math.inf if previous is None else change(previous, norm)
            calm = ratio < self.eta and not dropped and not first
            self.regimes[name] = Regime.RELAXED if calm else Regime.CRITICAL
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
        self.regimes = {name: Regime(regime) for name, regime in state["regimes"].items()}
        self.lr = None if state["lr"] is None else float(state["lr"])
