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
    def batch(self, name: str, last: torch.Tensor | None, divisor: float, dtype: torch.dtype) -> torch.Tensor | None:
        """What was added and the last gradient, over `divisor`; None where there is neither. Gives up the sum."""
        total = self.sums.pop(name, None)
        if total is None:
            return last if last is None or divisor == 1 else last / divisor
        if last is not None:
            total = total + last if last.is_sparse or total.is_sparse else total.add_(last)
        return (total / divisor if total.is_sparse else total.div_(divisor)).to(dtype)

    def clear(self) -> None:
        self.count, self.sums = 0, {}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sums": dict(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any], params: Mapping[str, torch.nn.Parameter]) -> None:
        self.count = int(state["count"])
        self.sums = {name: x.detach().to(params[name].device, copy=True) for name, x in state["sums"].items()}


def wide(grad: torch.Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 else torch.float32
