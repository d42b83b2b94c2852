"""Trainings of torch, bit for bit as they were recorded (tests/golden)."""

import pytest
import torch
import torch.nn.functional as F

import hvd_accordion.torch as hvd
from hvd_accordion.torch.exchange.calibration import Probe
from tests.golden.trajectories import (
    CASES,
    HALF,
    LOCAL,
    RATE,
    SAVED,
    STEPS,
    Golden,
    batch,
    fingerprint,
    state_file,
    weights,
)
from tests.parallel import convex

GOLDEN = Golden("torch", fingerprint(torch.__version__))


@pytest.fixture(autouse=True)
def link(monkeypatch):
    """A link of 1 kbyte/s, whatever is measured."""
    monkeypatch.setattr(Probe, "_allreduce", lambda self, size, device: 1e-6 + size / 1e3)
    monkeypatch.setattr(Probe, "end_exchange", lambda self, waited: None)


class Training:
    def __init__(self, case):
        self.p = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in weights().items()}
        sgd = torch.optim.SGD(self.p.values(), lr=RATE, momentum=0.5)
        arguments = {"min_compress_numel": 64, **{**CASES, **LOCAL}[case]} if case != "none" else {}
        self.optimizer = hvd.DistributedOptimizer(sgd, self.p.items(), **arguments)

    def step(self, step):
        x, y = map(torch.tensor, batch(step, hvd.rank()))
        h = torch.tanh(x @ self.p["w1"] + self.p["b1"])
        h = torch.tanh(h @ self.p["w2"].reshape(24, 24) + self.p["b2"])
        self.optimizer.zero_grad()
        ((h @ self.p["w3"] + self.p["b3"] - y) ** 2).mean().backward()
        self.optimizer.step()

    def values(self):
        return {name: p.detach().numpy() for name, p in self.p.items()}

    def check(self, case):
        regimes = [row.regime for row in self.optimizer.compression_report()] if case != "none" else []
        sent = self.optimizer.stats.sent_bytes if case != "none" else 0
        if hvd.rank() == 0:
            GOLDEN.check(case, self.values(), regimes=regimes, sent=sent)


@pytest.mark.parametrize("case", [*CASES, *LOCAL])
def test_parameters_are_as_recorded(case):
    training = Training(case)
    for step in range(STEPS):
        training.step(step)
        if GOLDEN.recording and step == HALF and case in SAVED:
            saved = {"optimizer": training.optimizer.state_dict(), "params": training.p}
            torch.save(saved, state_file("torch", case, hvd.rank()))
    training.check(case)


@pytest.mark.parametrize("case", SAVED)
def test_goes_on_from_a_recorded_state(case):
    training = Training(case)
    saved = torch.load(state_file("torch", case, hvd.rank()), weights_only=True)
    with torch.no_grad():
        for name, p in training.p.items():
            p.copy_(saved["params"][name])
    training.optimizer.load_state_dict(saved["optimizer"])
    for step in range(HALF + 1, STEPS):
        training.step(step)
    training.check(case)


@pytest.mark.parametrize("case", convex.CASES)
def test_iterates_are_as_recorded(case):
    name, compression, arguments, sampled = convex.CASES[case]
    given = {} if compression is None else {"compression": compression}
    x, labels = (torch.from_numpy(v) for v in convex.data(hvd.rank()))
    weight, bias = (torch.nn.Parameter(torch.from_numpy(v)) for v in convex.start())
    optimizer = getattr(hvd, name)([weight, bias], **given, **arguments)

    def loss(rows=slice(None)):
        loss = F.cross_entropy(x[rows] @ weight + bias, labels[rows])
        loss = loss + convex.RIDGE / 2 * (weight.square().sum() + bias.square().sum())
        loss.backward()
        return loss.detach()

    for step in range(STEPS):
        rows = convex.sample(hvd.rank(), step)
        optimizer.step((lambda rows=rows: loss(rows)) if sampled else loss, loss)
    if hvd.rank() == 0:
        values = {"weight": weight.detach().numpy(), "bias": bias.detach().numpy()}
        GOLDEN.check(f"optim {case}", values, sent=optimizer.stats.sent_bytes)
