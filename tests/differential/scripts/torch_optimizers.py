"""Optimizers, their arguments, schedules and saved states."""

from __future__ import annotations

import copy
import io

import torch

from tests.differential.scripts.torch_common import batches, loss_of, network, script, sgd, train, wrapped


def of(hvd, kind, **options):
    net = network()
    return train(hvd, net, hvd.DistributedOptimizer(kind(net.parameters(), **options), net.named_parameters()))


@script
def momentum(hvd):
    return of(hvd, torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)


@script
def maximizes(hvd):
    return of(hvd, torch.optim.SGD, lr=0.01, maximize=True)


@script
def one_by_one(hvd):
    return of(hvd, torch.optim.SGD, lr=0.1, momentum=0.9, foreach=False)


@script
def fused(hvd):
    return of(hvd, torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)


@script
def adamw(hvd):
    return of(hvd, torch.optim.AdamW, lr=0.01, amsgrad=True)


@script
def adagrad(hvd):
    return of(hvd, torch.optim.Adagrad, lr=0.05)


@script
def rmsprop(hvd):
    return of(hvd, torch.optim.RMSprop, lr=0.01, centered=True)


@script
def rate_as_a_tensor(hvd):
    return of(hvd, torch.optim.Adam, lr=torch.tensor(0.01))


@script
def sums_instead_of_averages(hvd):
    return train(hvd, *wrapped(hvd, op=hvd.Sum))


@script
def predivides(hvd):
    return train(hvd, *wrapped(hvd, gradient_predivide_factor=2.0))


@script
def in_two_groups(hvd):
    return train(hvd, *wrapped(hvd, groups=2))


@script
def in_groups_of_parameters(hvd):
    net = network()
    groups = [list(net[0].parameters()), [net[2].weight]]
    return train(hvd, net, hvd.DistributedOptimizer(sgd(net), net.named_parameters(), groups=groups))


@script
def without_names(hvd):
    net = network()
    return train(hvd, net, hvd.DistributedOptimizer(sgd(net)))


@script
def groups_of_rates(hvd):
    net = network()
    groups = [{"params": net[0].parameters(), "lr": 0.01}, {"params": net[2:].parameters(), "weight_decay": 0.1}]
    return train(hvd, net, hvd.DistributedOptimizer(torch.optim.SGD(groups, lr=0.1), net.named_parameters()))


@script
def scheduler_of_the_wrapped(hvd):
    net, optimizer = wrapped(hvd)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.3)
    for x, y in batches(hvd, 7):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.step()
        schedule.step()
    return net


@script
def scheduler_from_before(hvd):
    net = network()
    inner = sgd(net)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(inner, 5)
    optimizer = hvd.DistributedOptimizer(inner, net.named_parameters())
    for x, y in batches(hvd, 6):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.step()
        schedule.step()
    return net


@script
def rate_set_between_steps(hvd):
    net, optimizer = wrapped(hvd)
    for step, (x, y) in enumerate(batches(hvd, 6)):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.step()
    return net


@script(horovod_fails="it knows of no parameters that come later")
def adds_parameters_on_the_way(hvd):
    net, more = network(), torch.nn.Linear(4, 4)
    optimizer = hvd.DistributedOptimizer(sgd(net))
    train(hvd, net, optimizer, 2)
    hvd.broadcast_parameters(more.state_dict(), root_rank=0)
    optimizer.add_param_group({"params": more.parameters(), "lr": 0.05})
    both = torch.nn.Sequential(net, more)
    return train(hvd, both, optimizer, 4)


@script
def broadcasts_in_the_middle(hvd):
    net, optimizer = wrapped(hvd)
    hvd.broadcast_parameters(net.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    train(hvd, net, optimizer, 3)
    hvd.broadcast_parameters(net.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    return train(hvd, net, optimizer, 3)


@script
def saved_and_loaded(hvd):
    net = network()
    optimizer = hvd.DistributedOptimizer(sgd(net, momentum=0.9), net.named_parameters())
    train(hvd, net, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    return train(hvd, net, optimizer, 3)


@script(horovod_fails="its hooks outlive it")
def loaded_into_a_new_one(hvd):
    net = network()
    optimizer = hvd.DistributedOptimizer(sgd(net, momentum=0.9), net.named_parameters())
    train(hvd, net, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    del optimizer
    optimizer = hvd.DistributedOptimizer(sgd(net, momentum=0.9), net.named_parameters())
    optimizer.load_state_dict(saved)
    return train(hvd, net, optimizer, 3)


@script
def wrapped_by_horovod_before(hvd):
    import horovod.torch as horovod

    net = network()
    theirs = horovod.DistributedOptimizer(sgd(net, momentum=0.9), net.named_parameters(), backward_passes_per_step=2)
    optimizer = theirs if hvd.module is horovod else hvd.DistributedOptimizer(theirs)
    del theirs
    data = list(batches(hvd, 8))
    for i in range(0, 8, 2):
        optimizer.zero_grad()
        for x, y in data[i : i + 2]:
            loss_of(net, x, y).backward()
        optimizer.step()
    return net


@script(horovod_fails="its hooks outlive it", conserves=False)  # a new one knows of no residual
def wrapped_anew_after_a_while(hvd):
    net, optimizer = wrapped(hvd)
    train(hvd, net, optimizer, 3)
    del optimizer
    return train(hvd, net, hvd.DistributedOptimizer(sgd(net, lr=0.02), net.named_parameters()), 3)


@script(horovod_fails="it calls the hooks twice a step")
def hooks_around_the_step(hvd):
    net, optimizer = wrapped(hvd)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(net[0].weight.grad.sum().item()))
    optimizer.register_step_post_hook(lambda *_: net[4].bias.data.mul_(0.9))
    train(hvd, net, optimizer)
    assert len(calls) == 6
    return net
