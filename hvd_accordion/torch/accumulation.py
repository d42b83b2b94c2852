"""Gradients of several micro-batches, added up locally until the batch is complete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class LocalSums:
    """Keeps sums apart from the gradients, which are the user's to zero and to clip after every micro-batch.

    Half-precision gradients are added up, and divided, in fp32.
    """

    def __init__(self) -> None:
        self.count = 0  # micro-batches in the sums
        self.sums: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, params: Mapping[str, torch.nn.Parameter]) -> None:
        """Takes the gradients of a micro-batch."""
        for name, p in params.items():
            if p.grad is None or not p.requires_grad:
                continue
            if name in self.sums:
                self.sums[name] += p.grad
            else:
                self.sums[name] = p.grad.detach().to(wide(p.grad), copy=True)
        self.count += 1

    @torch.no_grad()
    def merge(self, name: str, p: torch.nn.Parameter) -> None:
        """Makes `.grad` the mean of the gradients that were added and of the last one, which it holds."""
        if self.count == 0:
            return
        total, passes = self.sums.pop(name, None), self.count + 1
        if p.grad is None:
            if total is not None:
                p.grad = (total / passes).to(p.dtype)
            return
        if total is None:
            p.grad.div_(passes)
        elif p.grad.is_sparse:
            p.grad = ((total + p.grad) / passes).to(p.dtype)
        else:
            p.grad.copy_(total.add_(p.grad).div_(passes))

    @torch.no_grad()
    def settle(self, params: Mapping[str, torch.nn.Parameter]) -> None:
        """Makes `.grad` the mean of what was added, whatever it holds, and forgets the sums."""
        for name, p in params.items():
            if name not in self.sums:
                p.grad = None
                continue
            mean = (self.sums[name] / self.count).to(p.dtype)
            if p.grad is None or p.grad.is_sparse:
                p.grad = mean
            else:
                p.grad.copy_(mean)
        self.clear()

    def clear(self) -> None:
        self.count, self.sums = 0, {}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sums": dict(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any], params: Mapping[str, torch.nn.Parameter]) -> None:
        self.count = int(state["count"])
        self.sums = {name: x.detach().to(params[name].device, copy=True) for name, x in state["sums"].items()}


def wide(grad: torch.Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 else torch.float32
