"""The learning rate of a torch optimizer: as policies see it, and scaled for one update of a larger batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def largest_rate(optimizer: torch.optim.Optimizer | None) -> float:
    """The largest of the groups'; 1 for an optimizer without."""
    groups = optimizer.param_groups if optimizer is not None else []
    return max((float(group["lr"]) for group in groups if "lr" in group), default=1.0)


@contextmanager
def batch_rate(optimizer: torch.optim.Optimizer) -> Iterator[Callable[[], None]]:
    """Yields what scales the rates of all groups for the batch that was exchanged last; at the end they are the user's.

    A rate that the update itself changes stays changed, in the user's terms: it is divided by the scale. Where there is
    nothing to scale no rate is touched.
    """
    engine = optimizer._hvd  # type: ignore[attr-defined]
    scaled: list[tuple[dict[str, Any], Any, float]] = []

    def scale() -> None:
        factor, engine.participation.lr_scale = engine.participation.lr_scale, 1.0
        if factor != 1.0:
            for group in optimizer.param_groups:
                if "lr" in group:
                    scaled.append((group, group["lr"], factor))
                    group["lr"] = group["lr"] * factor

    try:
        yield scale
    finally:
        for group, rate, factor in scaled:
            group["lr"] = unscaled(group["lr"], rate, factor)


def unscaled(now: Any, rate: Any, factor: float) -> Any:
    """The user's rate after an update at `rate` times `factor` that left `now`: `rate` itself where nothing changed it."""
    if isinstance(now, torch.Tensor):
        new = torch.where(now == rate * factor, rate, now / factor)
        return rate.copy_(new) if isinstance(rate, torch.Tensor) else new  # a compiled step knows the tensor
    return rate if now == rate * factor else now / factor
