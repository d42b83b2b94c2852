"""Without horovodrun: one rank, nothing is sent, everything else works."""

from __future__ import annotations

import json
import random

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
import hvd_accordion.tensorflow.keras as hvd_keras
from hvd_accordion import FP16, QSGD, Accordion, Dense, PowerSGD, RandomK, TopK
from hvd_accordion.compression import Context, exchange
from hvd_accordion.ops import numpy as ops
from hvd_accordion.policy import norm_sampling
from hvd_accordion.training.calibration import dry_run

SHAPE = (60, 50)
RATE = 0.05


class Recorder:
    def __init__(self):
        self.params, self.epochs, self.windows = {}, [], []

    def start(self, params):
        self.params = dict(params)

    def log_epoch(self, epoch, metrics):
        self.epochs.append((epoch, dict(metrics)))

    def log_window(self, window, layers):
        self.windows.append((window, dict(layers)))


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [layers.Input((60,)), layers.Dense(50, activation="relu", name="first"), layers.Dense(40, name="second")]
    )


def compiled(compression, optimizer=None, **options):
    net = network()
    wrapped = hvd_keras.DistributedOptimizer(optimizer or keras.optimizers.Adam(), compression=compression, **options)
    net.compile(wrapped, loss="mse")
    return net, wrapped


def fit(net, epochs=1, steps=3, callbacks=()):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8 * steps, 60), np.float32), rng.standard_normal((8 * steps, 40), np.float32)
    return net.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))


def assert_equal_weights(net, other):
    for ours, theirs in zip(net.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def bare():
    """What the same training comes to without this package."""
    net = network()
    net.compile(keras.optimizers.Adam(), loss="mse")
    fit(net, epochs=2)
    return net


# Keras


@pytest.mark.parametrize(
    "compression",
    [None, hvd.Compression.fp16, PowerSGD(2), Accordion(interval=1), {"*kernel": Accordion(unit="steps", interval=2)}],
    ids=str,
)
def test_equals_the_bare_optimizer(compression, bare):
    net, optimizer = compiled(compression)
    fit(net, epochs=2, callbacks=[hvd_keras.callbacks.EpochCallback()])
    assert_equal_weights(net, bare)
    stats, report = optimizer.stats, optimizer.compression_report()
    assert (stats.steps, stats.sent_bytes, stats.dense_bytes) == (6, 0.0, 0.0)
    assert [row.name for row in report] == [
        f"{layer}/{part}" for layer in ("first", "second") for part in ("kernel", "bias")
    ]
    lines = str(report).splitlines()
    assert len(lines) == 6 and lines[1].startswith("first/kernel") and "60x50" in lines[1]


def test_watches_and_logs_regimes():
    recorder, accordion = Recorder(), Accordion(interval=2, eta=0.5)
    net, optimizer = compiled(accordion, keras.optimizers.SGD(0.01), logger=recorder)
    fit(net, epochs=5, callbacks=[hvd_keras.callbacks.EpochCallback()])
    assert recorder.params["eta"] == 0.5 and recorder.params["world_size"] == 1
    assert recorder.params["optimizer"] == "SGD" and recorder.params["critical"] == "PowerSGD(rank=4)"
    assert {"version.tensorflow", "version.horovod", "version.hvd_accordion"} <= recorder.params.keys()
    assert [epoch for epoch, _ in recorder.epochs] == [0, 1, 2, 3, 4]
    assert recorder.epochs[0][1]["critical_layers"] == 1.0
    assert [window for window, _ in recorder.windows] == [0, 1, 2]  # after epochs 1, 3 and 5
    first, second, third = (layers["first/kernel"] for _, layers in recorder.windows)
    assert first.ratio is None and first.regime == "critical"
    assert second.ratio == pytest.approx(abs(first.norm - second.norm) / first.norm)
    assert second.regime == ("critical" if second.ratio >= 0.5 else "relaxed")
    report = {row.name: row.regime for row in optimizer.compression_report()}
    assert report["first/kernel"] == third.regime and report["first/bias"] is None
    assert accordion.norms == {}, "the user's object is left alone"


def test_two_callbacks_tell_of_an_epoch_once():
    net, optimizer = compiled(Accordion(interval=1))
    callbacks = [hvd_keras.callbacks.EpochCallback(), hvd_keras.callbacks.MetricAverageCallback()]
    fit(net, epochs=3, callbacks=callbacks)
    assert optimizer._hvd._engine.controller.epoch == 3
    optimizer.end_epoch()
    assert optimizer._hvd._engine.controller.epoch == 3


def test_before_the_first_step_there_is_nothing_to_report():
    _, optimizer = compiled(Accordion())
    assert optimizer.stats.steps == 0 and len(optimizer.compression_report()) == 0
    optimizer.end_epoch()  # no epoch yet


@pytest.mark.parametrize("passes", [1, 2])
def test_steps_are_those_in_which_gradients_are_exchanged(passes):
    net, optimizer = compiled(Accordion(interval=1), backward_passes_per_step=passes)
    fit(net, steps=4)
    assert optimizer.stats.steps == 4 // passes and int(optimizer.iterations) == 4


def trained_for_a_checkpoint():
    compression = Accordion(interval=2, unit="steps", eta=1e9)
    net, optimizer = compiled(compression, keras.optimizers.SGD(RATE, momentum=0.9))
    fit(net, steps=5)
    return net, optimizer, compression


def contents(optimizer) -> dict:
    """All that compression keeps, but for the floats of the journal that a rerun might round otherwise."""
    state = optimizer._hvd.state
    return {**state.arrays(), "journal": json.loads(state.journal.numpy())}


def assert_resumed(net, optimizer, saved_net, saved):
    assert optimizer.stats.steps == 5 and optimizer._hvd.state.levels.numpy().tolist() == [1, 1]
    assert {row.regime for row in optimizer.compression_report()} == {None, "relaxed"}
    for name, value in contents(saved).items():
        np.testing.assert_array_equal(contents(optimizer)[name], value, name)
    for training in (net, saved_net):
        fit(training, steps=4)
    assert_equal_weights(net, saved_net)
    assert contents(optimizer)["journal"] == contents(saved)["journal"] and optimizer.stats.steps == 9


def test_a_keras_file_holds_levels_counts_and_journal(tmp_path):
    net, optimizer, compression = trained_for_a_checkpoint()
    net.save(tmp_path / "net.keras")
    keras.backend.clear_session()  # as in a new process
    loaded = hvd_keras.load_model(tmp_path / "net.keras", compression=compression)
    assert type(loaded.optimizer).__mro__[2] is keras.optimizers.SGD and loaded.optimizer is not optimizer
    assert_resumed(loaded, loaded.optimizer, net, optimizer)


@pytest.mark.parametrize("late", [False, True])
def test_a_tensorflow_checkpoint_holds_levels_counts_and_journal(late, tmp_path):
    """Restored into variables that are there, or into those that are made later."""
    net, optimizer, compression = trained_for_a_checkpoint()
    path = tf.train.Checkpoint(model=net, optimizer=optimizer).write(str(tmp_path / "checkpoint"))
    keras.backend.clear_session()  # as in a new process
    other, its = compiled(compression, keras.optimizers.SGD(RATE, momentum=0.9))
    if not late:
        its.build(other.trainable_variables)
    status = tf.train.Checkpoint(model=other, optimizer=its).read(path)
    if late:
        its.build(other.trainable_variables)
    status.assert_existing_objects_matched()
    assert_resumed(other, its, net, optimizer)


@pytest.mark.parametrize("compression", [PowerSGD(2), Accordion(interval=10, unit="steps")], ids=str)
def test_going_back_within_a_window_takes_the_counts_back(compression, tmp_path):
    net, optimizer = compiled(compression)
    fit(net, steps=3)
    checkpoint = tf.train.Checkpoint(optimizer=optimizer)
    path = checkpoint.write(str(tmp_path / "checkpoint"))
    fit(net, steps=2)
    assert optimizer.stats.steps == 5
    checkpoint.read(path)
    assert optimizer.stats.steps == 3


# GradientExchange


def gradient(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(SHAPE).astype(np.float32)


def variable() -> tf.Variable:
    return tf.Variable(tf.zeros(SHAPE), name="w")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [SHAPE, (150, 90)], ids=["small", "large"])
@pytest.mark.parametrize("norm", ["sampled", "exact"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_the_norm_is_that_of_the_summed_gradient(graph, norm, shape, dtype):
    recorder, w, accordion = Recorder(), tf.Variable(tf.zeros(shape, dtype), name="w"), Accordion(interval=1, norm=norm)
    averaging = hvd.GradientExchange(accordion, steps_per_epoch=4, logger=recorder, seed=3)
    step = tf.function(lambda g: averaging([g], [w])[0]) if graph else lambda g: averaging([g], [w])[0]
    total = np.zeros(shape)
    size = accordion.window.sample_size(total.size)
    picked = norm_sampling.entries(ops, "w", total.size, size, 3, total)
    for i in range(8):
        g = np.random.default_rng(i).standard_normal(shape).astype(dtype)
        np.testing.assert_array_equal(step(tf.constant(g)), g)
        total += g
        if i % 4 == 3:
            expected = norm_sampling.scale(total.size, size) * np.linalg.norm(total.reshape(-1)[picked])
            assert recorder.windows[-1][1]["w"].norm == pytest.approx(expected, rel=1e-6)
            total[:] = 0
    assert averaging.state.summed["0"].numpy().shape == (size,)
    assert len(recorder.windows) == 2 and averaging.stats.steps == 8 and averaging.stats.sent_bytes == 0


@pytest.mark.parametrize(("saved", "loaded"), [("sampled", "exact"), ("exact", "sampled"), ("sampled", "sampled")])
def test_sums_of_other_entries_are_not_taken_up(saved, loaded):
    def make(norm):
        w = tf.Variable(tf.zeros((150, 90)), name="w")
        averaging = hvd.GradientExchange(Accordion(interval=3, unit="steps", norm=norm))
        averaging([tf.ones((150, 90))], [w])
        return averaging, w

    (first, _), (second, w) = make(saved), make(loaded)
    second([tf.ones((150, 90))], [w])
    second.state.load(first.state.arrays())
    second.restored([])
    assert set(second.state.summed["0"].numpy()) == {1.0 if saved == loaded else 0.0}
    assert second.stats.steps == 1


def test_missing_gradients_and_slices_pass_through():
    w, rows, ids = variable(), tf.Variable(tf.zeros((10, 4)), name="rows"), tf.Variable([1, 2], name="ids")
    averaging = hvd.GradientExchange(Accordion(interval=1, unit="steps"))
    slices = tf.IndexedSlices(tf.ones((2, 4)), tf.constant([7, 7]), tf.constant([10, 4]))
    missing, same, none = averaging([None, slices, None], [w, rows, ids])
    assert missing is None and none is None
    with pytest.raises(TypeError, match="variables must be of a floating dtype to be exchanged, got int32"):
        averaging([None, slices, tf.constant([5, 6])], [w, rows, ids])
    with pytest.raises(ValueError, match="gradients must be as many as variables, got 1 for 2"):
        averaging([None], [w, rows])
    np.testing.assert_array_equal(same.values, np.ones((2, 4)))
    np.testing.assert_array_equal(same.indices, [7, 7])
    assert [row.name for row in averaging.compression_report()] == ["w", "rows"]  # integers are nobody's to average


def test_nothing_to_exchange_is_no_error():
    counts = tf.Variable([1, 2])
    assert hvd.GradientExchange(TopK(0.1))([], []) == []
    assert hvd.GradientExchange(TopK(0.1))([None], [counts]) == [None]  # integers only
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(tf.ones(3))
    assert hvd.DistributedGradientTape(tape).gradient(total, []) == []


def test_gradients_of_tensors_are_averaged_as_horovods_tape_does():
    x = tf.constant([1.0, 2.0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = tf.reduce_sum(x * x)
    np.testing.assert_array_equal(hvd.DistributedGradientTape(tape).gradient(total, [x])[0], [2.0, 4.0])


def test_an_epoch_that_ends_after_going_back_is_not_the_end_of_the_next_one_too(tmp_path):
    averaging, w = hvd.GradientExchange(Accordion(interval=1)), variable()

    def steps(count: int):
        for i in range(count):
            averaging([tf.constant(gradient(i))], [w])

    steps(3)
    path = tf.train.Checkpoint(averaging).write(str(tmp_path / "checkpoint"))
    steps(2)
    assert averaging.stats.steps == 5
    tf.train.Checkpoint(averaging).read(path)
    averaging.end_epoch()
    steps(1)
    averaging.end_epoch()
    assert averaging._engine.controller.epoch == 2


def test_nan_reaches_the_weights_but_not_the_norm():
    recorder, w = Recorder(), variable()
    averaging = hvd.GradientExchange(Accordion(interval=3, unit="steps"), logger=recorder)
    for g in (gradient(0), np.full(SHAPE, np.nan, np.float32), gradient(2)):
        np.testing.assert_array_equal(averaging([tf.constant(g)], [w])[0], g)
    norm = np.linalg.norm(gradient(0).astype(float) + gradient(2))
    assert recorder.windows[0][1]["w"].norm == pytest.approx(norm, rel=1e-6)


def test_a_drop_of_the_learning_rate_makes_layers_critical():
    w, rate = variable(), tf.Variable(0.1)
    averaging = hvd.GradientExchange(Accordion(interval=2, unit="steps", eta=1e9), learning_rate=rate)
    for _ in range(4):
        averaging([tf.constant(gradient(0))], [w])
    assert averaging.state.levels.numpy().tolist() == [1]
    rate.assign(0.01)
    averaging([tf.constant(gradient(0))], [w])
    assert averaging.state.levels.numpy().tolist() == [0]


def test_the_state_of_an_exchange_is_in_its_variables(tmp_path):
    def fresh():
        return hvd.GradientExchange(Accordion(interval=2, unit="steps", eta=1e9)), variable()

    (averaging, w), (other, its) = fresh(), fresh()
    for i in range(5):
        averaging([tf.constant(gradient(i % 2))], [w])
    path = tf.train.Checkpoint(averaging).write(str(tmp_path / "checkpoint"))
    status = tf.train.Checkpoint(other).read(path)  # before it has any
    other.build([its])
    status.assert_existing_objects_matched()
    assert other.stats.steps == 5 and other.state.levels.numpy().tolist() == [1]
    assert other.state.journal.numpy() == averaging.state.journal.numpy()
    for name, value in averaging.state.arrays().items():
        np.testing.assert_array_equal(other.state.arrays()[name], value, name)


# the exchange itself, between two ranks that have the same gradients

SPECS = [Dense(), FP16(), TopK(0.1), RandomK(0.1), QSGD(7), PowerSGD(2, warm_start=False)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_global_generators_are_left_alone(spec, twins):
    def draws():
        """What a script would draw after it has seeded everything, as far as it sees."""
        yield random.random()
        yield float(np.random.random())
        yield float(tf.random.uniform(()))
        yield float(tf.random.get_global_generator().uniform(()))

    def seeded():
        keras.utils.set_random_seed(3)
        tf.random.get_global_generator().reset_from_seed(3)

    seeded()
    expected = list(draws()) + list(draws())
    seeded()
    found = list(draws())
    averaging, w = hvd.GradientExchange(spec, process_set=twins), variable()
    for i in range(2):
        averaging([tf.constant(gradient(i))], [w])
    assert averaging.stats.sent_bytes > 0
    assert found + list(draws()) == expected


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_traced_exchange_is_that_of_numpy(spec, twins):
    """Of rank 0 of two that have the same gradients, residual included."""
    averaging, w = hvd.GradientExchange(spec, process_set=twins), variable()
    step = tf.function(lambda g: averaging([g], [w])[0])
    residual, memory = [np.zeros(SHAPE, np.float32)] if spec.lossy else None, [{}]
    for i in range(4):
        rounds = exchange(spec, ops, [gradient(i)], residual, memory, Context(("w",), "float32", i, 0, 0, 2))
        done = dry_run(rounds, ops, 2)  # the other rank would send the same
        np.testing.assert_allclose(step(tf.constant(gradient(i))), done.mean[0], atol=1e-5)
        residual, memory = done.residual, done.memory
        if spec.lossy:
            np.testing.assert_allclose(averaging.state.residual["0"], residual[0], atol=1e-5)
    assert averaging.stats.steps == 4
    assert averaging.stats.sent_bytes == pytest.approx(4 * spec.bytes_per_step(SHAPE, "float32", 2), rel=0.02)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_start_after_is_dense_before_and_compressed_from_there(graph, twins):
    averaging, w = hvd.GradientExchange(PowerSGD(2, start_after=2), process_set=twins), variable()
    step = tf.function(lambda g: averaging([g], [w])[0]) if graph else lambda g: averaging([g], [w])[0]
    sent, exact, before = [], [], 0.0
    for i in range(4):
        exact.append(np.array_equal(step(tf.constant(gradient(i))), gradient(i)))
        sent.append(averaging.stats.sent_bytes - before)
        before = averaging.stats.sent_bytes
    dense, low = (spec.bytes_per_step(SHAPE, "float32", 2) for spec in (Dense(), PowerSGD(2)))
    assert sent == [dense, dense, low, low] and exact == [True, True, False, False]
    assert [row.sent_bytes for row in averaging.compression_report()] == [low]


def test_regimes_choose_the_level_in_a_graph_that_is_traced_once(twins):
    traces, w = [], variable()
    averaging = hvd.GradientExchange(
        Accordion(Dense(), TopK(0.1), interval=2, unit="steps", eta=1e9), process_set=twins
    )
    averaging.build([w])

    @tf.function
    def step(g):
        traces.append(1)
        return averaging([g], [w])[0]

    exact = [np.array_equal(step(tf.constant(gradient(0))), gradient(0)) for _ in range(6)]
    assert exact == [True] * 4 + [False] * 2 and len(traces) == 1
    assert {row.spec for row in averaging.compression_report()} == {"TopK(ratio=0.1)"}


def test_a_step_with_nan_leaves_no_trace_in_residual_and_factors(twins):
    averaging, w = hvd.GradientExchange(PowerSGD(2), process_set=twins), variable()
    averaging([tf.constant(gradient(0))], [w])
    names = {name for name in averaging.state.arrays() if name.startswith(("residual", "memory", "summed"))}
    before = {name: averaging.state.arrays()[name] for name in names}
    mean = averaging([tf.fill(SHAPE, np.float32(np.inf))], [w])[0]
    assert not np.isfinite(mean).all() and averaging.stats.steps == 2
    assert len(names) == 2 and all(before[name].any() for name in names)
    for name in names:
        np.testing.assert_array_equal(averaging.state.arrays()[name], before[name], name)
