"""A small network, its batches, and a training loop, the same in all workers."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import hvd_accordion.torch as hvd
from hvd_accordion import QSGD, Accordion, Dense, PowerSGD, TopK
from tests.parallel import reference

SPECS = {
    **reference.SPECS,
    "accordion": Accordion(interval=1, eta=0.1),
    "accordion-kinds": Accordion(critical=Dense(), relaxed=TopK(0.02), interval=4, unit="steps", eta=0.5),
    "globs": {"0.*": QSGD(7), "*.weight": Accordion(QSGD(7), PowerSGD(1), interval=2, unit="steps"), "*": None},
}


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(7)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 24, 3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(24 * 4 * 4, 48),
        torch.nn.Tanh(),
        torch.nn.Linear(48, 48),
        torch.nn.Tanh(),
        torch.nn.Linear(48, 48),
        torch.nn.Tanh(),
        torch.nn.Linear(48, 10),
    )
    return net.to(dtype)


def batch(step: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, 1, 14, 14, generator=g).to(dtype), torch.randint(0, 10, (8,), generator=g)


def loss_of(
    net: torch.nn.Module, step: int, rank: int | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    x, y = batch(step, hvd.rank() if rank is None else rank, dtype)
    return torch.nn.functional.cross_entropy(net(x).float(), y)


def sgd(net: torch.nn.Module, **options: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), **{"lr": 0.05, "momentum": 0.9, **options})


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, passes: int = 1) -> None:
    for step in steps:
        optimizer.zero_grad()
        for i in range(passes):
            loss_of(net, step * passes + i).backward()
        optimizer.step()


def checkpointed(name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    net = model()
    options = {"compression": SPECS[name], "steps_per_epoch": 4}
    return net, hvd.DistributedOptimizer(sgd(net), net.named_parameters(), **options)


def checkpoint(name: str, what: str, rank: int | None = None) -> Path:
    return Path(os.environ["CHECKPOINTS"]) / f"{name}.{what}.{hvd.rank() if rank is None else rank}.pt"


def flat(net: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in net.parameters()])


def assert_ranks_equal(x: torch.Tensor, what: object = "") -> None:
    everyone = hvd.allgather(x.reshape(1, -1), name="ranks.equal")  # unnamed ones are numbered per rank
    assert torch.isfinite(everyone).all(), what
    for other in everyone[1:]:
        assert torch.equal(everyone[0], other), f"ranks differ: {what}"
