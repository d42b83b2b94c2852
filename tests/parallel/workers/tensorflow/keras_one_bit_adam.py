"""1-bit Adam and 0/1 Adam in Keras on real ranks: the numpy oracle's trajectory, equal ranks, a broadcast of one's state."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow.keras as hvd
from hvd_accordion import TopK
from tests.optim import adam_oracle
from tests.parallel.workers.tensorflow.keras_common import everyone, fit, flat, loss, model

STEPS = 20
INTERVALS = {"warmup_steps": 8, "kappa": 4, "double_every": 4, "max_interval": 2}
CASES = {
    "OneBitAdam": ({"warmup_steps": 8}, set(range(8)), set(range(8, STEPS))),
    "ZeroOneAdam": (INTERVALS, {0, 1, 2, 3, 4, 6}, {5, 7, 8, 9, 10, 11, 13, 15, 17, 19}),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_trajectory_is_that_of_the_papers_formulas(kind):
    """As torch's, see workers/torch/one_bit_adam.py: so both agree."""
    arguments, dense, exchanges = CASES[kind]
    variables = [keras.Variable(x, dtype="float32", name=name) for name, x in adam_oracle.start().items()]
    top = TopK(adam_oracle.RATIO, algorithm="allgather")
    optimizer = getattr(hvd, kind)(1.0, 0.9, 0.99, 1e-8, 0.1, compression=top, **arguments)
    optimizer.build(variables)
    step = tf.function(lambda *grads: optimizer.apply(grads, variables))
    expected = adam_oracle.Oracle(hvd.size(), dense, exchanges).run(STEPS)
    for t in range(STEPS):
        x = {v.name: v.numpy().astype(np.float64) for v in variables}
        optimizer.learning_rate = adam_oracle.rate(t)
        step(*(tf.constant(g, tf.float32) for g in adam_oracle.gradient(x, hvd.rank(), t).values()))
        for v in variables:
            np.testing.assert_allclose(v.numpy(), expected[t][hvd.rank()][v.name], atol=1e-5)
            if t in dense | exchanges:
                rows = everyone(v.numpy())
                assert (rows == rows[0]).all()
    assert step.experimental_get_tracing_count() == 1


def test_fit_keeps_ranks_equal_and_goes_on_from_a_broadcast(tmp_path):
    net = model(seed=7 + hvd.rank())
    net.compile(hvd.ZeroOneAdam(3e-3, **INTERVALS), loss=loss())
    broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    fit(net, epochs=3, steps=4, callbacks=[broadcast])
    rows = everyone(flat(net))
    assert (rows == rows[0]).all()
    net.save(tmp_path / "net.keras")
    again = hvd.load_model(tmp_path / "net.keras") if hvd.rank() == 0 else model(seed=9)
    if hvd.rank() > 0:  # rank 0 alone has a checkpoint
        again.compile(hvd.ZeroOneAdam(3e-3, **INTERVALS), loss=loss())
    fit(again, steps=4, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    rows = everyone(flat(again))
    assert (rows == rows[0]).all()
    steps, sent = again.optimizer.stats.steps, again.optimizer.stats.sent_bytes
    assert steps == 16 and sent > net.optimizer.stats.sent_bytes
    assert (everyone(np.array([steps, sent])) == [steps, sent]).all()


def test_ranks_with_other_schedules_raise_the_same_error():
    variable = keras.Variable(np.zeros((40, 50), np.float32))
    optimizer = hvd.OneBitAdam(warmup_steps=2 + hvd.rank())
    with pytest.raises(ValueError, match=r"Ranks are configured differently: .*warmup_steps"):
        optimizer.apply([tf.ones((40, 50))], [variable])
