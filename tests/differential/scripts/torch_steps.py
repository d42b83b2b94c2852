"""What happens in and around `step()`: rates, hooks, closures, and calls out of turn."""

from __future__ import annotations

import copy

import torch

from tests.differential.scripts.torch_common import batches, loss_of, network, script, train, wrapped


class Decaying(torch.optim.SGD):
    """Halves its rate in every step."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            group["lr"] *= 0.5
        return loss


class Old(torch.optim.SGD):
    """As optimizers were written before `set_to_none`."""

    def zero_grad(self):
        super().zero_grad()


def lbfgs(hvd):
    net = network()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    return net, hvd.DistributedOptimizer(optimizer, net.named_parameters())


def synchronizing(net, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, x, y)
        loss.backward()
        optimizer.synchronize()
        return loss

    return closure


@script
def decays_its_rate_itself(hvd):
    net = network()
    train(
        hvd, net, optimizer := hvd.DistributedOptimizer(Decaying(net.parameters(), lr=0.1), net.named_parameters()), 4
    )
    assert optimizer.param_groups[0]["lr"] == 0.1 / 16
    return net


@script
def hooks_set_the_rate(hvd):
    net, optimizer = wrapped(hvd)
    before = lambda optimizer, *_: optimizer.param_groups[0].update(lr=0.3)  # noqa: E731
    after = lambda optimizer, *_: optimizer.param_groups[0].update(lr=0.7)  # noqa: E731
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    train(hvd, net, optimizer, 3)
    assert optimizer.param_groups[0]["lr"] == 0.7
    return net


@script(horovod_fails="it calls the hooks twice a step")
def hooks_after_a_load(hvd):
    net, optimizer = wrapped(hvd)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(net[0].weight.grad.clone()))
    train(hvd, net, optimizer, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(hvd, net, optimizer, 2)
    assert len(calls) == 4
    return [*net.parameters(), *calls]


@script
def lbfgs_that_synchronizes_itself(hvd):
    net, optimizer = lbfgs(hvd)
    for x, y in batches(hvd, 3):
        with optimizer.skip_synchronize():
            optimizer.step(synchronizing(net, optimizer, x, y))
    return net


@script
def closure_that_synchronizes_itself(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 3):
        optimizer.step(synchronizing(net, optimizer, x, y))
    return net


@script
def synchronizes_twice(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 4):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.synchronize()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
    return net


@script
def synchronizes_without_a_step(hvd):
    net, optimizer = wrapped(hvd)
    for i, (x, y) in enumerate(batches(hvd, 5)):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.synchronize()
        if i % 2 == 0:
            with optimizer.skip_synchronize():
                optimizer.step()
    return net


@script(horovod_fails="it starts the same exchanges again", conserves=False)  # a load drops the residuals of now
def loads_between_backward_and_step(hvd):
    net, optimizer = wrapped(hvd)
    train(hvd, net, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for x, y in batches(hvd, 2):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.load_state_dict(saved)
        optimizer.step()
    return net


@script(conserves=False)  # a load drops the residuals of now
def loads_between_synchronize_and_step(hvd):
    net, optimizer = wrapped(hvd)
    train(hvd, net, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for x, y in batches(hvd, 2):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.synchronize()
        optimizer.load_state_dict(saved)
        with optimizer.skip_synchronize():
            optimizer.step()
    return net


@script
def zero_grad_without_arguments(hvd):
    net = network()
    return train(hvd, net, hvd.DistributedOptimizer(Old(net.parameters(), lr=0.1), net.named_parameters()))


@script(horovod_fails="its zero_grad() raises")
def a_backward_pass_before_the_first_step(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 2):
        loss_of(net, x, y).backward()
        optimizer.zero_grad()
    return train(hvd, net, optimizer, 3)


@script
def names_from_the_optimizer(hvd):
    net = network()
    return train(hvd, net, hvd.DistributedOptimizer(torch.optim.SGD(net.named_parameters(), lr=0.1)))


@script(horovod_fails="it knows of no parameters that come later")
def names_of_a_later_group(hvd):
    net = network()
    first, last = list(net[0].named_parameters("0")), list(net[2].named_parameters("2"))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(first, lr=0.1))
    train(hvd, net, optimizer, 2)
    net.zero_grad()
    optimizer.add_param_group({"params": last, "lr": 0.05})
    return train(hvd, net, optimizer, 3)
