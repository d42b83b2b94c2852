"""Local steps on real ranks: Horovod's own result with one step, equal ranks under every spec, Muon beside AdamW."""

import copy
import functools

import horovod.torch as horovod
import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import AccordionSteps, LocalSteps, TopK
from tests.parallel.workers.torch.common import SPECS, assert_ranks_equal, batch, flat, loss_of, model, sgd, train
from tests.torch.simulated_ranks import SimulatedRanks

NESTEROV = functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


def adamw(net):
    return torch.optim.AdamW(net.parameters(), 1e-3)


def test_one_local_step_is_horovods_own():
    net, theirs = model(), model()
    options = {"momentum": 0.0}
    train(
        net, hvd.DistributedOptimizer(sgd(net, **options), net.named_parameters(), local_steps=LocalSteps(1)), range(9)
    )
    plain = horovod.DistributedOptimizer(sgd(theirs, **options), theirs.named_parameters())
    train(theirs, plain, range(9))
    assert torch.allclose(flat(net), flat(theirs), atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_ranks_are_equal_after_an_exchange(name):
    net = model()
    local = LocalSteps(2, fragments=1 + len(name) % 2)
    optimizer = hvd.DistributedOptimizer(
        adamw(net), net.named_parameters(), compression=SPECS[name], local_steps=local, steps_per_epoch=3
    )
    train(net, optimizer, range(6))  # two ends of epochs, of which each ends a round
    assert_ranks_equal(flat(net), name)
    train(net, optimizer, range(6, 7))
    optimizer.end_round()
    assert_ranks_equal(flat(net), name)


def network_of_muon():
    """With the parameters of Muon and of AdamW."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(288, 10)
    )
    return net, [("3.weight", net[3].weight)], [(n, p) for n, p in net.named_parameters() if n != "3.weight"]


@pytest.mark.parametrize("local", [LocalSteps(3, NESTEROV), LocalSteps(4, delay=2), LocalSteps(AccordionSteps(1, 3))])
def test_muon_beside_adamw_and_buffers(local):
    net, matrices, others = network_of_muon()
    shared = {"compression": TopK(0.1), "local_steps": local}
    muon = hvd.DistributedOptimizer(torch.optim.Muon([p for _, p in matrices], 0.02), matrices, **shared)
    adam = torch.optim.AdamW([p for _, p in others], 1e-3)
    adam = hvd.DistributedOptimizer(adam, others, buffers=net.buffers(), **shared)
    for epoch in range(2):
        for step in range(5):
            muon.zero_grad(), adam.zero_grad()
            loss_of(net, 5 * epoch + step).backward()
            muon.step(), adam.step()
        muon.end_epoch(), adam.end_epoch()
        assert_ranks_equal(torch.cat([flat(net), net[1].running_mean.double(), net[1].running_var.double()]))
    assert muon.stats.steps == adam.stats.steps == 10 and muon.stats.updates == adam.stats.updates


@pytest.mark.parametrize("name", ["powersgd4", "qsgd7", "topk"])
def test_simulated_ranks_agree(name):
    initial = model()  # once: simulated ranks are threads, which share the generator

    def trained(rank, **options):
        net = copy.deepcopy(initial)
        local = LocalSteps(3, NESTEROV)
        optimizer = hvd.DistributedOptimizer(
            adamw(net), net.named_parameters(), compression=SPECS[name], local_steps=local, **options
        )
        for step in range(7):
            optimizer.zero_grad()
            loss_of(net, step, rank).backward()
            optimizer.step()
        optimizer.end_round()
        return flat(net)

    real = trained(hvd.rank())
    with pytest.MonkeyPatch.context() as patch:
        cluster = SimulatedRanks(hvd.size(), patch)
        simulated = cluster.run(lambda rank: trained(rank, process_set=cluster.process_sets[rank]))
    assert all(torch.allclose(real, x, atol=1e-5) for x in simulated)


def test_different_starts_are_refused():
    net = model()
    with torch.no_grad():
        net[0].bias += hvd.rank()
    optimizer = hvd.DistributedOptimizer(adamw(net), net.named_parameters(), local_steps=LocalSteps(2))
    x, _ = batch(0, hvd.rank())
    net(x).sum().backward()
    with pytest.raises(ValueError, match="must start from equal parameters"):
        optimizer.step()
