"""Ranks with different numbers of batches, under every spec: nobody hangs, and all end with the same parameters."""

import copy

import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, AccordionBatchSize, Dense, PowerSGD, TopK
from tests.parallel.workers.torch.common import SPECS, assert_ranks_equal, flat, loss_of, model, sgd


def wrap(net, compression, inner=None, **options):
    options = {"uneven_inputs": True, **options}
    inner = inner or sgd(net)
    return hvd.DistributedOptimizer(inner, net.named_parameters(), copy.deepcopy(compression), **options)


def train(net, optimizer, steps, clip=None):
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, step).backward()
        if clip is None:
            optimizer.step()
            continue
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        with optimizer.skip_synchronize():
            optimizer.step()


def everything(net, optimizer):
    """Parameters and momentum."""
    return torch.cat(
        [flat(net), *(optimizer.state[p]["momentum_buffer"].double().reshape(-1) for p in net.parameters())]
    )


@pytest.mark.parametrize("name", SPECS)
def test_every_spec(name):
    """Two epochs; more batches on the higher ranks in the first, fewer in the second, where rank 0 clips and decays."""
    net = model()
    optimizer = wrap(net, SPECS[name], steps_per_epoch=5)
    train(net, optimizer, range(3 + 2 * hvd.rank()))
    assert hvd.join() == hvd.size() - 1
    assert_ranks_equal(everything(net, optimizer))
    assert optimizer.stats.steps == 1 + 2 * hvd.size()
    assert optimizer.param_groups[0]["lr"] == 0.05
    train(net, optimizer, range(20, 22 + 2 * (hvd.size() - hvd.rank())), clip=0.5)
    assert hvd.join() == 0
    assert_ranks_equal(everything(net, optimizer), name)


def test_who_is_done_counts_as_zeros():
    net, other = model(), model()
    optimizer = wrap(net, Dense(), sgd(net, momentum=0.0))
    train(net, optimizer, range(2 + hvd.rank()))
    hvd.join()
    inner = sgd(other, momentum=0.0)
    for step in range(1 + hvd.size()):
        inner.zero_grad()
        (loss_of(other, step) * (step < 2 + hvd.rank())).backward()
        for i, p in enumerate(other.parameters()):
            p.grad = hvd.allreduce(p.grad, name=f"by_hand.{i}")
        inner.step()
    torch.testing.assert_close(flat(net), flat(other), rtol=0, atol=1e-6)


def test_nothing_is_lost():
    """Under SGD what was applied and what waits is what was given, zeros of those who are done among it."""
    net = model()
    optimizer = wrap(net, TopK(0.05), sgd(net, momentum=0.0, lr=1.0 / 64))
    p, given = net[5].weight, torch.zeros_like(net[5].weight)
    begin = p.detach().clone()
    for step in range(2 + 3 * hvd.rank()):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        given += torch.autograd.grad(loss_of(net, step), p)[0]
        optimizer.step()
    hvd.join()
    waiting = optimizer._hvd.residual["5.weight"]
    mean = hvd.allreduce(given - waiting, name="mean")
    torch.testing.assert_close((begin - p.detach()) * 64, mean, rtol=0, atol=1e-5)


def test_a_rank_without_any_batch():
    net = model()
    optimizer = wrap(net, PowerSGD(2), torch.optim.Adam(net.parameters()))
    train(net, optimizer, range(3 if hvd.rank() else 0))
    hvd.join()
    assert_ranks_equal(flat(net))
    train(net, optimizer, range(2))
    assert hvd.join() == hvd.size() - 1
    assert_ranks_equal(flat(net))


def test_two_optimizers_in_turns():
    nets = model(), model()
    optimizers = [wrap(net, spec) for net, spec in zip(nets, (TopK(0.05), PowerSGD(2)), strict=True)]
    for step in range(2 + 2 * hvd.rank()):
        for net, optimizer in zip(nets, optimizers, strict=True):
            train(net, optimizer, [step])
    assert hvd.join() == hvd.size() - 1
    for net in nets:
        assert_ranks_equal(flat(net))


def test_closures_that_are_called_several_times():
    net = model()
    inner = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3, tolerance_change=0, tolerance_grad=0)
    optimizer = wrap(net, TopK(0.1), inner)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    for _ in range(1 + hvd.rank()):
        optimizer.step(closure)
    hvd.join()
    assert_ranks_equal(flat(net))
    assert optimizer.stats.steps == hvd.size()


def test_epochs_that_are_told_of_wait_for_all():
    net = model()
    accordion = Accordion(PowerSGD(4), PowerSGD(1), interval=1, eta=1e3)
    optimizer = wrap(net, accordion)
    for epoch in range(3):
        train(net, optimizer, range(10 * epoch, 10 * epoch + 2 + (hvd.rank() + epoch) % hvd.size()))
        optimizer.end_epoch()
        assert_ranks_equal(everything(net, optimizer), epoch)
    assert optimizer._hvd.controller.epoch == 3
    assert {row.spec for row in optimizer.compression_report() if row.regime} == {"PowerSGD(rank=1)"}


def batched(net, compression, inner=None):
    rule = AccordionBatchSize(8 * hvd.size(), 32 * hvd.size(), eta=1e3, interval=1, warmup=0)
    optimizer = wrap(net, compression, inner, batch_size=rule, uneven_inputs=False)
    for _ in range(2):  # then batches grow
        train(net, optimizer, range(2))
        optimizer.end_epoch()
    assert optimizer._hvd.controller.batch.passes == 4
    return optimizer


@pytest.mark.parametrize("name", ["dense", "topk"])
@pytest.mark.parametrize("more", [0, 1, 3, 4, 7])
def test_unequal_numbers_of_micro_batches(name, more):
    net = model()
    optimizer = batched(net, {"dense": Dense(), "topk": TopK(0.05)}[name])
    for epoch in range(2):
        train(net, optimizer, range(100 * epoch, 100 * epoch + 4 + more * hvd.rank()))
        optimizer.end_epoch()
        assert_ranks_equal(everything(net, optimizer), f"{more} more, epoch {epoch}")


def test_micro_batches_weigh_alike():
    """The last batch has 1 on rank 0, 3 on rank 1, ...: the mean is that of all of them."""
    net = model()
    optimizer = batched(net, Dense(), sgd(net, momentum=0.0))
    other, count = copy.deepcopy(net), 1 + 2 * (hvd.rank() % 2)
    train(net, optimizer, range(count))
    optimizer.end_epoch()
    for step in range(count):
        loss_of(other, step).backward()
    inner = sgd(other, momentum=0.0)
    total = float(hvd.allreduce(torch.tensor(float(count)), op=hvd.Sum, name="total"))
    for i, p in enumerate(other.parameters()):
        p.grad = hvd.allreduce(p.grad, op=hvd.Sum, name=f"by_hand.{i}") / total
    inner.param_groups[0]["lr"] *= optimizer._hvd.controller.lr_scale * total / hvd.size() / 4
    inner.step()
    torch.testing.assert_close(flat(net), flat(other), rtol=0, atol=1e-6)


def test_join_is_refused_where_compression_does_not_know_of_it():
    net = model()
    optimizer = wrap(net, TopK(0.05), uneven_inputs=False)
    with pytest.raises(ValueError, match=r"join\(\) needs DistributedOptimizer\(..., uneven_inputs=True\)"):
        hvd.join()
    train(net, optimizer, range(1))


def test_join_is_horovods_without_compression():
    net = model()
    optimizer = wrap(net, None)
    train(net, optimizer, range(2 + hvd.rank()))
    assert hvd.join() == hvd.size() - 1
    del optimizer
