"""Layers whose gradients come later than at the first step: dense, or sparse."""

from __future__ import annotations

import torch
from torch import nn

from tests.differential.scripts.torch_common import batches, loss_of, network, script


class Mixed(nn.Module):
    """The network, and a table that is looked up where `looks_up` says so."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.net = network()
        torch.manual_seed(4)
        self.table = nn.Embedding(40, 24, sparse=sparse)
        self.looks_up = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x + self.table(x.abs().argmax(1)) if self.looks_up else x)


def trained(hvd, net, optimizer, steps):
    """`net.looks_up` of each step in `steps`."""
    for (x, y), net.looks_up in zip(batches(hvd, len(steps)), steps, strict=True):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.step()
    return net


def of(hvd, net, parameters=None):
    optimizer = torch.optim.SGD(net.parameters() if parameters is None else parameters, lr=0.1)
    return hvd.DistributedOptimizer(optimizer, net.named_parameters())


@script(horovod_fails="it has sent zeros of another kind")
def sparse_table_that_is_looked_up_later(hvd):
    net = Mixed()
    return trained(hvd, net, of(hvd, net), [False, False, True, False, True])


@script(horovod_fails="it has sent zeros of another kind")
def sparse_table_that_one_rank_looks_up_first(hvd):
    net = Mixed()
    return trained(hvd, net, of(hvd, net), [False, hvd.rank() == 1, True, hvd.rank() == 0, False])


@script(horovod_fails="it hooks the parameters that can be trained when it is made")
def sparse_table_that_is_unfrozen_later(hvd):
    net = Mixed()
    net.table.requires_grad_(False)
    optimizer = of(hvd, net)
    trained(hvd, net, optimizer, [True, True])
    net.table.requires_grad_(True)
    trained(hvd, net, optimizer, [False, True])
    net.table.requires_grad_(False)
    trained(hvd, net, optimizer, [True])
    net.table.requires_grad_(True)
    return trained(hvd, net, optimizer, [True, True])


@script(horovod_fails="it knows of no parameters that come later")
def sparse_table_that_is_added_later(hvd):
    net = Mixed()
    optimizer = of(hvd, net, net.net.parameters())
    trained(hvd, net, optimizer, [False, False])
    optimizer.add_param_group({"params": net.table.parameters(), "lr": 0.2})
    return trained(hvd, net, optimizer, [True, True])


@script(horovod_fails="its zeros are dense for good")
def sparse_table_whose_gradient_was_zeros(hvd):
    net = Mixed()
    optimizer = of(hvd, net)
    for (x, y), net.looks_up in zip(batches(hvd, 5), [False, False, True, True, False], strict=True):
        net.zero_grad(set_to_none=net.looks_up)
        loss_of(net, x, y).backward()
        optimizer.step()
    return net


@script
def dense_layer_that_is_used_later(hvd):
    net = Mixed(sparse=False)
    return trained(hvd, net, of(hvd, net), [False, False, True, False, True])
