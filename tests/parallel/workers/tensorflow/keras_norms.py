"""The norms that Accordion sees are those of the averaged gradients' watched entries, on every rank the same."""

import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
from hvd_accordion import Accordion, Dense, PowerSGD, TopK
from hvd_accordion.ops import numpy as ops
from hvd_accordion.policy import norm_sampling

SHAPES = {"small": (40, 50), "large": (150, 90)}


@pytest.mark.parametrize("norm", ["sampled", "exact"])
@pytest.mark.parametrize("critical", [Dense(), PowerSGD(4)], ids=str)
def test_norms_are_numpys(critical, norm):
    """Two windows of a graph, with NaN on one rank in a step of the first."""
    accordion = Accordion(critical, TopK(0.02), interval=4, unit="steps", norm=norm)
    variables = [tf.Variable(tf.zeros(shape), name=name) for name, shape in SHAPES.items()]
    averaging = hvd.GradientExchange(accordion, seed=5)
    step = tf.function(lambda gradients: averaging(gradients, variables))
    for window in range(2):
        total = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        for i in range(4):
            rng = np.random.default_rng(100 * hvd.rank() + 4 * window + i)
            mine = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES.values()]
            bad = window == 0 and i == 1
            if bad and hvd.rank() == 0:
                mine[0][0, 0] = np.nan
            means = step([tf.constant(g) for g in mine])
            for name, mean in zip(SHAPES, means, strict=True):
                total[name] += 0 if bad else mean.numpy()
        averaging.compression_report()
        found = averaging._engine.controller.levels.observers[0].norms
        for name, x in total.items():
            size = accordion.window.sample_size(x.size)
            picked = norm_sampling.entries(ops, name, x.size, size, 5, x)
            expected = norm_sampling.scale(x.size, size) * np.linalg.norm(x.reshape(-1)[picked])
            assert found[name] == pytest.approx(expected, rel=1e-5), (window, name)
    everyone = hvd.allgather(tf.constant([[found[name] for name in SHAPES]], tf.float64), name="norms").numpy()
    assert (everyone == everyone[0]).all()
