"""Accordion: little compression in critical regimes, strong compression elsewhere, per layer.

Agarwal, Wang, Lee, Venkataraman, Papailiopoulos, "Accordion: Adaptive Gradient Communication via Critical Learning
Regime Identification", MLSys 2021, Algorithm 1. Floats in, regimes out: no tensors, no framework.
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hvd_accordion import checks
from hvd_accordion.auto import Auto
from hvd_accordion.compression import CompressionSpec, PowerSGD

log = logging.getLogger("hvd_accordion")

WATCHED = 8192  # entries of a layer: with them examples/benchmarks/norm_agreement.py finds 99 of 100 regimes the same


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


@dataclass
class Accordion:
    """Which of two compressions each layer gets, decided anew at every check from the change of its gradient's norm.

    A layer whose norm changed by `eta` or more since the last check (either way) is critical, else relaxed. All layers
    are critical up to the first comparison, and again from a drop of the learning rate until the next check.

    The norm is that of the sum of the averaged gradients over one epoch (`unit="epochs"`: checks after epoch 1,
    1 + interval, 1 + 2 interval, ..., as in the authors' code) or over `interval` steps (`unit="steps"`).

    With `norm="sampled"` it is estimated from m = 8,192 of the layer's d entries s, always the same ones:
    sqrt(d / m) ||(s_1, ..., s_m)||. Its square is unbiased over seeds, its relative standard error about
    sqrt((k - 1) (1 - m / d) / (4 m)), where k = d sum(s^4) / sum(s^2)^2 (3 for Gaussian entries: 0.8 %). Much of that
    cancels in the change from one check to the next, for the entries stay. Layers of up to m entries are measured exactly.
    Where few entries hold most of the norm (k in the hundreds: an embedding, over windows of few small batches), "exact"
    decides otherwise more often.

    Args:
        critical: compression in the critical regime; little of it (`PowerSGD(rank=4)`).
        relaxed: compression elsewhere; strong (`PowerSGD(rank=1)`). Any two specs, also of different kinds, or an `Auto`
            here, which compresses only where that pays.
        eta: threshold on the relative change, > 0; higher means less often critical.
        interval: distance of two checks, >= 1.
        unit: what `interval` counts, "epochs" or "steps".
        lr_drop: a learning rate of at most this share of that at the last check makes every layer critical, in (0, 1).
        norm: "sampled" keeps and adds up m entries of each layer, "exact" all: as much memory as the gradients take.
    """

    critical: CompressionSpec = field(default_factory=lambda: PowerSGD(rank=4))
    relaxed: CompressionSpec | Auto = field(default_factory=lambda: PowerSGD(rank=1))
    eta: float = 0.5
    interval: int = 10
    unit: str = "epochs"
    lr_drop: float = 0.5
    norm: str = "sampled"

    # what it has seen: the norms and the rate at the last check, the regimes that follow from them
    norms: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    ratios: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    regimes: dict[str, Regime] = field(default_factory=dict, init=False, repr=False, compare=False)
    lr: float | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, allowed in (("critical", CompressionSpec), ("relaxed", CompressionSpec | Auto)):
            if not isinstance(getattr(self, name), allowed):
                auto = ", or Auto()" if name == "relaxed" else ""
                raise TypeError(
                    f"{name} must be a compression spec such as PowerSGD(4), TopK(0.01) or Dense(){auto}, "
                    f"got {getattr(self, name)!r}"
                )
        self.eta = checks.real("eta", self.eta, 0.0)
        self.interval = checks.integer("interval", self.interval, 1)
        self.unit = checks.choice("unit", self.unit, ("epochs", "steps"))
        self.lr_drop = checks.real("lr_drop", self.lr_drop, 0.0, 1.0, open_high=True)
        self.norm = checks.choice("norm", self.norm, ("sampled", "exact"))

    def __str__(self) -> str:
        every = f"{self.interval} {self.unit}"
        norm = "" if self.norm == "sampled" else f", {self.norm} norm"
        return f"Accordion(critical={self.critical}, relaxed={self.relaxed}, eta={self.eta:g}, every {every}{norm})"

    def regime(self, layer: str) -> Regime:
        return self.regimes.get(layer, Regime.CRITICAL)

    def spec(self, layer: str) -> CompressionSpec | Auto:
        return self.critical if self.regime(layer) is Regime.CRITICAL else self.relaxed

    def watched(self, count: int) -> int:
        """How many of a layer's `count` entries its norm is made of."""
        return min(count, WATCHED) if self.norm == "sampled" else count

    def measures(self, epoch: int) -> bool:
        """Whether gradients of this epoch (counted from 0) are summed: with `unit="steps"` always, else before a check."""
        return self.unit == "steps" or epoch % self.interval == 0

    def observe(self, norms: Mapping[str, float], lr: float) -> Mapping[str, Regime]:
        """The regime of every layer, from its gradient norm over the window that ends now. Once per check.

        Args:
            norms: layer name -> norm of its summed gradient; the same numbers on every rank.
            lr: the learning rate now.
        """
        dropped = self._dropped(lr)
        first = not self.norms
        for layer, norm in norms.items():
            if not math.isfinite(norm):
                log.warning("Accordion: gradient norm of %s is %s; it counts as critical", layer, norm)
            previous = self.norms.get(layer)
            ratio = math.inf if previous is None else change(previous, norm)
            calm = ratio < self.eta and not dropped and not first
            self.regimes[layer] = Regime.RELAXED if calm else Regime.CRITICAL
            if previous is not None:
                self.ratios[layer] = ratio
            self.norms[layer] = float(norm)
        self.lr = float(lr)
        return dict(self.regimes)

    def observe_lr(self, lr: float) -> bool:
        """Makes every layer critical until the next check if the learning rate dropped; tells whether it did."""
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
            "regimes": {layer: str(regime) for layer, regime in self.regimes.items()},
            "lr": self.lr,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.norms = {layer: float(norm) for layer, norm in state["norms"].items()}
        self.ratios = {layer: float(ratio) for layer, ratio in state["ratios"].items()}
        self.regimes = {layer: Regime(regime) for layer, regime in state["regimes"].items()}
        self.lr = None if state["lr"] is None else float(state["lr"])
