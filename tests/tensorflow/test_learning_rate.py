"""The learning rate that counts: of an optimizer in an optimizer, of several, of one that changes it by itself."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow.keras as hvd
from hvd_accordion import Accordion, AccordionBatchSize, TopK
from hvd_accordion.tensorflow.keras.learning_rate import counters, members, rate_of, scaled_rate

RATE = 0.25


class Decaying(keras.optimizers.SGD):
    """Halves its rate in each step: before or after it has used it, by the property or in the variable."""

    def __init__(self, *args, when="after", how="property", **kwargs):
        super().__init__(*args, **kwargs)
        self.when, self.how = when, how

    def halve(self):
        if self.how == "property":
            self.learning_rate = self.learning_rate * 0.5
        else:
            self._learning_rate.assign(self._learning_rate * 0.5)

    def apply(self, grads, trainable_variables=None):
        if self.when == "before":
            self.halve()
        super().apply(grads, trainable_variables)
        if self.when == "after":
            self.halve()


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("how", ["property", "variable"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("scale", [None, 4.0])
def test_a_rate_that_is_changed_in_the_step_stays_changed(scale, when, how, graph):
    optimizer = hvd.DistributedOptimizer(Decaying(RATE, when=when, how=how))
    w = keras.Variable(np.zeros(3, np.float32))
    optimizer.build([w])

    def step():
        with scaled_rate(optimizer, None if scale is None else tf.constant(scale, tf.float64)):
            Decaying.apply(optimizer, [tf.ones(3)], [w])

    (tf.function(step) if graph else step)()
    assert float(optimizer.learning_rate) == RATE / 2
    used = RATE / 2 if when == "before" else RATE
    np.testing.assert_allclose(w.numpy(), -used * (scale or 1.0))
    optimizer.learning_rate = 0.5
    assert float(optimizer.learning_rate) == 0.5


# several optimizers


def network():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential([layers.Input((60,)), layers.Dense(50, name="first"), layers.Dense(40, name="second")])


def several():
    adam, sgd = keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.05, momentum=0.9)
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(sgd, {".*bias": adam}))


def trained(optimizer, epochs=2, steps=4):
    keras.backend.clear_session()
    net = network()
    net.compile(optimizer, loss="mse")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8 * steps, 60), np.float32), rng.standard_normal((8 * steps, 40), np.float32)
    told = [hvd.callbacks.EpochCallback()]
    net.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=told)
    return net


@pytest.mark.parametrize("compression", [None, TopK(0.1), Accordion(interval=1)], ids=str)
def test_a_multi_optimizer_works_as_it_does_alone(compression):
    net, alone = trained(hvd.DistributedOptimizer(several(), compression=compression)), trained(several())
    for ours, theirs in zip(net.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert net.optimizer.stats.steps == 8 and [int(c) for c in counters(net.optimizer)] == [8, 8, 8]
    assert float(rate_of(net.optimizer)) == pytest.approx(0.05)


def test_the_largest_rate_of_several_is_watched():
    optimizer = hvd.DistributedOptimizer(several(), compression=Accordion(interval=1, eta=1e9))
    net = trained(optimizer, epochs=3)
    assert optimizer._hvd.state.levels.numpy().all()
    sgd = next(one for one in members(optimizer) if isinstance(one, keras.optimizers.SGD))
    sgd.learning_rate = 0.001
    net.fit(np.ones((8, 60)), np.ones((8, 40)), verbose=0)
    assert not optimizer._hvd.state.levels.numpy().any()


def test_several_rates_are_scaled_with_the_batch_and_micro_batches_counted_by_all():
    rule = AccordionBatchSize(8, 32, eta=1e3, interval=1, warmup=1)
    net = trained(hvd.DistributedOptimizer(several(), batch_size=rule), epochs=3)
    assert net.optimizer.stats.steps == 12 and net.optimizer.stats.updates == 9
    assert {int(c) for c in counters(net.optimizer)} == {12}
    assert [float(one.learning_rate) for one in members(net.optimizer)] == pytest.approx([0.01, 0.05])
