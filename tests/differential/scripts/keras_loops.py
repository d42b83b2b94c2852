"""Keras's optimizers in loops and train steps of the user's."""

from __future__ import annotations

import keras
import tensorflow as tf

from tests.differential.scripts.keras_examples import examples, loss, network, script


@script
def loop_of_the_users(hvd):
    net, optimizer = network(), hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9))

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            value = loss()(y, net(x, training=True))
        optimizer.apply_gradients(
            zip(tape.gradient(value, net.trainable_variables), net.trainable_variables, strict=True)
        )

    x, y = examples(hvd)
    for i in range(0, 24, 6):
        step(x[i : i + 6], y[i : i + 6])
    return net


@script
def eager_loop_with_apply(hvd):
    net, optimizer = network(), hvd.DistributedOptimizer(keras.optimizers.Adam(0.01))
    x, y = examples(hvd)
    for i in range(0, 24, 6):
        with tf.GradientTape() as tape:
            value = loss()(y[i : i + 6], net(x[i : i + 6], training=True))
        optimizer.apply(tape.gradient(value, net.trainable_variables), net.trainable_variables)
    return net


@script
def a_train_step_of_its_own(hvd):
    class Net(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                value = loss()(y, self(x, training=True)) + 0.01 * sum(
                    tf.reduce_sum(v**2) for v in self.trainable_variables
                )
            grads = tape.gradient(value, self.trainable_variables)
            self.optimizer.apply_gradients(zip(grads, self.trainable_variables, strict=True))
            return {"loss": value}

    net = Net(network().layers)
    net.build((None, 24))
    net.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), jit_compile=False)
    x, y = examples(hvd)
    net.fit(x, y, batch_size=6, shuffle=False, verbose=0)
    return net
