"""1-bit Adam and 0/1 Adam on real ranks: the numpy oracle's trajectory, equal on all ranks, resumed, broadcast."""

import numpy as np
import pytest
import torch

import hvd_accordion.torch as hvd
from hvd_accordion import TopK
from hvd_accordion.torch.optim.one_bit_adam import SIGNS
from tests.optim import adam_oracle
from tests.parallel.workers.torch.common import assert_ranks_equal, flat, loss_of, model

STEPS = 20
CASES = {
    "OneBitAdam": ({"warmup_steps": 8}, set(range(8)), set(range(8, STEPS))),
    "ZeroOneAdam": (
        {"warmup_steps": 8, "kappa": 4, "double_every": 4, "max_interval": 2},
        {0, 1, 2, 3, 4, 6},
        {5, 7, 8, 9, 10, 11, 13, 15, 17, 19},
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_trajectory_is_that_of_the_papers_formulas(kind):
    arguments, dense, exchanges = CASES[kind]
    params = {name: torch.nn.Parameter(torch.from_numpy(x)) for name, x in adam_oracle.start().items()}
    top = TopK(adam_oracle.RATIO, algorithm="allgather")
    optimizer = getattr(hvd, kind)(
        params.values(),
        1.0,
        (0.9, 0.99),
        weight_decay=0.1,
        named_parameters=params.items(),
        compression=top,
        **arguments,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, adam_oracle.rate)
    expected = adam_oracle.Oracle(hvd.size(), dense, exchanges).run(STEPS)
    for step in range(STEPS):
        x = {name: p.detach().numpy().copy() for name, p in params.items()}
        for name, grad in adam_oracle.gradient(x, hvd.rank(), step).items():
            params[name].grad = torch.from_numpy(grad)
        optimizer.step()
        schedule.step()
        for name, p in params.items():
            np.testing.assert_allclose(p.detach().numpy(), expected[step][hvd.rank()][name], atol=1e-10)
            if step in dense | exchanges:
                assert_ranks_equal(p.detach())


@pytest.mark.parametrize("kind", CASES)
def test_a_network_stays_equal_and_goes_on_from_a_broadcast(kind):
    def trained(steps, state=None, values=None):
        net = model()
        optimizer = getattr(hvd, kind)(
            net.parameters(), 3e-3, named_parameters=net.named_parameters(), **CASES[kind][0]
        )
        if state is not None and hvd.rank() == 0:  # rank 0 alone has a checkpoint
            net.load_state_dict(values)
            optimizer.load_state_dict(state)
        hvd.broadcast_parameters(net.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        for step in steps:
            optimizer.zero_grad()
            loss_of(net, step).backward()
            optimizer.step()
        return net, optimizer

    net, optimizer = trained(range(16))
    assert_ranks_equal(flat(net))
    assert {row.spec for row in optimizer.compression_report()} == {str(SIGNS), "Dense()"}
    again, other = trained(range(16, STEPS), optimizer.state_dict(), net.state_dict())
    assert_ranks_equal(flat(again))
    assert other.stats.steps == STEPS and other.stats.sent_bytes > optimizer.stats.sent_bytes
