"""Every spec under Keras and in TensorFlow graphs, on real ranks."""

import itertools
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
import hvd_accordion.tensorflow.keras as hvd_keras
from hvd_accordion import QSGD, Accordion, Dense, PowerSGD, TopK
from hvd_accordion.tensorflow.exchange import configuration
from hvd_accordion.training.settings import Settings
from tests.parallel.reference import SHAPES, simulated
from tests.parallel.user_compressor import RandomPart
from tests.parallel.workers.tensorflow import keras_common
from tests.parallel.workers.tensorflow.keras_common import (
    STEPS,
    assert_ranks_equal,
    data,
    everyone,
    fit,
    flat,
    loss,
    residuals,
    sgd,
)
from tests.parallel.workers.tensorflow.keras_common import compiled as compiled_of
from tests.parallel.workers.tensorflow.keras_common import model as network

SPECS = {**keras_common.SPECS, "users": RandomPart(4)}
compiled = partial(compiled_of, built=True)


@pytest.mark.parametrize("name", SPECS)
def test_ranks_are_bit_equal_after_50_steps_and_hold_their_own_residuals(name):
    net, optimizer = compiled(SPECS[name])
    fit(net, epochs=10)
    assert optimizer.stats.steps == 10 * STEPS == int(optimizer.iterations)
    assert_ranks_equal_but_residuals(net, optimizer)
    lossy = name not in ("none", "dense", "no-feedback")
    assert bool(residuals(optimizer)) == lossy
    assert optimizer.stats.sent_bytes < optimizer.stats.dense_bytes or not lossy


def test_every_spec_on_a_layer_of_its_own_in_one_model():
    """The same in one trace, which more ranks and a slower transport have time for."""
    keras.utils.set_random_seed(7)
    names = [name for name in SPECS if name not in ("none", "globs")]
    layers = keras.layers
    inputs = layers.Input((14, 14, 1))
    x = layers.Dense(40, name="first")(layers.Flatten()(inputs))
    x = layers.Add()([layers.Dense(40, activation="tanh", name=name)(x) for name in names])
    net = keras.Model(inputs, layers.Dense(10, name="last")(x))
    net, optimizer = compiled({**{f"{name}/kernel": SPECS[name] for name in names}, "*": None}, net=net)
    fit(net, epochs=10)
    assert optimizer.stats.steps == 10 * STEPS == int(optimizer.iterations)
    assert_ranks_equal_but_residuals(net, optimizer)
    lossy = {name for name in names if name not in ("dense", "no-feedback")}
    assert set(residuals(optimizer)) == {f"{name}/kernel" for name in lossy}
    assert optimizer.stats.sent_bytes < optimizer.stats.dense_bytes


def assert_ranks_equal_but_residuals(net, optimizer):
    assert_ranks_equal(flat(net))
    state = optimizer._hvd.state
    for v in [*state.shared(), *optimizer.variables]:
        assert_ranks_equal(v.numpy().astype(np.float64), v.name)
    assert len(set(map(bytes, everyone(np.frombuffer(state.journal.numpy(), np.uint8))))) == 1
    for key, residual in residuals(optimizer).items():
        rows = everyone(residual)
        assert np.isfinite(rows).all(), key
        assert not rows.any() or not np.array_equal(rows[0], rows[1]), key  # none is left where it has just gone dense


class Counting(keras.Sequential):
    """Counts how often its step is traced."""

    traces = 0

    def train_step(self, batch):
        self.traces += 1
        return super().train_step(batch)


class Levels(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        optimizer = self.model.optimizer
        self.seen.append((optimizer._hvd.state.levels.numpy().tolist(), float(optimizer._hvd.state.sent_bytes)))


@pytest.mark.parametrize("steps_per_execution", [1, 4])
@pytest.mark.parametrize(
    "policy",
    [
        Accordion(PowerSGD(4), PowerSGD(1), interval=4, unit="steps", eta=0.2),
        Accordion(TopK(0.1), TopK(0.01), interval=4, unit="steps", eta=0.2),
        Accordion(QSGD(7), QSGD(1), interval=4, unit="steps", eta=0.2),
        Accordion(Dense(), PowerSGD(1, start_after=7), interval=4, unit="steps", eta=0.2),
    ],
    ids=str,
)
def test_one_trace_serves_all_levels_and_what_is_sent_follows_them(policy, steps_per_execution):
    net = Counting(network().layers)
    net, optimizer = compiled(policy, net=net, compile_options={"steps_per_execution": steps_per_execution})
    optimizer.build(net.trainable_variables)  # a function that makes variables is always traced twice
    levels = Levels()
    fit(net, epochs=6, steps=8, callbacks=[levels])
    assert net.traces == 1
    assert len({tuple(level) for level, _ in levels.seen}) >= 3  # they changed several times
    assert_ranks_equal(flat(net))
    if steps_per_execution == 1:
        sent = np.diff([0.0, *(total for _, total in levels.seen)])
        by_level = {}
        for step, nbytes in enumerate(sent[1:], 1):  # a level holds from the step after the one that set it
            by_level.setdefault((*levels.seen[step - 1][0], step >= 7), set()).add(float(nbytes))
        assert all(len(found) == 1 for found in by_level.values()), by_level
        assert len(set.union(*by_level.values())) >= 3


@pytest.mark.parametrize(
    ("name", "decay"),
    [(n, 1.0) for n, s in SPECS.items() if s is not None and "accordion" not in n and n != "globs"]
    + [("topk", 0.9), ("signs", 0.9)],
)
def test_equals_the_simulated_cluster(name, decay, monkeypatch):
    """Same gradients, seeds and steps: TensorFlow over Horovod gives what numpy gives in one process."""
    monkeypatch.setattr(configuration, "Settings", partial(Settings, residual_decay=decay))
    spec = SPECS[name]
    variables = {key: tf.Variable(tf.zeros(shape), name=key) for key, shape in SHAPES.items()}
    averaging = hvd.GradientExchange(spec)
    for step, (grads, expected) in enumerate(simulated(spec, hvd.size(), 6, decay)):
        mine = [tf.constant(grads[hvd.rank()][k]) for k in SHAPES]
        for k, got in zip(SHAPES, averaging(mine, list(variables.values())), strict=True):
            scale = np.abs(expected[k]).max()
            assert np.abs(got.numpy() - expected[k]).max() <= 1e-5 * scale, (name, step, k)


def test_a_gradient_is_conserved():
    """What was applied and what the residuals still hold is what was given, on every rank, across level changes."""
    shape = (96, 64)
    specs = [PowerSGD(4), TopK(0.02), Dense(), PowerSGD(1), QSGD(7)]
    for first, second in itertools.pairwise(specs):
        weight = tf.Variable(tf.zeros(shape), name="w")
        averaging = hvd.GradientExchange(Accordion(first, second, interval=10**6, unit="steps"))
        given, applied = np.zeros(shape), np.zeros(shape)
        for step in range(30):
            g = np.random.default_rng((step, hvd.rank())).standard_normal(shape).astype(np.float32)
            given += hvd.allreduce(tf.constant(g, tf.float64), name="given").numpy()
            applied += averaging([tf.constant(g)], [weight])[0].numpy()
            if step % 10 == 9:
                averaging.state.levels.assign([(step // 10 + 1) % 2])
            held = hvd.allreduce(tf.cast(averaging.state.residual["0"], tf.float64), name="held").numpy()
            error = np.linalg.norm(applied + held - given) / np.linalg.norm(given)
            assert error < 1e-6, (first, second, step, error)
        assert_ranks_equal(applied)


def test_a_tape_in_a_graph_remembers():
    """New tapes on the same variables go on with the residual of the last, eagerly or traced."""
    spec = TopK(0.05)

    def train(graph):
        net, optimizer = network(), sgd()
        optimizer.build(net.trainable_variables)

        def step(x, y):
            with tf.GradientTape() as tape:
                value = loss()(y, net(x))
            tape = hvd.DistributedGradientTape(tape, compression=spec)
            grads = tape.gradient(value, net.trainable_variables)
            optimizer.apply_gradients(zip(grads, net.trainable_variables, strict=True))

        run = tf.function(step) if graph else step
        x, y = data(steps=10)
        for i in range(10):
            run(tf.constant(x[8 * i : 8 * i + 8]), tf.constant(y[8 * i : 8 * i + 8]))
        assert_ranks_equal(flat(net))
        return flat(net)

    traced, eager = train(True), train(False)
    np.testing.assert_allclose(traced, eager, rtol=1e-4, atol=1e-6)
    keras.backend.clear_session()
    net, _ = compiled(spec)
    fit(net, steps=10)
    np.testing.assert_allclose(traced, flat(net), rtol=1e-4, atol=1e-6)


def test_different_seeds_give_different_trainings():
    nets = [compiled(QSGD(1), seed=seed)[0] for seed in (0, 0, 1)]
    for net in nets:
        net.set_weights(nets[0].get_weights())
        fit(net)
    assert not np.array_equal(flat(nets[0]), flat(nets[2]))


def test_reruns_are_bit_equal():
    def run():
        keras.backend.clear_session()
        net, _ = compiled(Accordion(QSGD(7), PowerSGD(1), interval=3, unit="steps", eta=0.2))
        fit(net, epochs=3)
        return flat(net)

    np.testing.assert_array_equal(run(), run())
    assert hvd_keras.rank() == hvd.rank()
