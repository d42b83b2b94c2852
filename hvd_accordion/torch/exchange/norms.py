"""Sums of the averaged gradients' watched entries since a window's start, and their norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from hvd_accordion.ops import torch as ops
from hvd_accordion.policy import norm_sampling


class NormWindow:
    """Adds up what a rule wants to know the norms of.

    Args:
        watched: of a layer's name and its number of entries, how many of them are watched.
        seed: of which they are.
    """

    def __init__(self, watched: Callable[[str, int], int], seed: int) -> None:
        self.watched, self.seed = watched, seed
        self.summed: dict[str, torch.Tensor] = {}
        self.entries: dict[str, torch.Tensor | None] = {}  # which are watched; None: all

    def add(self, means: Mapping[str, torch.Tensor], ok: torch.Tensor, weight: int) -> None:
        """Adds the watched entries of averaged gradients times `weight`, if the step was sound."""
        if not means or (ops.is_on_cpu(ok) and not ok):
            return
        seen = ops.upcast([self._of(name, mean) for name, mean in means.items()])
        if not ops.is_on_cpu(ok):
            seen = ops.unflatten(torch.where(ok, ops.flatten(seen), 0.0), seen)
        sums = [self.summed.setdefault(name, torch.zeros_like(x)) for name, x in zip(means, seen, strict=True)]
        torch._foreach_add_(sums, seen, alpha=weight)

    def _of(self, name: str, mean: torch.Tensor) -> torch.Tensor:
        """The watched entries of a layer, as a vector."""
        flat = mean.reshape(-1)
        if name not in self.entries:
            count = flat.numel()
            size = self.watched(name, count)
            self.entries[name] = (
                norm_sampling.entries(ops, name, count, size, self.seed, flat) if size < count else None
            )
        entries = self.entries[name]
        return flat if entries is None else ops.take(flat, entries)

    def norms(self, names: Iterable[str]) -> list[float]:
        """Of these layers, whose sums start anew; 0 where nothing was added."""
        sums = [self.summed.pop(name, None) for name in names]
        norms = [torch.linalg.vector_norm(x).double().cpu() if x is not None else torch.zeros(()) for x in sums]
        return [*map(float, norms)]

    def load(self, saved: Mapping[str, torch.Tensor], params: Mapping[str, torch.Tensor]) -> None:
        """Takes up saved sums; not those of other entries than are watched now."""
        sizes = {name: self.watched(name, params[name].numel()) for name in saved}
        fitting = {name: x for name, x in saved.items() if x.shape == (sizes[name],)}
        self.summed = {name: x.detach().to(params[name].device, copy=True) for name, x in fitting.items()}
