"""Accordion among hosts: ranks stay bit-equal, and what is counted leaves each host's own interface."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, Dense, PowerSGD, TopK

HOSTS = int(os.environ["TEST_HOSTS"])


def on_the_wire() -> int:
    """Bytes that this host's interface has sent."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


@pytest.fixture(scope="module", autouse=True)
def ranks():
    hvd.init()
    yield
    hvd.shutdown()


def assert_ranks_equal(net: torch.nn.Module) -> None:
    flat = torch.cat([parameter.detach().reshape(1, -1) for parameter in net.parameters()], dim=1)
    everyone = hvd.allgather(flat, name="weights")
    assert torch.isfinite(everyone).all()
    assert all(torch.equal(everyone[0], other) for other in everyone[1:])


def test_each_rank_has_a_host_of_its_own():
    assert hvd.size() == HOSTS and hvd.local_size() == 1 and hvd.cross_rank() == hvd.rank()
    assert socket.gethostname() == f"node{hvd.rank() + 1}"


@pytest.mark.parametrize(
    "compression",
    [
        Accordion(critical=PowerSGD(64), relaxed=PowerSGD(32), interval=4, unit="steps"),
        Accordion(critical=TopK(0.2), relaxed=TopK(0.1), interval=4, unit="steps"),
    ],
    ids=["PowerSGD", "TopK"],
)
def test_accordion(compression):
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Tanh(), torch.nn.Linear(1024, 1024))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), net.named_parameters(), compression=compression
    )
    specs = {str(spec): spec for spec in (compression.critical, compression.relaxed, Dense())}
    regimes, predicted = set(), 0.0

    def step(number: int) -> None:
        generator = torch.Generator().manual_seed(1000 * number + hvd.rank())
        inputs = torch.randn(8, 1024, generator=generator)
        optimizer.zero_grad()
        (net(inputs) - inputs.roll(1, 1)).square().mean().backward()
        optimizer.step()

    step(0)
    hvd.barrier()
    wire, counted = on_the_wire(), optimizer.stats.sent_bytes
    for number in range(1, 15):
        layers = optimizer.compression_report()
        regimes |= {layer.regime for layer in layers if layer.regime}
        predicted += sum(specs[layer.spec].bytes_per_step(layer.shape, "float32", HOSTS) for layer in layers)
        step(number)
    hvd.barrier()
    wire, counted = on_the_wire() - wire, optimizer.stats.sent_bytes - counted
    print(
        f"rank {hvd.rank()}: predicted {predicted:,.0f} bytes, counted {counted:,.0f}, on the wire {wire:,.0f}", regimes
    )
    assert_ranks_equal(net)
    assert regimes == {"critical", "relaxed"}
    assert counted == pytest.approx(predicted, rel=1e-4)  # groups round their shares
    assert counted == pytest.approx(wire, rel=0.05)
