"""Accordion: the more a layer's gradient norm changes, the less the layer is compressed.

Agarwal, Wang, Lee, Venkataraman, Papailiopoulos, "Accordion: Adaptive Gradient Communication via Critical Learning
Regime Identification", MLSys 2021, Algorithm 1. Floats in, regimes out: no tensors, no framework.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hvd_accordion.compression import CompressionSpec, PowerSGD
from hvd_accordion.policy.auto import Auto
from hvd_accordion.policy.critical_regime import Regime, Rule, change, level_of
from hvd_accordion.policy.protocol import Policy, policy_of

__all__ = ["Accordion", "Regime", "change"]


@dataclass
class Accordion(Rule, Policy):
    """Which of two or more compressions each layer gets, decided at every check from the change of its gradient's norm.

    A layer whose norm changed by `eta` or more since the last check (either way) is critical, else relaxed. All layers
    are critical up to the first comparison, and again from a drop of the learning rate until the next check.

    With L `levels` the thresholds are eta, eta / 2, ..., eta / 2^(L - 2): level i, the first one with
    change >= eta / 2^i, holds; below all thresholds the last. Level 0 is "critical", the last "relaxed", level i between
    them "level i/(L - 1)". For L = 2 this is the paper's rule. More levels only refine its relaxed regime: no layer is
    ever compressed more than by `Accordion(levels[0], levels[-1])`. The thresholds are geometric because the change is a
    ratio, and so are the levels' sizes.

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
        levels: instead of these two, at least two specs from the least compression to the strongest; the last may be an
            `Auto`.
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
    levels: Sequence[CompressionSpec | Auto] | None = None

    def __post_init__(self) -> None:
        if self.levels is not None:
            self._take(self.levels)
        given = self.levels or (self.critical, self.relaxed)
        names = ["critical", "relaxed"] if self.levels is None else [f"levels[{i}]" for i in range(len(given))]
        for name, level in zip(names, given, strict=True):
            if not isinstance(level, CompressionSpec | Auto if name == names[-1] else CompressionSpec):
                auto = ", or Auto()" if name == names[-1] else ""
                raise TypeError(
                    f"{name} must be a compression spec such as PowerSGD(4), TopK(0.01) or Dense(){auto}, got {level!r}"
                )
        self._levels = tuple(map(policy_of, given))
        self.candidates = self._levels[-1].candidates
        self._begin(len(given))

    def _take(self, levels: Sequence[CompressionSpec | Auto]) -> None:
        """Makes the first of them the critical level, and the last the relaxed one."""
        if isinstance(levels, CompressionSpec | Policy) or len(levels) < 2:
            raise ValueError(f"levels must hold at least two compression specs, got {levels!r}")
        self.levels = tuple(levels)
        ends = self.levels[0], self.levels[-1]
        if (self.critical, self.relaxed) not in (ends, (PowerSGD(rank=4), PowerSGD(rank=1))):
            raise ValueError(
                "levels takes the place of critical and relaxed: pass it alone, "
                f"got critical={self.critical!r}, relaxed={self.relaxed!r}, levels={levels!r}"
            )
        self.critical, self.relaxed = ends  # type: ignore[assignment]

    def __str__(self) -> str:
        if self.levels is None:
            return f"Accordion(critical={self.critical}, relaxed={self.relaxed}, {self._shown()})"
        return f"Accordion(levels=[{', '.join(map(str, self.levels))}], {self._shown()})"

    def spec(self, layer: str) -> CompressionSpec | Auto:
        return (self.levels or (self.critical, self.relaxed))[self.level(layer)]

    def level(self, layer: str) -> int:
        """The layer's level now: 0 is critical."""
        return level_of(self.regime(layer), len(self._levels))

    def specs(self, layer: str) -> Sequence[CompressionSpec]:
        return tuple(spec for level in self._levels for spec in level.specs(layer))

    def choose(self, layer: str, step: int, epoch: int) -> CompressionSpec:
        return self._levels[self.level(layer)].choose(layer, step, epoch)

    def resolve(self, chosen: Mapping[str, CompressionSpec]) -> None:
        for level in self._levels:
            level.resolve(chosen)

    def observe(self, norms: Mapping[str, float], lr: float) -> Mapping[str, str]:
        """The regime of every layer, from its gradient norm over the window that ends now. Once per check.

        Args:
            norms: layer name -> norm of its summed gradient; the same numbers on every rank.
            lr: the learning rate now.
        """
        self._decide(norms, lr)
        return dict(self.regimes)

    def settings(self) -> dict[str, object]:
        shown: dict[str, object] = {key: getattr(self, key) for key in ("eta", "interval", "unit", "lr_drop", "norm")}
        shown |= {"critical": str(self.critical), "relaxed": str(self.relaxed)}
        return shown if self.levels is None else {**shown, "levels": ", ".join(map(str, self.levels))}
