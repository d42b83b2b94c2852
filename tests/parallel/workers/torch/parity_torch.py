"""The torch half of the comparison of both frameworks."""

import numpy as np
import pytest
import torch

import hvd_accordion.torch as hvd
from tests.parallel.parity import RATE, SPECS, STEPS, batch, dtype, file, weights


@pytest.mark.parametrize("name", SPECS)
def test_trains_and_leaves_its_weights(name):
    p = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in weights(dtype(name)).items()}
    optimizer = torch.optim.SGD(p.values(), lr=RATE)
    optimizer = hvd.DistributedOptimizer(optimizer, p.items(), compression=SPECS[name])
    for step in range(STEPS):
        x, y = map(torch.tensor, batch(step, hvd.rank(), dtype(name)))
        h = torch.tanh(x @ p["w1"] + p["b1"])
        h = torch.tanh(h @ p["w2"].reshape(64, 48) + p["b2"])
        optimizer.zero_grad()
        ((h @ p["w3"] + p["b3"] - y) ** 2).mean().backward()
        optimizer.step()
    if hvd.rank() == 0:
        regimes = [row.regime or "" for row in optimizer.compression_report()]
        sent = optimizer.stats.sent_bytes
        np.savez(file(name), regimes=regimes, sent=sent, **{key: value.detach().numpy() for key, value in p.items()})
