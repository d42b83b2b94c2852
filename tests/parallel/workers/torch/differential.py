"""User scripts of tests/differential/scripts under plain Horovod and under this package: the same, or conserved and equal."""

from __future__ import annotations

import copy
from typing import Any

import horovod.torch as horovod
import pytest
import torch

import hvd_accordion.torch as hvd
from tests.differential.harness import EXACT, LOSSY, Horovod, Script
from tests.differential.scripts.torch_common import TORCH
from tests.differential.scripts.torch_scripts import *  # noqa: F403
from tests.differential.torch_ledger import Ledger, install
from tests.parallel.workers.torch.common import assert_ranks_equal


def trained(script: Script, module: Any, **options: Any) -> torch.Tensor:
    """Everything that the script returns, as one vector."""
    torch.manual_seed(0)
    found = script.train(Horovod(module, options))
    tensors = list(found.state_dict().values()) if isinstance(found, torch.nn.Module) else found
    return torch.cat([x.detach().double().reshape(-1) for x in tensors])


class ByHand:
    """Averages each gradient by an allreduce of its own in `step()`, or behind the closure."""

    def __getattr__(self, name: str) -> Any:
        return getattr(horovod, name)

    def DistributedOptimizer(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> torch.optim.Optimizer:
        class Averaging(type(optimizer)):  # type: ignore[misc]
            def step(self, closure: Any = None) -> Any:
                if closure is None:
                    self.average()
                    return super().step()
                return super().step(lambda: (torch.enable_grad()(closure)(), self.average())[0])

            step.hooked = True  # torch calls hooks in the step below

            def average(self) -> None:
                for i, p in enumerate(p for group in self.param_groups for p in group["params"] if p.requires_grad):
                    mine = torch.zeros_like(p) if p.grad is None else p.grad.to_dense().contiguous()
                    mean = horovod.allreduce(mine, op=horovod.Average, name=f"by.hand.{i}")
                    kept = p.grad is not None and not p.grad.is_sparse and p.grad.is_contiguous()
                    p.grad = p.grad.copy_(mean) if kept else mean

        result = Averaging.__new__(Averaging)
        result.__dict__.update(optimizer.__dict__)
        return result


@pytest.mark.parametrize("script", TORCH.values(), ids=lambda script: script.name)
def test_script(script, monkeypatch):
    expected = trained(script, ByHand() if script.horovod_fails else horovod)
    exact = {"dense": EXACT["dense"]} if script.horovod_fails else EXACT
    for mode, compression in exact.items():
        error = (trained(script, hvd, compression=compression) - expected).abs().max()
        assert error <= script.tolerance, f"{mode} differs from Horovod by {float(error)}"
    for mode, compression in LOSSY.items():
        ledger = Ledger()
        install(monkeypatch, lambda ledger=ledger: ledger)
        assert_ranks_equal(trained(script, hvd, compression=copy.deepcopy(compression)), mode)
        if script.conserves:
            lost = ledger.lost(lambda x, name: horovod.allreduce(x, op=horovod.Average, name=name))
            assert max(lost.values()) <= 1e-5, f"{mode} lost {lost}"
        monkeypatch.undo()
