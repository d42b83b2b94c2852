"""What a channel keeps from exchange to exchange: the residual's decay, exchanges that do not end."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_accordion import QSGD, Dense, EFSignSGD, PowerSGD, TopK
from hvd_accordion.comm import simulation
from hvd_accordion.compression import Context, exchange
from hvd_accordion.ops import numpy as numpy_ops
from hvd_accordion.policy.layers import Group, Layer
from hvd_accordion.training.channel import Channel
from tests.compression.test_contract import each, over_numpy, to_numpy
from tests.ops.backends import BACKENDS

SHAPES = {"a": (12, 10), "b": (4, 3, 3)}
LAYERS = tuple(Layer(name, shape, "float64") for name, shape in SHAPES.items())
BETA = 0.9


def gradients(step: int, rank: int) -> list[np.ndarray]:
    rng = np.random.default_rng((step, rank))
    return [rng.standard_normal(shape) for shape in SHAPES.values()]


def channels(backend: str, ranks: int, **settings) -> list[Channel]:
    return [Channel(BACKENDS[backend][0], 0, rank, ranks, **settings) for rank in range(ranks)]


def exchanged(backend, everyones, spec, step, grads=gradients):
    to, group = BACKENDS[backend][1], Group("g", spec, LAYERS, True)
    given = [each(to, grads(step, channel.rank)) for channel in everyones]
    return simulation.run([over_numpy(c.exchange(group, g, step), to) for c, g in zip(everyones, given, strict=True)])[
        0
    ]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decaying_residual_enters_the_next_value_beta_times(backend, ranks):
    """v = g + beta e; send C(v); e = v - C(v), over changes of the spec, against a numpy loop without any residual."""
    everyones = channels(backend, ranks, residual_decay=BETA)
    e = [[np.zeros(shape) for shape in SHAPES.values()] for _ in range(ranks)]
    for step, spec in enumerate([TopK(0.1), EFSignSGD(), PowerSGD(2, warm_start=False), QSGD(1), Dense(), EFSignSGD()]):
        done = exchanged(backend, everyones, spec, step)
        v = [[g + BETA * x for g, x in zip(gradients(step, r), e[r], strict=True)] for r in range(ranks)]
        contexts = [Context(tuple(SHAPES), "float64", step, 0, r, ranks) for r in range(ranks)]
        zeros = [[np.zeros(shape) for shape in SHAPES.values()] for _ in range(ranks)]
        rounds = [exchange(spec, numpy_ops, v[r], zeros[r], [{}, {}], contexts[r]) for r in range(ranks)]
        expected, _ = simulation.run(rounds)
        e = [x.residual for x in expected]
        for channel, ours, theirs in zip(everyones, done, expected, strict=True):
            for i, name in enumerate(SHAPES):
                np.testing.assert_allclose(ours.mean[i], theirs.mean[i], rtol=0, atol=1e-12)
                kept = to_numpy(channel.residual[name])
                np.testing.assert_allclose(kept, BETA * theirs.residual[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_not_finite_does_not_decay(backend):
    everyones = channels(backend, 2, residual_decay=BETA)
    exchanged(backend, everyones, EFSignSGD(), 0)
    before = [each(to_numpy, dict(c.residual)) for c in everyones]

    def broken(step, rank):
        return [x + (np.nan if rank else 0.0) for x in gradients(step, rank)]

    exchanged(backend, everyones, EFSignSGD(), 1, broken)
    for channel, old in zip(everyones, before, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(to_numpy(channel.residual[name]), old[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [1.0, BETA])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exchange_that_does_not_end_leaves_no_trace(backend, decay):
    """torch has added the gradient in the residual's memory by then."""
    to = BACKENDS[backend][1]
    everyones = channels(backend, 2, residual_decay=decay)
    exchanged(backend, everyones, TopK(0.1), 0)
    channel = everyones[0]
    before = each(to_numpy, dict(channel.residual))
    group = Group("g", EFSignSGD(), LAYERS, True)
    under_way = channel.exchange(group, each(to, gradients(1, 0)), 1)
    under_way.send(None)
    for name, unsent in channel.unsent().items():
        np.testing.assert_allclose(to_numpy(unsent), before[name], rtol=0, atol=1e-12)
    channel.abandon()
    for name in SHAPES:
        np.testing.assert_allclose(to_numpy(channel.residual[name]), before[name], rtol=0, atol=1e-12)
    under_way.close()
