"""compression=None is Horovod's optimizer, bit for bit."""

import horovod.torch as horovod
import pytest
import torch

import hvd_accordion.torch as hvd
from tests.parallel.workers.torch.common import flat, model, sgd, train


def trained(factory, passes=1, plain_sgd=False, **options):
    net = model()
    optimizer = sgd(net, momentum=0.0 if plain_sgd else 0.9)
    optimizer = factory.DistributedOptimizer(
        optimizer, net.named_parameters(), backward_passes_per_step=passes, **options
    )
    train(net, optimizer, range(20), passes)
    return flat(net), optimizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"plain_sgd": True},
        {"passes": 2},
        {"op": hvd.Sum},
        {"op": hvd.Adasum},
        {"groups": 2},
        {"compression": hvd.Compression.fp16},
        {"gradient_predivide_factor": 2.0},
    ],
    ids=str,
)
def test_equals_horovod(options):
    theirs, _ = trained(horovod, **options)
    ours, optimizer = trained(hvd, **options)
    assert torch.equal(ours, theirs)
    assert isinstance(optimizer, torch.optim.SGD)
    if options.get("op") is not hvd.Adasum:
        half = 2 if "compression" in options else 1
        assert optimizer.stats.steps == 20
        assert optimizer.stats.ratio == half
        assert optimizer.stats.sent_bytes == pytest.approx(20 * 4 * ours.numel() / half * 2 * (1 - 1 / hvd.size()))
        assert len(optimizer.compression_report()) == len(list(model().parameters()))


def test_counts_epochs_and_nothing_of_a_broadcast():
    net = model()
    optimizer = hvd.DistributedOptimizer(sgd(net), net.named_parameters(), steps_per_epoch=4)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.stats.steps == 0
    train(net, optimizer, range(8))
    optimizer.end_epoch()
    assert optimizer._hvd.controller.epoch == 2
