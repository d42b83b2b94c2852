"""How far the common parameters move in a window: the norm that decides how many local steps there are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hvd_accordion.ops import torch as ops
from hvd_accordion.policy import norm_sampling
from hvd_accordion.policy.window import Window
from hvd_accordion.torch.local_steps.fragment import Fragment


class Displacement:
    """||a(now) - a(start)|| of the fragments' anchors, from some entries of each: see `norm_sampling`.

    Args:
        seed: decides which entries.
    """

    def __init__(self, window: Window, seed: int) -> None:
        self.window, self.seed = window, seed
        self.before: dict[str, torch.Tensor] = {}  # empty where no window is open

    def begin(self, fragments: Sequence[Fragment]) -> None:
        """A window starts now."""
        self.before = {key: self._sampled(name, x) for key, name, x in anchors_of(fragments)}

    def norm(self, fragments: Sequence[Fragment]) -> float:
        """The norm since `begin`. Waits for the device."""
        parts = []
        for key, name, x in anchors_of(fragments):
            if key in self.before:
                now = self._sampled(name, x)
                parts.append((now - self.before[key]).norm().double() * norm_sampling.scale(x.numel(), now.numel()))
        return math.hypot(*torch.stack([x.cpu() for x in parts]).tolist()) if parts else 0.0

    def _sampled(self, name: str, x: torch.Tensor) -> torch.Tensor:
        count = x.numel()
        size = self.window.sample_size(count)
        if size == count:
            return x.detach().flatten().clone()
        return ops.take(x.detach().flatten(), norm_sampling.entries(ops, name, count, size, self.seed, x))


def anchors_of(fragments: Sequence[Fragment]) -> list[tuple[str, str, torch.Tensor]]:
    """Key, name and anchor of each layer; names may be the same in two optimizers."""
    return [(f"{i}.{name}", name, x) for i, part in enumerate(fragments) for name, x in part.anchor.items()]
