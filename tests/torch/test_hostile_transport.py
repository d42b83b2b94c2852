"""The whole torch exchange over a transport that delays, shuffles and poisons: as over one that does not."""

from __future__ import annotations

import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, AccordionBatchSize, Auto, Dense, PowerSGD, TopK
from tests.parallel import reference
from tests.torch.simulated_ranks import HostileTransport, SimulatedRanks, SimulatedTransport

STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def horovod():
    hvd.init()


class Network(torch.nn.Module):
    """An embedding with sparse gradients, matrices, tied weights, a layer that some steps do not use."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(30, 40, sparse=True)
        self.first, self.tied = torch.nn.Linear(40, 48), torch.nn.Linear(48, 48)
        self.sometimes, self.last = torch.nn.Linear(48, 48), torch.nn.Linear(48, 8)

    def forward(self, x, step):
        x = torch.tanh(self.first(self.table(x)))
        x = torch.tanh(self.tied(torch.tanh(self.tied(x))))
        return self.last(torch.tanh(self.sometimes(x)) if step % 2 else x)


def trained(kind, ranks, micro_batches=1, by_hand=False, **options):
    """Parameters, residuals and sent bytes of each rank after some steps over this kind of transport."""
    with pytest.MonkeyPatch.context() as patch:
        cluster = SimulatedRanks(ranks, patch, kind)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            nets = [Network() for _ in range(ranks)]
        for net in nets:
            net.load_state_dict(nets[0].state_dict())

        def script(rank):
            net = nets[rank]
            optimizer = hvd.DistributedOptimizer(
                torch.optim.SGD(net.parameters(), 0.1),
                net.named_parameters(),
                process_set=cluster.process_sets[rank],
                **options,
            )
            for step in range(STEPS * micro_batches):
                generator = torch.Generator().manual_seed(100 * rank + step)
                x = torch.randint(30, (6,), generator=generator)
                net(x, step).square().sum().backward()
                if by_hand:
                    optimizer.synchronize()
                    with optimizer.skip_synchronize():
                        optimizer.step()
                else:
                    optimizer.step()
                optimizer.zero_grad()
            return [p.detach() for p in net.parameters()], optimizer._hvd.residual, optimizer.stats.sent_bytes

        return cluster.run(script)


def assert_same(hostile, friendly):
    for (params, residual, sent), (others, waiting, theirs) in zip(hostile, friendly, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
        assert residual.keys() == waiting.keys() and all(torch.equal(x, waiting[n]) for n, x in residual.items())
        assert sent == theirs and all(bool(torch.isfinite(p).all()) for p in params)


@pytest.mark.parametrize("name", reference.SPECS)
def test_every_spec(name):
    spec = {"compression": reference.SPECS[name]}
    assert_same(trained(HostileTransport, 2, **spec), trained(SimulatedTransport, 2, **spec))


CASES = {
    "accordion": {"compression": Accordion(PowerSGD(4), TopK(0.05), interval=2, unit="steps")},
    "kinds": {"compression": {"first*": Dense(), "tied*": PowerSGD(2), "*": TopK(0.1)}},
    "uneven": {"compression": TopK(0.1), "uneven_inputs": True},
    "batch": {
        "compression": PowerSGD(2),
        "batch_size": AccordionBatchSize(6, 12, interval=2, unit="steps", warmup=0),
        "micro_batches": 2,
    },
    "sparse as dense": {"compression": PowerSGD(2), "sparse_as_dense": True},
    "sums": {"compression": PowerSGD(2), "op": hvd.Sum, "gradient_predivide_factor": 1.0},
    "by hand": {"compression": TopK(0.1), "by_hand": True},
    "groups": {"compression": PowerSGD(2), "groups": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_the_whole_exchange(name):
    assert_same(trained(HostileTransport, 3, **CASES[name]), trained(SimulatedTransport, 3, **CASES[name]))


def test_an_auto_chooses_the_same_on_all_ranks():
    results = trained(HostileTransport, 2, compression=Auto((PowerSGD(2), TopK(0.02))))
    assert all(torch.equal(p, q) for p, q in zip(results[0][0], results[1][0], strict=True))


def test_the_hostile_transport_is_hostile():
    """Inputs are poisoned while in flight, and results are nowhere to be seen before `wait`."""
    with pytest.MonkeyPatch.context() as patch:
        cluster = SimulatedRanks(2, patch, HostileTransport)

        def script(rank):
            x, y = torch.full((3,), float(rank)), torch.arange(4.0)
            summed, gathered = cluster.transport.allreduce([x], "x"), cluster.transport.allgather(y, "y")
            polls = 0
            while not cluster.transport.poll(summed):
                polls += 1
            assert torch.isnan(x).all() and torch.isnan(y).all()
            (result,) = cluster.transport.wait(summed)
            assert result is x and x.tolist() == [1.0] * 3
            assert cluster.transport.wait(gathered).tolist() == 2 * [0.0, 1.0, 2.0, 3.0] and y.tolist() == [0, 1, 2, 3]
            return polls

        cluster.run(script)
