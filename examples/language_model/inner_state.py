"""An experiment: the state of the ranks' own optimizers is averaged too, when their parameters are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def average(hvd: Any, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Gives the moments of all optimizers their means over the ranks, uncompressed."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    tensors = [x for state in states for x in state.values() if torch.is_tensor(x) and x.ndim]
    means = hvd.grouped_allreduce(tensors, name="inner_state")
    torch._foreach_copy_(tensors, means)
