"""Horovod's documented elastic pattern under Horovod alone: what the other workers' forms are compared with."""

import os

import horovod.torch as hvd
import torch

from tests.elastic.changes import Changes

torch.set_num_threads(1)
hvd.init()
changes = Changes()
model = torch.nn.Linear(4, 1)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
print("started", os.getpid(), flush=True)


@hvd.elastic.run
def train(state):
    changes.enter()
    changes.record(rank=hvd.rank(), size=hvd.size(), batch=state.batch)
    while not changes.step(hvd.rank(), hvd.size()):
        optimizer.zero_grad()
        (model(torch.ones(1, 4)) * (hvd.rank() + 1)).sum().backward()
        optimizer.step()
        mean = (hvd.size() + 1) / 2
        assert torch.allclose(model.bias.grad, torch.tensor([mean])), (model.bias.grad, hvd.size())
        state.batch += 1
        if state.batch % 3 == 0:
            state.commit()


train(hvd.elastic.TorchState(model=model, optimizer=optimizer, batch=0))
