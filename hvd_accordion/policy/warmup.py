"""Warmup: little compression in the first steps, when gradients change fast, then more and more.

Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression", ICLR 2018, arXiv 1712.01887, section 3.3.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from hvd_accordion.compression import CompressionSpec, Dense
from hvd_accordion.policy.protocol import Policy
from hvd_accordion.utils import validation


@dataclass(frozen=True)
class Warmup(Policy):
    """Dense gradients, or levels that tighten, for the first steps; then `spec`.

    With `levels=0` all gradients are dense before step `steps`. With `levels=n` >= 1 level i = 0, ..., n - 1 holds from step
    ceil(i steps / n) on, and `spec` from step `steps` on:

    * a spec with a ratio r (`TopK`, `RandomK`): ratio start (r / start)^(i / n), an exponential fall from `start`. For
      r = 0.001, n = 4: 25 %, 6.3 %, 1.6 %, 0.4 %, then 0.1 %. DGC has these five over its first four epochs.
    * a spec with a rank r (`PowerSGD`): rank 2^(n - i) r. For r = 1, n = 3: 8, 4, 2, then 1.

    A layer for which a level would not shrink the message travels dense as long as that level holds. Residuals and factors
    are kept from level to level. In TensorFlow the graph holds an exchange for each level.

    Args:
        spec: the compression after the warm-up, lossy.
        steps: updates of the warm-up, >= 1, and >= `levels`; with an `AccordionBatchSize` micro-batches.
        levels: number of levels before `spec`, >= 0; 0: dense.
        start: the first ratio, in (0, 1], more than that of `spec`; only for specs with a ratio.

    Raises ValueError or TypeError for what is out of range, or for levels of a spec with neither ratio nor rank.
    """

    spec: CompressionSpec
    steps: int
    levels: int = 0
    start: float = 0.25

    def __post_init__(self) -> None:
        if not isinstance(self.spec, CompressionSpec) or not self.spec.lossy:
            raise TypeError(f"spec must be a lossy compression spec such as TopK(0.001), got {self.spec!r}")
        self._keep(steps=validation.integer("steps", self.steps, 1))
        self._keep(levels=validation.integer("levels", self.levels, 0))
        self._keep(start=validation.real("start", self.start, 0.0, 1.0))
        if self.levels > self.steps:
            raise ValueError(f"levels must be at most steps={self.steps}, got {self.levels}")
        names = {f.name for f in fields(self.spec)}
        if self.levels and not names & {"ratio", "rank"}:
            raise ValueError(
                f"levels must be 0 for a spec with neither ratio nor rank, got {self.levels} for {self.spec}"
            )
        if self.levels and "ratio" in names and self._number("ratio") >= self.start:
            raise ValueError(f"start must be more than the ratio of {self.spec}, got {self.start}")

    def _keep(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _number(self, name: str) -> Any:
        return getattr(self.spec, name)

    def __str__(self) -> str:
        how = f"{self.levels} levels" if self.levels else "dense"
        return f"Warmup({self.spec}, {how} for {self.steps} steps)"

    def _looser(self, level: int) -> CompressionSpec:
        """The spec of a level of the warm-up."""
        changes: dict[str, Any] = {}
        if hasattr(self.spec, "ratio"):
            changes["ratio"] = self.start * (self._number("ratio") / self.start) ** (level / self.levels)
        else:
            changes["rank"] = self._number("rank") * 2 ** (self.levels - level)
        return replace(self.spec, **changes)

    @property
    def schedule(self) -> tuple[tuple[int, CompressionSpec], ...]:
        """(first step, spec) of each level, in the order of time."""
        if not self.levels:
            return (0, Dense()), (self.steps, self.spec)
        firsts = [-(-i * self.steps // self.levels) for i in range(self.levels)]
        return (*((first, self._looser(i)) for i, first in enumerate(firsts)), (self.steps, self.spec))

    def specs(self, layer: str) -> Sequence[CompressionSpec]:
        del layer
        return tuple(spec for _, spec in self.schedule)

    def choose(self, layer: str, step: int, epoch: int) -> CompressionSpec:
        del layer, epoch
        *_, spec = itertools.takewhile(lambda level: level[0] <= step, self.schedule)
        return spec[1]

    def next_change(self, step: int) -> int | None:
        return next((first for first, _ in self.schedule if first > step), None)

    def settings(self) -> dict[str, object]:
        return {"warmup.steps": self.steps, "warmup.levels": self.levels, "warmup.spec": str(self.spec)}
