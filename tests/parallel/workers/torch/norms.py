"""The norms that Accordion sees are those of the averaged gradients' watched entries, on every rank the same."""

import copy

import numpy as np
import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, Dense, PowerSGD, TopK
from hvd_accordion.ops import numpy as ops
from hvd_accordion.policy import norm_sampling
from tests.parallel.workers.torch.common import flat, loss_of, model, sgd, train

STEPS = 4
LARGE = "5.weight"  # 18,432 entries


def norms_of(total, accordion):
    """In numpy, from the sums of the averaged gradients."""
    found = {}
    for name, x in total.items():
        size = accordion.window.sample_size(x.size)
        picked = norm_sampling.entries(ops, name, x.size, size, 5, x)
        found[name] = norm_sampling.scale(x.size, size) * np.linalg.norm(x.reshape(-1)[picked])
    return found


@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum], ids=["average", "sum"])
@pytest.mark.parametrize("norm", ["sampled", "exact"])
@pytest.mark.parametrize("critical", [Dense(), PowerSGD(4)], ids=str)
def test_norms_are_numpys(critical, norm, op):
    """Two windows, with NaN on one rank in a step of the first; what is compressed is measured as it was received."""
    net = model()
    accordion = Accordion(critical, TopK(0.02), interval=STEPS, unit="steps", norm=norm)
    optimizer = hvd.DistributedOptimizer(sgd(net), net.named_parameters(), compression=accordion, op=op, seed=5)
    mine = optimizer._hvd.controller.levels.observers[0]
    layers = [row.name for row in optimizer.compression_report() if row.regime]
    assert LARGE in layers
    for window in range(2):
        total = {name: np.zeros(p.shape) for name, p in net.named_parameters() if name in layers}
        for step in range(STEPS):
            optimizer.zero_grad()
            bad = window == 0 and step == 1 and hvd.rank() == 0
            (loss_of(net, STEPS * window + step) * (float("nan") if bad else 1.0)).backward()
            optimizer.synchronize()
            if window == 0 and step == 1:
                continue
            for name, p in net.named_parameters():
                if name in layers:
                    total[name] += p.grad.double().numpy() / (hvd.size() if op == hvd.Sum else 1)
            with optimizer.skip_synchronize():
                optimizer.step()
        assert mine.norms == pytest.approx(norms_of(total, accordion), rel=1e-5)
    everyone = hvd.allgather(torch.tensor([[mine.norms[name] for name in layers]]), name="norms")
    assert (everyone == everyone[0]).all()


def test_sampled_sums_take_little_memory():
    net = torch.nn.Sequential(*(torch.nn.Linear(400, 400, bias=False) for _ in range(4)))
    optimizer = hvd.DistributedOptimizer(
        sgd(net), net.named_parameters(), compression=Accordion(interval=9, unit="steps")
    )
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(4, 400)).square().mean().backward()
        optimizer.step()
    assert {x.numel() for x in optimizer._hvd.norms.layers.summed.values()} == {8192}
    kept = [*optimizer._hvd.residual.values(), *optimizer._hvd.norms.layers.summed.values()]
    assert sum(x.nbytes for x in kept) <= 1.06 * sum(p.nbytes for p in net.parameters())


def test_a_window_goes_on_after_a_restart():
    """The entries are not saved: those who load choose the same ones."""

    def build(net):
        accordion = Accordion(interval=4, unit="steps")
        return hvd.DistributedOptimizer(sgd(net), net.named_parameters(), compression=accordion)

    net = model()
    optimizer = build(net)
    train(net, optimizer, range(2))
    other = model()
    other.load_state_dict(net.state_dict())
    resumed = build(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, range(2, 4))
    train(other, resumed, range(2, 4))
    ours, theirs = (x._hvd.controller.levels.observers[0].norms for x in (optimizer, resumed))
    assert ours and ours == theirs and torch.equal(flat(net), flat(other))
