"""What the gradients are that parameters hold between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Evaluation:
    """Tells new gradients from those that the user's `synchronize()` has averaged.

    Args:
        fresh: whether a backward pass has come since the last exchange.
        averaged: the gradients as `synchronize()` left them, until the next step; None where it was not called.
        further: whether the next exchange belongs to a step that is counted already, as a closure's later ones do.
    """

    fresh: bool = False
    averaged: Mapping[str, Any] | None = None
    further: bool = False

    def begin(self, further: bool = False) -> None:
        """What comes now are new gradients."""
        self.averaged, self.further = None, further

    def keep(self, params: Mapping[str, torch.Tensor]) -> None:
        self.averaged = {name: p.grad for name, p in params.items()}

    @property
    def synchronized(self) -> bool:
        return self.averaged is not None and not self.fresh

    def has_new(self, params: Mapping[str, torch.Tensor]) -> bool:
        """Whether this rank holds other gradients than those that were averaged."""
        kept = self.averaged or {}
        return self.fresh or any(p.grad is not kept.get(name) for name, p in params.items())
