"""The TensorFlow half: the same weights from the same batches, seeds and names."""

import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
from tests.parallel.parity import RATE, SPECS, STEPS, batch, dtype, file, weights


@pytest.mark.parametrize("name", SPECS)
def test_comes_to_the_weights_of_torch(name):
    p = {key: tf.Variable(value, name=key) for key, value in weights(dtype(name)).items()}
    start = np.concatenate([v.numpy().ravel() for v in p.values()])
    averaging = hvd.GradientExchange(SPECS[name], learning_rate=RATE)

    @tf.function
    def train(x, y):
        with tf.GradientTape() as tape:
            h = tf.tanh(x @ p["w1"] + p["b1"])
            h = tf.tanh(h @ tf.reshape(p["w2"], (64, 48)) + p["b2"])
            loss = tf.reduce_mean((h @ p["w3"] + p["b3"] - y) ** 2)
        tape = hvd.DistributedGradientTape(tape, compression=averaging)
        for v, g in zip(p.values(), tape.gradient(loss, list(p.values())), strict=True):
            v.assign_sub(RATE * g)

    for step in range(STEPS):
        train(*map(tf.constant, batch(step, hvd.rank(), dtype(name))))
    theirs = np.load(file(name))
    ours = np.concatenate([v.numpy().ravel() for v in p.values()])
    expected = np.concatenate([theirs[key].ravel() for key in p])
    error = np.abs(ours - expected).max()
    assert [row.regime or "" for row in averaging.compression_report()] == theirs["regimes"].tolist()
    assert averaging.stats.sent_bytes == pytest.approx(float(theirs["sent"]))
    assert error <= 1e-4 < 0.05 < np.abs(expected - start).max()
