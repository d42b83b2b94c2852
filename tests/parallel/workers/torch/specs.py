"""Every compression on real ranks: bit-equal, conserving, equal to the simulated cluster."""

from functools import partial

import numpy as np
import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import PowerSGD, TopK
from hvd_accordion.policy.assignment import assign
from hvd_accordion.torch import distributed_optimizer
from hvd_accordion.training.settings import Settings
from tests.parallel.reference import SHAPES, simulated
from tests.parallel.user_compressor import RandomPart
from tests.parallel.workers.torch import common
from tests.parallel.workers.torch.common import assert_ranks_equal, flat, model, sgd, train

SPECS = {**common.SPECS, "users": RandomPart(4)}


@pytest.mark.parametrize("name", SPECS)
def test_ranks_stay_bit_equal(name):
    net = model()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    optimizer = hvd.DistributedOptimizer(sgd(net), net.named_parameters(), compression=SPECS[name], steps_per_epoch=6)
    train(net, optimizer, range(50))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert_ranks_equal(flat(net), name)
    assert optimizer.stats.steps == 50
    assert optimizer.stats.sent_bytes <= optimizer.stats.dense_bytes
    for key in ("step", "epoch"):
        assert_ranks_equal(torch.tensor([getattr(optimizer._hvd.controller, key)]), key)


def test_a_gradient_is_conserved():
    """What was applied and what the residuals still hold is what was given, on every rank, across level changes."""
    shape = (96, 64)
    levels = [PowerSGD(4), PowerSGD(1), TopK(0.02), None, PowerSGD(2)]
    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer = hvd.DistributedOptimizer(optimizer, [("w", weight)], compression=levels[0])
    controller = optimizer._hvd.controller
    given = torch.zeros(shape, dtype=torch.float64)
    for step in range(50):
        controller.adopt(assign(levels[step // 10], ["w"]))
        controller.set_layers(list(controller.layers.values()))
        optimizer._hvd.replan()
        g = torch.randn(shape, generator=torch.Generator().manual_seed(31 * step + hvd.rank()))
        given += hvd.allreduce(g.double())
        optimizer.zero_grad()
        (weight * g).sum().backward()
        optimizer.step()
        held = hvd.allreduce(optimizer._hvd.residual["w"].double())
        error = (-weight.detach().double() + held - given).norm() / given.norm()
        assert error < 1e-6, (step, error)
    assert_ranks_equal(weight.detach())


@pytest.mark.parametrize(
    ("name", "decay"),
    [(n, 1.0) for n in SPECS if "accordion" not in n and n not in ("globs", "dense")] + [("topk", 0.9), ("signs", 0.9)],
)
def test_equals_the_simulated_cluster(name, decay, monkeypatch):
    """Same gradients, seeds and steps: torch over Horovod gives what numpy gives in one process."""
    monkeypatch.setattr(distributed_optimizer, "Settings", partial(Settings, residual_decay=decay))
    spec = SPECS[name]
    params = {key: torch.nn.Parameter(torch.zeros(shape)) for key, shape in SHAPES.items()}
    optimizer = torch.optim.SGD(params.values(), lr=1.0)
    optimizer = hvd.DistributedOptimizer(optimizer, params.items(), compression=spec)
    for step, (grads, expected) in enumerate(simulated(spec, hvd.size(), 6, decay)):
        optimizer.zero_grad()
        sum((params[k] * torch.from_numpy(grads[hvd.rank()][k])).sum() for k in SHAPES).backward()
        optimizer.synchronize()
        for k in SHAPES:
            got = params[k].grad.numpy()
            scale = np.abs(expected[k]).max()
            assert np.abs(got - expected[k]).max() <= 1e-5 * scale, (name, step, k)
        with optimizer.skip_synchronize():
            optimizer.step()


@pytest.mark.parametrize("name", ["powersgd4", "topk", "accordion"])
def test_a_gradient_exchange_gives_the_means_of_an_optimizer(name):
    params = {key: torch.nn.Parameter(torch.zeros(shape)) for key, shape in SHAPES.items()}
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(params.values(), 0.1), params.items(), compression=SPECS[name])
    exchange = hvd.GradientExchange(SPECS[name], learning_rate=0.1)
    for step in range(8):
        generator = torch.Generator().manual_seed(17 * step + hvd.rank())
        given = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
        for key, p in params.items():
            (p * given[key]).sum().backward()
        optimizer.step()
        means = exchange(given)
        assert all(torch.equal(means[key], p.grad) for key, p in params.items())
        optimizer.zero_grad()
    assert exchange.stats.sent_bytes == optimizer.stats.sent_bytes
