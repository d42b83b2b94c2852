"""The bytes that are counted are those that the kernel sees on the interface (Gloo over loopback)."""

import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import BF16, QSGD, Dense, PowerSGD, RandomK, TopK
from tests.parallel.reference import on_the_wire

SHAPE = (2048, 1024)  # 8 MB: messages of all specs are large against Horovod's own


@pytest.mark.parametrize("spec", [Dense(), BF16(), RandomK(0.3), TopK(0.1), QSGD(7), PowerSGD(64)], ids=str)
def test_counted_is_sent(spec):
    weight = torch.nn.Parameter(torch.zeros(SHAPE))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([weight], lr=0.1), [("w", weight)], compression=spec)
    gradient = torch.randn(SHAPE)

    def step():
        optimizer.zero_grad()
        (weight * gradient).sum().backward()
        optimizer.step()

    step()
    hvd.barrier()
    steps, wire, counted = 10, on_the_wire(), optimizer.stats.sent_bytes
    for _ in range(steps):
        step()
    hvd.barrier()
    wire, counted = (on_the_wire() - wire) / hvd.size(), optimizer.stats.sent_bytes - counted
    print(f"{spec}: counted {counted / steps:,.0f} bytes a step, on the wire {wire / steps:,.0f}")
    assert counted == pytest.approx(wire, rel=0.05)
    assert counted / steps == pytest.approx(spec.bytes_per_step(SHAPE, "float32", hvd.size()))
