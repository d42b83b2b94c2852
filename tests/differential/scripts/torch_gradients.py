"""Gradients that the user sets, keeps, shares between parameters, or changes by hooks of his own."""

from __future__ import annotations

import torch
from torch import nn

from tests.differential.scripts.torch_common import batches, loss_of, network, script, sgd, train, wrapped


class Added(nn.Module):
    """Two matrices that are added before they are used, and two vectors of different shapes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = (nn.Parameter(torch.randn(24, 40) / 10) for _ in range(2))
        self.c, self.d = nn.Parameter(torch.zeros(30, 40)), nn.Parameter(torch.zeros(1200))
        self.head = nn.Linear(40, 4)

    def forward(self, x):
        both = (self.c.clone() + self.d.view(30, 40)).tanh()
        return self.head((x @ (self.a + self.b)).tanh() + both.sum(0) + x[:, :1] * both[0])


def added(hvd):
    net = Added()
    return net, hvd.DistributedOptimizer(sgd(net), named_parameters=net.named_parameters())


@script
def parameters_that_are_added(hvd):
    return train(hvd, *added(hvd))


@script
def gradients_by_autograd_grad(hvd):
    """Of parameters that are added it gives one tensor."""
    net, optimizer = added(hvd)
    params = list(net.parameters())
    for x, y in batches(hvd, 6):
        for p, g in zip(params, torch.autograd.grad(loss_of(net, x, y), params), strict=True):
            p.grad = g
        optimizer.step()
    return net


@script
def gradients_by_func_grad(hvd):
    net, optimizer = added(hvd)

    def loss(params, x, y):
        return nn.functional.cross_entropy(torch.func.functional_call(net, params, (x,)), y)

    for x, y in batches(hvd, 6):
        grads = torch.func.grad(loss)({n: p.detach() for n, p in net.named_parameters()}, x, y)
        for name, p in net.named_parameters():
            p.grad = grads[name]
        optimizer.step()
    return net


@script
def gradient_of_another_parameter(hvd):
    """A copy of a layer, which nothing uses, is trained by the layer's gradient."""
    net = network()
    net.register_parameter("copy", nn.Parameter(net[0].weight.detach().clone()))
    net.forward = lambda x: nn.functional.linear(net[2](net[1](net[0](x))).tanh(), net[4].weight, net[4].bias)
    optimizer = hvd.DistributedOptimizer(sgd(net), named_parameters=net.named_parameters())
    for x, y in batches(hvd, 6):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        net.copy.grad = net[0].weight.grad
        optimizer.step()
    return net


@script
def buffers_that_the_user_keeps(hvd):
    net, optimizer = wrapped(hvd)
    buffers = [torch.zeros_like(p) for p in net.parameters()]
    for x, y in batches(hvd, 6):
        grads = torch.autograd.grad(loss_of(net, x, y), list(net.parameters()))
        for p, buffer, g in zip(net.parameters(), buffers, grads, strict=True):
            buffer.copy_(g)
            p.grad = buffer
        optimizer.step()
        assert all(p.grad is buffer for p, buffer in zip(net.parameters(), buffers, strict=True))
    return [*net.parameters(), *buffers]


@script(horovod_fails="its zero_grad() has no set_to_none")
def gradients_stay_where_they_are(hvd):
    net, optimizer = wrapped(hvd)
    kept = []
    for x, y in batches(hvd, 6):
        optimizer.zero_grad(set_to_none=False)
        loss_of(net, x, y).backward()
        optimizer.step()
        now = [(id(p.grad), p.grad.data_ptr()) for p in net.parameters()]
        kept = kept or [(p.grad, now) for p in net.parameters()]
        assert now == kept[0][1]
    return net


@script
def one_flat_buffer_of_all_gradients(hvd):
    net, optimizer = wrapped(hvd)
    flat, start = torch.zeros(sum(p.numel() for p in net.parameters())), 0
    for p in net.parameters():
        p.grad = flat[start : start + p.numel()].view(p.shape)
        start += p.numel()
    for x, y in batches(hvd, 6):
        flat.zero_()
        loss_of(net, x, y).backward()
        optimizer.step()
    return [*net.parameters(), flat]


@script(horovod_fails="it wants contiguous gradients")
def expanded_and_transposed_gradients(hvd):
    net, optimizer = wrapped(hvd)
    for step in range(4):
        for p in net.parameters():
            value = torch.tensor(0.1 * step + hvd.rank())
            p.grad = value.expand(p.shape) if p.dim() == 1 else (torch.ones(p.shape[::-1]) * value).t()
        optimizer.step()
    return net


def clip(p):
    p.grad.clamp_(-1e-3, 1e-3)


@script
def hooks_that_come_after_wrapping(hvd):
    """They clip each gradient of a backward pass before it is averaged, however late they were added."""
    net, optimizer = wrapped(hvd)
    for step, (x, y) in enumerate(batches(hvd, 6)):
        if step == 2:
            for p in net.parameters():
                p.register_post_accumulate_grad_hook(clip)
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.step()
    return net


@script
def hooks_that_replace_the_gradient(hvd):
    net, optimizer = wrapped(hvd)

    def halve(p):
        p.grad = p.grad / 2

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(halve)
    return train(hvd, net, optimizer)


@script(horovod_fails="its zero_grad() has no set_to_none")
def hooks_of_what_was_frozen_for_a_while(hvd):
    net, optimizer = wrapped(hvd)
    for step, (x, y) in enumerate(batches(hvd, 8)):
        net[2].weight.requires_grad_(not 2 <= step < 4)
        if step == 5:
            net[2].weight.register_post_accumulate_grad_hook(clip)
        optimizer.zero_grad(set_to_none=True)
        loss_of(net, x, y).backward()
        optimizer.step()
    return net


@script
def two_optimizers_of_one_network(hvd):
    net = network()
    body, head = net[:3], net[3:]
    optimizers = [
        hvd.DistributedOptimizer(
            sgd(part, lr=rate), named_parameters=[(f"{i}.{n}", p) for n, p in part.named_parameters()]
        )
        for i, (part, rate) in enumerate(((body, 0.1), (head, 0.05)))
    ]
    for x, y in batches(hvd, 6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(net, x, y).backward()
        for optimizer in optimizers:
            optimizer.step()
    return net
