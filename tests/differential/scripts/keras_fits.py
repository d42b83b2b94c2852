"""Keras under `fit`: optimizers and their arguments, callbacks, kinds of layers and of gradients."""

from __future__ import annotations

import keras

from tests.differential.scripts.keras_examples import examples, fitted, loss, network, script


@script
def plain_fit(hvd):
    return fitted(hvd, network(), keras.optimizers.SGD(0.1), epochs=2)


@script
def adamw_with_schedule(hvd):
    rate = keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.5)
    return fitted(hvd, network(), keras.optimizers.AdamW(rate, weight_decay=0.01))


@script
def nesterov_and_global_clipping(hvd):
    return fitted(hvd, network(), keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, global_clipnorm=0.05))


@script
def clips_each_norm(hvd):
    return fitted(hvd, network(), keras.optimizers.SGD(0.1, clipnorm=0.02))


@script
def clips_values(hvd):
    return fitted(hvd, network(), keras.optimizers.SGD(0.1, clipvalue=0.003))


@script
def moving_averages(hvd):
    return fitted(hvd, network(), keras.optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=2))


@script
def accumulates_as_keras_does(hvd):
    return fitted(hvd, network(), keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))


@script
def several_steps_an_execution(hvd):
    return fitted(hvd, network(), keras.optimizers.SGD(0.1), steps_per_execution=2)


@script
def eagerly(hvd):
    return fitted(hvd, network(), keras.optimizers.Adam(0.01), run_eagerly=True)


@script
def rate_set_by_a_callback(hvd):
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    return fitted(hvd, network(), keras.optimizers.SGD(0.1), epochs=2, callbacks=[schedule])


@script
def batch_by_batch(hvd):
    net = network()
    net.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss(), jit_compile=False)
    x, y = examples(hvd)
    for i in range(0, 24, 6):
        net.train_on_batch(x[i : i + 6], y[i : i + 6])
    return net


@script
def a_frozen_layer(hvd):
    net = network()
    net.get_layer("first").trainable = False
    return fitted(hvd, net, keras.optimizers.SGD(0.1))


@script
def embedding(hvd):
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Input((24,)), keras.layers.Discretization([-1, 0, 1]), keras.layers.Embedding(5, 8)]
    net = keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(4)])
    return fitted(hvd, net, keras.optimizers.SGD(0.1))


@script
def one_layer_twice(hvd):
    keras.utils.set_random_seed(3)
    layer = keras.layers.Dense(24, "tanh")
    return fitted(
        hvd,
        keras.Sequential([keras.layers.Input((24,)), layer, layer, keras.layers.Dense(4)]),
        keras.optimizers.SGD(0.1),
    )


@script
def several_optimizers_in_one(hvd):
    each = {".*bias": keras.optimizers.Adam(0.01)}
    by_variable = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1, momentum=0.9), each)
    return fitted(hvd, network(), keras.optimizers.MultiOptimizer(by_variable))


@script
def in_an_optimizer_of_the_users(hvd):
    class Around(keras.optimizers.Optimizer):
        """Hands every gradient on, as one does who wants to see them."""

        def __init__(self, inner):
            super().__init__(0.0)
            self.inner = inner

        def build(self, variables):
            self.inner.build(variables)
            super().build(variables)

        def apply(self, grads, trainable_variables=None):
            self.inner.apply([1.0 * g for g in grads], trainable_variables)

    net = network()
    net.compile(Around(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))), loss(), jit_compile=False)
    net.fit(*examples(hvd), batch_size=6, shuffle=False, verbose=0)
    return net


@script
def halves_its_rate_in_each_step(hvd):
    class Halving(keras.optimizers.SGD):
        def apply(self, grads, trainable_variables=None):
            super().apply(grads, trainable_variables)
            self.learning_rate = self.learning_rate * 0.5

    return fitted(hvd, network(), Halving(0.2))
