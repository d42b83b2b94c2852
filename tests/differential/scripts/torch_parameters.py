"""Parameters: frozen, unused, shared, sparse, of odd shapes and dtypes, with hooks of the user's."""

from __future__ import annotations

import torch
from torch import nn

from tests.differential.scripts.torch_common import batches, loss_of, network, script, sgd, train, wrapped


def trained(hvd, net, steps=6, **options):
    return train(hvd, net, hvd.DistributedOptimizer(sgd(net), net.named_parameters(), **options), steps)


@script
def frozen_from_the_start(hvd):
    net = network()
    net[0].requires_grad_(False)
    return trained(hvd, net)


@script(horovod_fails="it hooks the parameters that can be trained when it is made")
def unfrozen_before_the_first_step(hvd):
    net = network()
    net[0].requires_grad_(False)
    optimizer = hvd.DistributedOptimizer(sgd(net), net.named_parameters())
    net[0].requires_grad_(True)
    return train(hvd, net, optimizer)


@script
def frozen_on_the_way(hvd):
    net, optimizer = wrapped(hvd)
    train(hvd, net, optimizer, 3)
    optimizer.zero_grad()
    net[2].requires_grad_(False)
    return train(hvd, net, optimizer, 3)


@script
def a_parameter_that_nothing_uses(hvd):
    net = network()
    net.spare = nn.Parameter(torch.ones(40, 40))
    net.forward = lambda x, layers=list(net): nn.Sequential(*layers)(x)
    return trained(hvd, net)


@script
def a_branch_in_every_other_step(hvd):
    net, side = network(), nn.Linear(24, 4)
    both = nn.ModuleList([net, side])
    optimizer = hvd.DistributedOptimizer(sgd(both), both.named_parameters())
    for step, (x, y) in enumerate(batches(hvd, 6)):
        optimizer.zero_grad()
        out = net(x) + side(x) if step % 2 else net(x)
        nn.functional.cross_entropy(out, y).backward()
        optimizer.step()
    return both


@script(horovod_fails="its zero_grad() has no set_to_none")
def a_branch_on_one_rank_only(hvd):
    net, side = network(), nn.Linear(24, 4)
    both = nn.ModuleList([net, side])
    optimizer = hvd.DistributedOptimizer(sgd(both), both.named_parameters())
    for step, (x, y) in enumerate(batches(hvd, 6)):
        optimizer.zero_grad(set_to_none=False)
        out = net(x) + side(x) if (step + hvd.rank()) % 2 else net(x)
        nn.functional.cross_entropy(out, y).backward()
        optimizer.step()
    return both


@script
def tied_weights(hvd):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))
    net[2].weight = net[0].weight
    return trained(hvd, net)


@script
def one_layer_twice(hvd):
    torch.manual_seed(3)
    layer = nn.Linear(24, 24)
    return trained(hvd, nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(24, 4)))


@script
def scalars_and_nothing(hvd):
    net = network()
    net.scale, net.empty = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.zeros(0, 3))
    net.forward = lambda x, layers=list(net): nn.Sequential(*layers)(x) * net.scale + net.empty.sum()
    return trained(hvd, net)


@script
def double_precision(hvd):
    net = network().double()
    optimizer = hvd.DistributedOptimizer(sgd(net), net.named_parameters())
    for x, y in batches(hvd, 6):
        optimizer.zero_grad()
        loss_of(net, x.double(), y).backward()
        optimizer.step()
    return net


@script(tolerance=2e-3, conserves=False)  # Horovod sums in half precision
def half_precision(hvd):
    net = network().half()
    optimizer = hvd.DistributedOptimizer(sgd(net), net.named_parameters())
    for x, y in batches(hvd, 6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x.half()).float(), y).backward()
        optimizer.step()
    return net


@script
def mixed_precisions(hvd):
    net = network()
    net[2].double()
    net.forward = lambda x, layers=list(net): layers[4](layers[3](layers[2](layers[1](layers[0](x)).double()).float()))
    return trained(hvd, net)


@script(horovod_fails="it wants contiguous gradients")
def convolutions_with_channels_last(hvd):
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Unflatten(1, (2, 3, 4)),
        nn.Conv2d(2, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 40, 3),
        nn.Flatten(),
        nn.Linear(80, 4),
    )
    return trained(hvd, net.to(memory_format=torch.channels_last))


@script
def normalisation_and_dropout(hvd):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(24, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 4))
    optimizer = hvd.DistributedOptimizer(sgd(net), net.named_parameters())
    torch.manual_seed(hvd.rank())
    train(hvd, net, optimizer)
    return list(net.parameters())  # running statistics are each rank's own


@script
def recurrent(hvd):
    torch.manual_seed(3)
    cell, head = nn.LSTM(4, 24, 2, batch_first=True), nn.Linear(24, 4)
    net = nn.ModuleList([cell, head])
    net.forward = lambda x: head(cell(x.view(6, 6, 4))[0][:, -1])
    return trained(hvd, net)


@script
def spectral_norm(hvd):
    net = network()
    nn.utils.parametrizations.spectral_norm(net[2])
    optimizer = hvd.DistributedOptimizer(sgd(net), net.named_parameters())
    train(hvd, net, optimizer)
    return list(net.parameters())


@script
def weight_norm(hvd):
    net = network()
    nn.utils.parametrizations.weight_norm(net[2])
    return trained(hvd, net)


def embedded(hvd, **options):
    torch.manual_seed(3)
    table, head = nn.Embedding(200, 24, sparse=True), nn.Linear(24, 4)
    net = nn.ModuleList([table, head])
    optimizer = hvd.DistributedOptimizer(sgd(net), net.named_parameters(), **options)
    for x, y in batches(hvd, 6):
        optimizer.zero_grad()
        loss_of(head, table((x[:, 0].abs() * 50).long()), y).backward()
        optimizer.step()
    return net


@script
def sparse_embedding(hvd):
    return embedded(hvd)


@script
def sparse_embedding_as_dense(hvd):
    return embedded(hvd, sparse_as_dense=True)


@script
def tensor_hooks(hvd):
    net = network()
    net[0].weight.register_hook(lambda grad: grad * 2)
    return trained(hvd, net)


@script
def moved_to_other_memory(hvd):
    net, optimizer = wrapped(hvd)
    train(hvd, net, optimizer, 3)
    for p in net.parameters():
        p.data = p.data.clone()
    return train(hvd, net, optimizer, 3)


@script
def perturbed_parameters(hvd):
    """Sharpness-aware: two gradients a step, of which the second counts."""
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 5):
        grads = torch.autograd.grad(loss_of(net, x, y), list(net.parameters()))
        kept = [p.detach().clone() for p in net.parameters()]
        with torch.no_grad():
            torch._foreach_add_(list(net.parameters()), grads, alpha=0.01)
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        with torch.no_grad():
            torch._foreach_copy_(list(net.parameters()), kept)
        optimizer.step()
    return net


@script
def frozen_between_backward_and_step(hvd):
    net, optimizer = wrapped(hvd)
    for step, (x, y) in enumerate(batches(hvd, 6)):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        net[0].requires_grad_(step % 2 == 1)
        optimizer.step()
        net[0].requires_grad_(True)
    return net
