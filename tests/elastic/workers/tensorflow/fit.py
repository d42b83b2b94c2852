"""Horovod's documented elastic form of `fit`, with several compressions and the adaptive batch in one optimizer.

After every batch ranks are bit-equal; a weight whose gradient is known tells whether a mean has the right scale.
"""

import os

import keras
import numpy as np
import tensorflow as tf

import hvd_accordion.tensorflow.keras as hvd
from hvd_accordion import Accordion, AccordionBatchSize, PowerSGD, TopK
from tests.elastic.changes import Changes

LR, SMALL, STEPS = 0.01, 12, 24
SPECS = {
    "power*": PowerSGD(2),
    "top*": TopK(0.1),
    "adaptive*": Accordion(TopK(0.2), TopK(0.05), eta=1e9, interval=1),  # relaxed from the first comparison on
}

hvd.init()
os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = "60"  # from the first change on: whoever comes has TensorFlow to import
changes = Changes()
keras.utils.set_random_seed(3)


class Probe(keras.layers.Layer):
    """A weight whose gradient is the mean of the inputs: here of rank + 1."""

    def build(self, shape):
        self.weight = self.add_weight(shape=(), initializer="zeros", name="weight")

    def call(self, x):
        return x * self.weight


x, ranks = keras.Input((32,)), keras.Input((1,))
outputs = [
    keras.layers.Dense(4, name=f"{name}_b")(keras.layers.Dense(48, "tanh", name=f"{name}_a")(x))
    for name in ("dense", "power", "top", "adaptive")
]
probe = Probe(name="probe")
model = keras.Model([x, ranks], [*outputs, probe(ranks)])
opt = hvd.DistributedOptimizer(
    keras.optimizers.SGD(LR * hvd.size()),
    compression=SPECS,
    batch_size=AccordionBatchSize(SMALL, 2 * SMALL, eta=1e9, interval=1, warmup=0),
)
model.compile(loss=["mse"] * 4 + [lambda _, y: tf.reduce_mean(y)], optimizer=opt)
generator = np.random.default_rng(1)
examples = generator.standard_normal((SMALL * 8, 32), np.float32)
targets = (examples @ generator.standard_normal((32, 4)) / 6).astype(np.float32)


def dataset():
    """This rank's part of each batch."""
    mine = np.arange(hvd.rank(), len(examples), hvd.size())
    numbers = np.full((len(mine), 1), hvd.rank() + 1.0, np.float32)
    y = targets[mine]
    data = tf.data.Dataset.from_tensor_slices(((examples[mine], numbers), (y, y, y, y, numbers)))
    return data.batch(SMALL // hvd.size()).repeat()


class Check(keras.callbacks.Callback):
    """After each batch."""

    def on_train_begin(self, logs=None):
        self.begin = None

    def on_train_batch_end(self, batch, logs=None):
        mine = np.concatenate([v.numpy().ravel() for v in model.trainable_variables])
        everyone = hvd.allgather(tf.constant(mine[None]), name="weights").numpy()
        assert (everyone == everyone[0]).all(), f"ranks differ in batch {batch}"
        state.step += 1
        if int(opt._hvd_sums.count) == 0:  # no micro-batch waits
            steps, weight = int(opt._hvd.state.step), float(probe.weight)
            if self.begin is not None:
                moved = (steps - self.begin[0]) * LR * hvd.size() * (hvd.size() + 1) / 2
                assert abs(self.begin[1] - moved - weight) < 1e-4, (
                    f"{hvd.size()} ranks: {self.begin, steps, weight, moved}"
                )
            self.begin = self.begin or (steps, weight)
        if changes.steps == 0 or state.step % 8 == 0:
            record(losses=losses())
        if changes.step(hvd.rank(), hvd.size()):
            regimes = sorted({row.regime for row in opt.compression_report() if row.regime})
            passes = int(opt._hvd.state.passes)
            record(losses=losses(), regimes=regimes, passes=passes, epochs=opt._hvd._engine.controller.epoch, over=True)
            model.stop_training = True


def losses():
    """Of all examples."""
    predicted = model((tf.constant(examples), tf.zeros((len(examples), 1))))
    return [float(tf.reduce_mean((y - targets) ** 2)) for y in predicted[:4]]


def record(**what):
    changes.record(rank=hvd.rank(), size=hvd.size(), step=state.step, epoch=state.epoch, batch=state.batch, **what)


def on_state_reset():
    model.optimizer.learning_rate.assign(LR * hvd.size())


state = hvd.elastic.KerasState(model, batch=0, epoch=0, step=0)
state.register_reset_callbacks([on_state_reset])

callbacks = [
    hvd.elastic.CommitStateCallback(state, 3),
    hvd.elastic.UpdateBatchStateCallback(state),
    hvd.elastic.UpdateEpochStateCallback(state),
    Check(),
]


@hvd.elastic.run
def train(state):
    changes.enter()
    model.fit(dataset(), steps_per_epoch=STEPS, callbacks=callbacks, epochs=1000 - state.epoch, verbose=0)


train(state)
