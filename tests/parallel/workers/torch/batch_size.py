"""Batches whose size follows an AccordionBatchSize: exchanged once, the same on all ranks, and what that saves."""

import copy

import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, AccordionBatchSize, Dense, PowerSGD, TopK
from tests.parallel.workers.torch.common import assert_ranks_equal, flat, loss_of, model, sgd

STEPS = 7  # micro-batches an epoch: with batches of 4, one of 4 and one of 3
SMALL = 2 * STEPS  # micro-batches before the batch grows
GROUPS = [*[(1, 1.0)] * SMALL, *((n, s * n / 4) for s in (1.0, 2.5, 4.0) for n in (4, 3))]


def rule(**options):
    return AccordionBatchSize(8 * hvd.size(), 32 * hvd.size(), **{"eta": 1e3, "interval": 1, "warmup": 2, **options})


def made(net, batch_size=None, steps_per_epoch=STEPS, **options):
    batch_size = batch_size or rule()
    named = net.named_parameters()
    return hvd.DistributedOptimizer(sgd(net), named, batch_size=batch_size, steps_per_epoch=steps_per_epoch, **options)


def train(net, optimizer, steps, told=False):
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
        if told and step % STEPS == STEPS - 1:
            optimizer.end_epoch()


def by_hand(net, groups):
    """Sums of micro-batches, averaged by Horovod's own allreduce."""
    optimizer, step = sgd(net), 0
    rate = optimizer.param_groups[0]["lr"]
    for size, scale in groups:
        optimizer.zero_grad()
        for _ in range(size):
            loss_of(net, step).backward()
            step += 1
        for i, p in enumerate(net.parameters()):
            p.grad = hvd.allreduce(p.grad / size, name=f"by_hand.{i}")
        optimizer.param_groups[0]["lr"] = rate * scale
        optimizer.step()


@pytest.mark.parametrize("told", [False, True], ids=["steps_per_epoch", "end_epoch"])
def test_equals_accumulation_by_hand(told):
    net, other = model(), model()
    optimizer = made(net, steps_per_epoch=None if told else STEPS)
    train(net, optimizer, range(5 * STEPS), told)
    by_hand(other, GROUPS)
    if hvd.size() == 2:  # of more, the order of a sum may differ
        assert torch.equal(flat(net), flat(other))
    assert torch.allclose(flat(net), flat(other), rtol=1e-4, atol=1e-6)
    assert_ranks_equal(flat(net))
    stats = optimizer.stats
    assert (stats.steps, stats.updates) == (5 * STEPS, len(GROUPS))
    assert stats.ratio == pytest.approx(5 * STEPS / len(GROUPS))


def test_the_exchange_begins_in_the_last_backward_pass_and_in_no_other():
    net = model()
    optimizer = made(net)
    train(net, optimizer, range(SMALL))
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        assert optimizer._hvd.in_flight is optimizer.completes_batch is (step in (3, 6))
        optimizer.step()


SPECS = {
    "topk": TopK(0.05),
    "fp16": hvd.Compression.fp16,
    "accordion": Accordion(PowerSGD(4), PowerSGD(1), interval=1, eta=1e3),
    "accordion-steps": Accordion(Dense(), TopK(0.02), interval=6, unit="steps", eta=0.3),
}


@pytest.mark.parametrize("name", SPECS)
def test_composes_with_compression(name):
    net = model()
    optimizer = made(net, compression=SPECS[name])
    train(net, optimizer, range(4 * STEPS))
    assert_ranks_equal(flat(net), name)
    report, stats = optimizer.compression_report(), optimizer.stats
    assert stats.steps == 4 * STEPS
    if name == "accordion-steps":  # a window of its ends a batch, too
        return
    assert stats.updates == SMALL + 4
    if name == "accordion":
        assert {row.spec for row in report if row.regime} == {"PowerSGD(rank=1)"}
        return
    other = model()
    small = made(other, rule(eta=1e-9), compression=SPECS[name])
    train(other, small, range(STEPS))
    assert (small.stats.steps, small.stats.updates) == (STEPS, STEPS)
    assert stats.sent_bytes == pytest.approx(small.stats.sent_bytes / STEPS * stats.updates)
    assert report.sent_bytes == pytest.approx(small.compression_report().sent_bytes / 4)


def test_norms_and_regimes_are_the_same_on_all_ranks():
    net = model()
    optimizer = made(net, rule(eta=0.2))
    train(net, optimizer, range(4 * STEPS))
    batch = optimizer._hvd.controller.batch.rule
    assert batch.norms["whole model"] > 0
    mine = [
        batch.norms["whole model"],
        batch.ratios["whole model"],
        float(batch.passes),
        float(optimizer.stats.updates),
    ]
    everyone = hvd.allgather(torch.tensor([mine], dtype=torch.float64), name="rules")
    assert (everyone == everyone[0]).all()


def test_sparse_gradients_add_up_too():
    def network():
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Embedding(40, 6, sparse=True), torch.nn.Linear(6, 5))

    def loss(net, step):
        words = torch.randint(0, 40, (9,), generator=torch.Generator().manual_seed(100 * step + hvd.rank()))
        return net(words).square().sum()

    net, other = network(), network()
    plain = torch.optim.SGD(net.parameters(), lr=0.01)
    optimizer = hvd.DistributedOptimizer(plain, net.named_parameters(), batch_size=rule(), steps_per_epoch=STEPS)
    for step in range(3 * STEPS):
        optimizer.zero_grad()
        loss(net, step).backward()
        optimizer.step()
    hand, step = torch.optim.SGD(other.parameters(), lr=0.01), 0
    for size, scale in GROUPS[: SMALL + 2]:
        hand.zero_grad()
        for _ in range(size):
            loss(other, step).backward()
            step += 1
        hand.param_groups[0]["lr"] = 0.01 * scale
        for i, p in enumerate(other.parameters()):
            p.grad = hvd.allreduce((p.grad.to_dense() if p.grad.is_sparse else p.grad) / size, name=f"sparse.{i}")
        hand.step()
    assert torch.allclose(flat(net), flat(other), rtol=1e-5, atol=1e-7)
    assert_ranks_equal(flat(net))


def test_a_resumed_training_is_bit_equal_in_the_middle_of_a_batch():
    net, resumed = model(), model()
    compression, cut = Accordion(PowerSGD(2), TopK(0.05), interval=1, eta=1e3), 3 * STEPS + 2
    optimizer = made(net, compression=compression)
    train(net, optimizer, range(cut))
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, range(cut, 5 * STEPS))
    again = made(resumed, compression=compression)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(resumed, again, range(cut, 5 * STEPS))
    assert torch.equal(flat(net), flat(resumed))


def test_what_only_rank_0_restored_goes_to_all():
    net, cut = model(), 3 * STEPS + 2
    optimizer = made(net)
    train(net, optimizer, range(cut))
    restored = model()
    again = made(restored)
    if hvd.rank() == 0:
        restored.load_state_dict(net.state_dict())
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    hvd.broadcast_parameters(restored.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(again, root_rank=0)
    assert again._hvd.batch.count == 2
    train(restored, again, range(cut, 4 * STEPS))
    assert_ranks_equal(flat(restored))
    assert again.stats.updates == SMALL + 4
