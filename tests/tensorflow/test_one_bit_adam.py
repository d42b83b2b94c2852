"""1-bit Adam and 0/1 Adam in Keras: the numpy oracle's trajectory, `fit`, files, what they refuse."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow.keras as hvd
from hvd_accordion import Dense, TopK
from tests.optim import adam_oracle

TOP = TopK(adam_oracle.RATIO, algorithm="allgather")
NUMBERS = {"beta_2": 0.99, "weight_decay": 0.1, "epsilon": 1e-8}
STEPS = 30
INTERVALS = {"warmup_steps": 9, "kappa": 3, "double_every": 4, "max_interval": 3}
DENSE, LOCAL = {0, 1, 2, 3, 5, 7}, {13, 15, 17, 18, 20, 21, 23, 24, 26, 27, 29}
CASES = {
    "OneBitAdam": ({"warmup_steps": 10}, set(range(10)), set(range(10, STEPS))),
    "ZeroOneAdam": (INTERVALS, DENSE, set(range(STEPS)) - DENSE - LOCAL),
}


def trajectory(kind, ranks, dtype, traced, **arguments):
    """Of rank 0, whose gradients all ranks have."""
    variables = [keras.Variable(x.astype(dtype), dtype=dtype, name=name) for name, x in adam_oracle.start().items()]
    optimizer = getattr(hvd, kind)(1.0, process_set=ranks, compression=TOP, **NUMBERS, **arguments)
    optimizer.build(variables)
    step = lambda *grads: optimizer.apply(grads, variables)  # noqa: E731
    step, traces = (tf.function(step), 1) if traced else (step, 0)
    found = []
    for t in range(STEPS):
        x = {v.name: v.numpy().astype(np.float64) for v in variables}
        optimizer.learning_rate = adam_oracle.rate(t)
        step(*(tf.constant(g, dtype) for g in adam_oracle.gradient(x, 0, t).values()))
        found.append({v.name: v.numpy() for v in variables})
    assert not traced or step.experimental_get_tracing_count() == traces
    return found, optimizer


class Alike(adam_oracle.Oracle):
    """Whose ranks all have rank 0's gradients: as one, but for what TopK leaves."""


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize(("dtype", "traced", "tolerance"), [("float32", True, 1e-5), ("float64", False, 1e-7)])
def test_the_trajectory_is_that_of_the_papers_formulas(kind, dtype, traced, tolerance, twins):
    arguments, dense, exchanges = CASES[kind]
    found, optimizer = trajectory(kind, twins, dtype, traced, **arguments)
    expected = adam_oracle.Oracle(1, dense, exchanges).run(STEPS)
    for t in range(STEPS):
        for name in adam_oracle.SHAPES:
            np.testing.assert_allclose(found[t][name], expected[t][0][name], atol=tolerance, err_msg=f"{t} {name}")
    assert optimizer.stats.steps == STEPS and not optimizer.warming_up
