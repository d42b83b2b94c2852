"""AccordionBatchSize: small batches in critical regimes, large ones elsewhere, by accumulating micro-batches locally.

Agarwal, Wang, Lee, Venkataraman, Papailiopoulos, "Accordion", MLSys 2021, arXiv 2010.16248: the batch-size variant. No
tensors, no framework.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hvd_accordion.policy.critical_regime import Regime, Rule
from hvd_accordion.utils import validation

MODEL = "whole model"  # the one name that it decides on


@dataclass
class AccordionBatchSize(Rule):
    """The global batch size, decided anew at every check from the change of the whole model's gradient norm.

    The loader yields micro-batches of `small` / ranks examples on each rank, always. While the model is critical each of
    them makes an update; else large / small of them add up locally, and their mean is exchanged and applied as one.
    `Accordion`'s rule decides when it grows: a norm that changed by `eta` or more since the last check (either way) is
    critical, so is everything up to the first comparison. Once large it stays so, whatever the norm does, as in the published
    runs: larger batches at a larger rate change the norm by themselves. What makes it small again, until the next check, is
    a drop of the learning rate, or a norm that is not finite.

    Learning rate. An update of k micro-batches is made at the user's own rate times lr_scale(epoch) k / (large / small),
    where lr_scale goes linearly from 1 in the epoch in which the batch grew to large / small `warmup` epochs later
    (512 -> 4096: 1, 2.4, 3.8, 5.2, 6.6, 8), and is 1 again as soon as the batch shrinks. So in a last, shorter group every
    micro-batch counts for as much as in a full one.

    Norm. That of the sum over the window of the averaged gradients of all layers, each weighted by its number of
    micro-batches, so that windows before and after a change of the batch compare. Of each layer it takes the entries that
    `Accordion` would, with `norm="sampled"` 8,192; layers with sparse gradients are left out.

    Args:
        small: examples of a small global batch, a multiple of the number of ranks.
        large: examples of a large one, a multiple of `small` and more.
        eta: threshold on the relative change, > 0; higher means larger batches.
        interval: distance of two checks, >= 1.
        unit: what `interval` counts, "epochs" or "steps" (micro-batches).
        lr_drop: a learning rate of at most this share of that at the last check makes the batch small, in (0, 1).
        norm: "sampled" or "exact", as `Accordion`'s.
        warmup: epochs over which the rate grows after the batch did, >= 0; 0: at once.

    Raises ValueError or TypeError for what is out of range.
    """

    small: int
    large: int
    eta: float = 0.5
    interval: int = 10
    unit: str = "epochs"
    lr_drop: float = 0.5
    norm: str = "sampled"
    warmup: int = 5

    def __post_init__(self) -> None:
        self.small = validation.integer("small", self.small, 1)
        self.large = validation.integer("large", self.large, 2)
        if self.large <= self.small or self.large % self.small:
            raise ValueError(f"large must be a multiple of small={self.small} and more than that, got {self.large}")
        self.warmup = validation.integer("warmup", self.warmup, 0)
        self._begin()
        self.needs_epochs = self.unit == "epochs" or self.warmup > 0
        self.grown = 0  # the epoch in which the batch last grew

    def __str__(self) -> str:
        return f"AccordionBatchSize({self.small}, {self.large}, {self._shown()}, warmup={self.warmup})"

    @property
    def factor(self) -> int:
        """Micro-batches of a large batch."""
        return self.large // self.small

    @property
    def passes(self) -> int:
        """Micro-batches of a batch now."""
        return 1 if self.regime(MODEL) is Regime.CRITICAL else self.factor

    def lr_scale(self, epoch: int) -> float:
        """What the user's learning rate is multiplied with in this epoch for a full batch: 1 + (factor - 1) t / warmup.

        t is the number of epochs since the batch grew, at most `warmup`.
        """
        if self.passes == 1:
            return 1.0
        share = min(1.0, max(0, epoch - self.grown) / self.warmup) if self.warmup else 1.0
        return 1.0 + (self.factor - 1) * share

    def observe(self, norm: float, lr: float, epoch: int) -> str:
        """The regime of the model, from its gradient norm over the window that ends now. Once per check.

        Args:
            norm: of the summed gradient, the same number on every rank.
            lr: the user's learning rate now.
            epoch: the first one in which a larger batch counts, from 0.
        """
        before, stays = self.passes, math.isfinite(norm) and not self._dropped(lr)
        self._decide({MODEL: norm}, lr)
        if before > 1 and stays:
            self.regimes[MODEL] = Regime.RELAXED
        if self.passes > before:
            self.grown = epoch
        return self.regime(MODEL)

    def metrics(self, epoch: int) -> dict[str, float]:
        """What it does in this epoch, for a logger."""
        size, critical = self.small * self.passes, self.passes == 1
        return {"batch_size": float(size), "lr_scale": self.lr_scale(epoch), "critical_batch": float(critical)}

    def line(self, epoch: int) -> str:
        """The same in words."""
        made = f"{self.passes} micro-batch{'es' if self.passes > 1 else ''} of {self.small:,}"
        scale = f"learning rate x{self.lr_scale(epoch):.4g}"
        return f"batch size {self.small * self.passes:,} ({self.regime(MODEL)}): {made}, {scale}"

    def fits(self, ranks: int) -> None:
        """ValueError where the ranks can't share a small batch evenly."""
        if self.small % ranks:
            raise ValueError(f"batch_size: small must be a multiple of the {ranks} ranks, got {self.small}")

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grown": self.grown}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.grown = int(state["grown"])


def whole_norm(parts: Iterable[float]) -> float:
    """The norm of a vector from those of its parts: the root of the sum of their squares."""
    return math.hypot(*parts)


def limits(passes: Any, step: Any, of_epoch: Any, steps_per_epoch: int | None, intervals: Iterable[int]) -> list[Any]:
    """Numbers of micro-batches; the least of them is what the update to come is made of.

    No more than `passes`, and none that would go beyond the end of the epoch or of a window of `intervals` steps. Counts
    may be a framework's integers.
    """
    ends = [] if steps_per_epoch is None else [steps_per_epoch - of_epoch]
    return [passes, *ends, *(interval - step % interval for interval in intervals)]
