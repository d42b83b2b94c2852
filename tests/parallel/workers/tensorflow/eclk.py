"""ECLK and its siblings over TensorFlow's variables on real ranks: numpy's trajectory, resumed bit for bit, errors."""

import pickle

import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
from tests.parallel import convex
from tests.parallel.workers.tensorflow.keras_common import assert_ranks_equal


class Problem:
    def __init__(self, case):
        name, compression, arguments, self.sampled = convex.CASES[case]
        given = {} if compression is None else {"compression": compression}
        x, labels = convex.data(hvd.rank())
        self.x, self.labels = tf.constant(x), tf.constant(labels)
        self.params = [tf.Variable(v) for v in convex.start()]
        self.optimizer = getattr(hvd, name)(self.params, **given, **arguments)
        self.loss_of = tf.function(self._loss_of)

    def _loss_of(self, x, labels):
        weight, bias = self.params
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, x @ weight + bias))
        return loss + convex.RIDGE / 2 * (tf.reduce_sum(weight**2) + tf.reduce_sum(bias**2))

    def full(self):
        return self.loss_of(self.x, self.labels)

    def step(self, step):
        rows = convex.sample(hvd.rank(), step)
        closure = (
            (lambda: self.loss_of(tf.gather(self.x, rows), tf.gather(self.labels, rows))) if self.sampled else self.full
        )
        return self.optimizer.step(closure, self.full)

    def values(self):
        return [v.numpy() for v in self.params]


@pytest.mark.parametrize("case", convex.CASES)
def test_the_trajectory_is_that_of_simulated_ranks(case):
    problem = Problem(case)
    for step in range(convex.STEPS):
        problem.step(step)
    expected = convex.simulated(case, hvd.size())
    assert convex.distance(problem.values(), expected.x) < 1e-8
    with problem.optimizer.solution():
        assert convex.distance(problem.values(), expected.solution) < 1e-8
    for v in problem.params:
        assert_ranks_equal(v.numpy())
    assert problem.optimizer.stats.sent_bytes == expected.sent_bytes
    regimes = {row.regime for row in problem.optimizer.compression_report()}
    assert ("relaxed" in regimes) == (case == "eclk-accordion")


@pytest.mark.parametrize("case", ["eclk-topk-learnt", "eclk-powersgd", "eclk-accordion"])
def test_resumed_bit_for_bit(case):
    through = Problem(case)
    for step in range(12):
        through.step(step)
        if step == 6:
            saved, values = pickle.dumps(through.optimizer.state_dict()), through.values()
    resumed = Problem(case)
    for v, value in zip(resumed.params, values, strict=True):
        v.assign(value)
    resumed.optimizer.load_state_dict(pickle.loads(saved))
    for step in range(7, 12):
        resumed.step(step)
    assert all(np.array_equal(a, b) for a, b in zip(through.values(), resumed.values(), strict=True))
    assert resumed.optimizer.stats.sent_bytes == through.optimizer.stats.sent_bytes


def test_smoothness_is_torchs():
    """Of the Hessian that numpy differences: the two frameworks measure the same."""
    problem = Problem("eclk-topk")
    everyone = [convex.data(rank) for rank in range(hvd.size())]

    def gradient(flat):
        point = [flat[: convex.FEATURES * convex.CLASSES].reshape(convex.FEATURES, -1), flat[-convex.CLASSES :]]
        found = [np.concatenate([g.ravel() for g in convex.gradient(point, *mine)]) for mine in everyone]
        return np.mean(found, axis=0)

    d, r = convex.FEATURES * convex.CLASSES + convex.CLASSES, 1e-5
    hessian = np.stack([(gradient(r * e) - gradient(-r * e)) / (2 * r) for e in np.eye(d)])
    found = hvd.estimate_smoothness(problem.full, problem.params, iterations=200)
    assert found == pytest.approx(np.linalg.eigvalsh((hessian + hessian.T) / 2)[-1], rel=0.02)
    assert all((v.numpy() == 0).all() for v in problem.params)


def test_ranks_that_start_apart_raise_the_same_error():
    problem = Problem("eclk-topk")
    problem.params[1].assign(problem.params[1] + hvd.rank())
    with pytest.raises(ValueError, match=r"Ranks are configured differently: .*broadcast_parameters"):
        problem.step(0)


def test_missing_closures():
    problem = Problem("eclk-topk")
    with pytest.raises(TypeError, match="full_closure must be a function"):
        problem.optimizer.step(problem.full)
    with pytest.raises(ValueError, match="params must be variables"):
        hvd.ECLK([tf.constant(1.0)], smoothness=1.0)
