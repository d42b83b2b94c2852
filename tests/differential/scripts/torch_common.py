"""What torch scripts share: a small network, batches of this rank, a loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tests.differential.harness import Script, register

TORCH: dict[str, Script] = {}
script = register(TORCH)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 4))


def sgd(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), **{"lr": 0.1, **options})


def batches(hvd: Any, steps: int, width: int = 24) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of this rank; the global generator stays as it is."""
    for step in range(steps):
        g = torch.Generator().manual_seed(1000 * step + hvd.rank())
        yield torch.randn(6, width, generator=g), torch.randint(0, 4, (6,), generator=g)


def loss_of(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(net(x), y)


def wrapped(hvd: Any, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network under SGD, distributed."""
    net = network()
    return net, hvd.DistributedOptimizer(sgd(net), named_parameters=net.named_parameters(), **options)


def train(hvd: Any, net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6) -> nn.Module:
    for x, y in batches(hvd, steps):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.step()
    return net
