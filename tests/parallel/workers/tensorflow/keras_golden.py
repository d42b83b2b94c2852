"""Trainings of Keras, bit for bit as they were recorded (tests/golden)."""

import inspect
import os

import keras
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
import hvd_accordion.tensorflow.keras as hvd_keras
from hvd_accordion.tensorflow.exchange import calibration
from tests.golden.trajectories import (
    CASES,
    HALF,
    RATE,
    SAVED,
    STEPS,
    SUBSET,
    Golden,
    batch,
    fingerprint,
    state_file,
    weights,
)

GOLDEN = Golden("keras", fingerprint(tf.__version__))


@pytest.fixture(autouse=True)
def link(monkeypatch):
    """A link of 1 kbyte/s, whatever is measured."""
    measure = calibration.measure

    def measured(*args):
        given = inspect.signature(measure).bind(*args).arguments
        return measure(**{**given, "allreduce": lambda size: 1e-6 + size / 1e3})

    monkeypatch.setattr(calibration, "measure", measured)


class Training:
    def __init__(self, case):
        self.p = {key: keras.Variable(value, name=key) for key, value in weights().items()}
        sgd = keras.optimizers.SGD(RATE, momentum=0.5)
        arguments = {"min_compress_numel": 64, **CASES[case]} if case != "none" else {}
        self.optimizer = hvd_keras.DistributedOptimizer(sgd, **arguments)
        self.optimizer.build(list(self.p.values()))

        @tf.function
        def step(x, y):
            p = {name: v.value for name, v in self.p.items()}
            with tf.GradientTape() as tape:
                h = tf.tanh(x @ p["w1"] + p["b1"])
                h = tf.tanh(h @ tf.reshape(p["w2"], (24, 24)) + p["b2"])
                loss = tf.reduce_mean((h @ p["w3"] + p["b3"] - y) ** 2)
            self.optimizer.apply(tape.gradient(loss, [p[name] for name in self.p]), list(self.p.values()))

        self.graph = step

    def step(self, step):
        self.graph(*map(tf.constant, batch(step, hvd.rank())))

    def checkpoint(self):
        return tf.train.Checkpoint(optimizer=self.optimizer, **{name: v.value for name, v in self.p.items()})

    def check(self, case):
        regimes = [row.regime for row in self.optimizer.compression_report()] if case != "none" else []
        sent = self.optimizer.stats.sent_bytes if case != "none" else 0
        if hvd.rank() == 0:
            GOLDEN.check(case, {name: v.numpy() for name, v in self.p.items()}, regimes=regimes, sent=sent)


@pytest.mark.parametrize("case", SUBSET if "GOLDEN_SUBSET" in os.environ else CASES)
def test_parameters_are_as_recorded(case):
    training = Training(case)
    for step in range(STEPS):
        training.step(step)
        if GOLDEN.recording and step == HALF and case in SAVED:
            training.checkpoint().write(str(state_file("keras", case, hvd.rank())))
    training.check(case)


@pytest.mark.parametrize("case", SAVED)
def test_goes_on_from_a_recorded_state(case):
    training = Training(case)
    training.checkpoint().read(str(state_file("keras", case, hvd.rank()))).assert_existing_objects_matched()
    for step in range(HALF + 1, STEPS):
        training.step(step)
    training.check(case)
