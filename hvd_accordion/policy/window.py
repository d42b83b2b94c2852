"""Window: over which steps gradients are summed before a policy learns their norms."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_accordion.utils import validation

# entries of a layer: with them examples/benchmarks/norm_agreement.py finds 99 of 100 regimes the same
NORM_SAMPLES = 8192


@dataclass(frozen=True)
class Window:
    """A policy observes the norm of each layer's averaged gradient, summed over a window, when the window ends.

    Args:
        interval: distance of two observations, >= 1.
        unit: "steps": a window is `interval` steps. "epochs": it is one epoch, the first and then every `interval`-th.
        norm: "sampled": of at most 8,192 entries of a layer; "exact": of all, which takes a gradient's memory.

    Raises ValueError or TypeError for what is out of range.
    """

    interval: int = 1
    unit: str = "epochs"
    norm: str = "sampled"

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", validation.integer("interval", self.interval, 1))
        object.__setattr__(self, "unit", validation.choice("unit", self.unit, ("epochs", "steps")))
        object.__setattr__(self, "norm", validation.choice("norm", self.norm, ("sampled", "exact")))

    def is_open(self, epoch: int) -> bool:
        """Whether gradients of this epoch (counted from 0) are summed: always with "steps", else before a check."""
        return self.unit == "steps" or epoch % self.interval == 0

    def sample_size(self, count: int) -> int:
        """How many of a layer's `count` entries the norm is made of."""
        return min(count, NORM_SAMPLES) if self.norm == "sampled" else count
