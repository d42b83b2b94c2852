"""Loops: how backward, clipping, accumulation, zeroing and steps follow each other."""

from __future__ import annotations

import torch
from torch import nn

from tests.differential.scripts.torch_common import batches, loss_of, network, script, sgd, train, wrapped


@script
def plain_loop(hvd):
    return train(hvd, *wrapped(hvd))


@script(horovod_fails="its zero_grad() has no set_to_none")
def zeros_in_place(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 6):
        optimizer.zero_grad(set_to_none=False)
        loss_of(net, x, y).backward()
        optimizer.step()
    return net


@script
def zeros_by_the_model(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 6):
        net.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.step()
    return net


@script
def zeros_by_hand_after_the_step(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 6):
        loss_of(net, x, y).backward()
        optimizer.step()
        for p in net.parameters():
            p.grad.zero_()
    return net


@script
def never_zeroes(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 4):
        loss_of(net, x, y).backward()
        optimizer.step()
    return net


@script
def clips_the_norm(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 6):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        with optimizer.skip_synchronize():
            optimizer.step()
    return net


@script
def clips_values(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 6):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.synchronize()
        nn.utils.clip_grad_value_(net.parameters(), 0.003)
        with optimizer.skip_synchronize():
            optimizer.step()
    return net


@script
def synchronizes_without_skipping(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 5):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
    return train(hvd, net, optimizer, 3)


@script
def accumulates_two_passes(hvd):
    net, optimizer = wrapped(hvd, backward_passes_per_step=2)
    data = list(batches(hvd, 10))
    for i in range(0, 10, 2):
        optimizer.zero_grad()
        for x, y in data[i : i + 2]:
            (loss_of(net, x, y) / 2).backward()
        optimizer.step()
    return net


@script
def changes_the_number_of_passes(hvd):
    net, optimizer = wrapped(hvd)
    train(hvd, net, optimizer, 2)
    optimizer.set_backward_passes_per_step(3)
    for _ in range(3):
        optimizer.zero_grad()
        for x, y in batches(hvd, 3):
            loss_of(net, x, y).backward()
        optimizer.step()
    return net


@script
def two_losses_of_one_graph(hvd):
    net, optimizer = wrapped(hvd, backward_passes_per_step=2)
    for x, y in batches(hvd, 5):
        optimizer.zero_grad()
        out = net(x)
        nn.functional.cross_entropy(out, y).backward(retain_graph=True)
        out.square().mean().backward()
        optimizer.step()
    return net


@script(horovod_fails="it averages before the closure has computed anything")
def closure(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 6):

        def evaluate(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_of(net, x, y)
            loss.backward()
            return loss

        optimizer.step(evaluate)
    return net


@script
def gradient_penalty(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 5):
        optimizer.zero_grad()
        x.requires_grad_()
        loss = loss_of(net, x, y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + 10 * slope.square().sum()).backward()
        optimizer.step()
    return net


@script
def checkpointed_activations(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 5):
        optimizer.zero_grad()
        hidden = torch.utils.checkpoint.checkpoint(net[:3], x.requires_grad_(), use_reentrant=False)
        nn.functional.cross_entropy(net[3:](hidden), y).backward()
        optimizer.step()
    return net


@script
def two_players(hvd):
    maker, judge = network(), nn.Linear(4, 1)
    makes = hvd.DistributedOptimizer(sgd(maker), maker.named_parameters(prefix="maker"))
    judges = hvd.DistributedOptimizer(sgd(judge), judge.named_parameters(prefix="judge"))
    for x, _ in batches(hvd, 5):
        judges.zero_grad()
        (judge(maker(x).detach()).mean() - judge(torch.ones(6, 4)).mean()).backward()
        judges.step()
        makes.zero_grad()
        for p in judge.parameters():
            p.requires_grad_(False)
        (-judge(maker(x)).mean()).backward()
        makes.step()
        for p in judge.parameters():
            p.requires_grad_(True)
    return nn.ModuleList([maker, judge])


@script
def averages_metrics_in_between(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 5):
        optimizer.zero_grad()
        loss = loss_of(net, x, y)
        hvd.allreduce(loss.detach(), name="metric")
        loss.backward()
        hvd.allreduce(loss.detach(), name="metric")
        optimizer.step()
    return net


@script
def evaluates_in_between(hvd):
    net, optimizer = wrapped(hvd)
    for step, (x, y) in enumerate(batches(hvd, 6)):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.step()
        if step % 2:
            net.eval()
            with torch.no_grad():
                loss_of(net, x, y)
            net.train()
    return net


@script
def zeroes_too_early_and_is_told(hvd):
    net, optimizer = wrapped(hvd)
    train(hvd, net, optimizer, 2)
    for x, y in batches(hvd, 1):
        loss_of(net, x, y).backward()
        try:
            optimizer.zero_grad()
        except AssertionError:
            pass
        else:
            raise RuntimeError("zero_grad() between backward() and step() must raise")
        optimizer.step()
    return train(hvd, net, optimizer, 2)


@script
def autocast_to_bfloat16(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net, x, y)
        loss.backward()
        optimizer.step()
    return net


@script
def weight_clamped_after_the_step(hvd):
    net, optimizer = wrapped(hvd)
    for x, y in batches(hvd, 5):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.step()
        with torch.no_grad():
            for p in net.parameters():
                p.clamp_(-0.15, 0.15)
    return net


@script
def average_of_the_weights(hvd):
    net, optimizer = wrapped(hvd)
    average = torch.optim.swa_utils.AveragedModel(net)
    for x, y in batches(hvd, 5):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.step()
        average.update_parameters(net)
    return average
