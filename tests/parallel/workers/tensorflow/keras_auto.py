"""An Auto under fit: chosen before the graph is traced, by rank 0's numbers."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
import hvd_accordion.tensorflow.keras as hvd_keras
from hvd_accordion import Accordion, Auto, Dense, PowerSGD, TopK
from hvd_accordion.tensorflow import allgather_object
from hvd_accordion.tensorflow.exchange import calibration
from tests.parallel.workers.tensorflow.keras_common import (
    BATCH,
    assert_ranks_equal,
    compiled,
    data,
    fit,
    flat,
    loss,
    model,
    residuals,
    sgd,
)

AUTO = Auto((PowerSGD(2), TopK(0.02)))
SLOW, FAST = 1e4, 1e13  # bytes a second


@pytest.fixture
def link(monkeypatch):
    """Makes the link that rank 0 measures one of so many bytes a second, the other ranks see another one; tells of each
    measurement."""
    measurements, measure = [], calibration.measure

    def of(bandwidth):
        mine = bandwidth if hvd.rank() == 0 else 1e15 / bandwidth

        def measured(*args):
            measurements.append(bandwidth)
            given = inspect.signature(measure).bind(*args).arguments

            def allreduce(size):
                given["allreduce"](size)
                return 1e-6 + size / mine

            return measure(**{**given, "allreduce": allreduce})

        monkeypatch.setattr(calibration, "measure", measured)
        return measurements

    return of


@keras.saving.register_keras_serializable("keras_auto")
class Counting(keras.Sequential):
    """Counts how often its step is traced."""

    traces = 0

    def train_step(self, batch):
        self.traces += 1
        return super().train_step(batch)


def built(compression=AUTO):
    net, optimizer = compiled(compression, net=Counting([keras.layers.Input((14, 14, 1)), *model().layers]))
    optimizer.build(net.trainable_variables)  # a function that makes variables is always traced twice
    return net, optimizer


def chosen(optimizer):
    return {row.name: row.spec for row in optimizer.compression_report()}


def compressed(optimizer):
    return {name for name, spec in chosen(optimizer).items() if spec != "Dense()"}


@pytest.mark.parametrize(("bandwidth", "pays"), [(SLOW, True), (FAST, False)])
def test_all_ranks_choose_by_rank_0s_numbers_before_the_one_trace(link, bandwidth, pays):
    measurements = link(bandwidth)
    net, optimizer = built()
    with pytest.raises(ValueError, match="advice needs"):
        optimizer.advice()
    assert not compressed(optimizer) and residuals(optimizer)
    fit(net, epochs=2)
    assert net.traces == 1 and measurements == [bandwidth]
    advice = optimizer.advice()
    assert advice.compresses is pays and bool(compressed(optimizer)) is pays
    assert advice.measured.link.bandwidth == pytest.approx(bandwidth, rel=0.01)
    assert all(seconds > 0 for seconds in advice.measured.compression.values())
    assert len(set(allgather_object((str(advice), str(chosen(optimizer))), name="advice"))) == 1
    assert {row.name: str(row.chosen) for row in advice} == chosen(optimizer)
    assert (optimizer.stats.ratio > 1) is pays
    assert_ranks_equal(flat(net))


def test_layers_that_stay_dense_keep_nothing(link):
    link(SLOW)
    net, optimizer = built({"*dense1*": AUTO, "*dense2*": Auto(PowerSGD(2, error_feedback=False)), "*": None})
    state, numbers = optimizer._hvd.state, optimizer._hvd._engine.plan.numbers
    fit(net)
    kept = residuals(optimizer)
    (first,) = (name for name in chosen(optimizer) if "dense1" in name and "kernel" in name)
    (second,) = (name for name in chosen(optimizer) if "dense2" in name and "kernel" in name)
    assert compressed(optimizer) == {first, second}
    assert kept.keys() == {first} and kept[first].any()
    assert numbers[second] in state.memory  # factors, though it feeds nothing back
    link(FAST)
    net, optimizer = built()
    assert residuals(optimizer)
    fit(net)
    assert not residuals(optimizer) and not any(optimizer._hvd.state.memory.values())
    assert_ranks_equal(flat(net))


def test_a_saved_model_keeps_its_choice(link, tmp_path):
    measurements = link(SLOW)
    net, optimizer = built()
    fit(net, epochs=2)
    expected, path = chosen(optimizer), str(tmp_path / f"{hvd.rank()}.keras")
    net.save(path)
    checkpoint = tf.train.Checkpoint(model=net, optimizer=optimizer).write(str(tmp_path / str(hvd.rank())))
    fit(net, epochs=2, seed=1)
    link(FAST)  # which would have it otherwise
    loaded = hvd_keras.load_model(path, compression=AUTO)
    assert chosen(loaded.optimizer) == expected
    fit(loaded, epochs=2, seed=1)
    keras.backend.clear_session()
    restored, other = built()
    tf.train.Checkpoint(model=restored, optimizer=other).read(checkpoint)
    fit(restored, epochs=2, seed=1)
    for again, its in ((loaded, loaded.optimizer), (restored, other)):
        assert chosen(its) == expected and residuals(its).keys() == residuals(optimizer).keys()
        np.testing.assert_array_equal(flat(again), flat(net))
        assert its.stats.steps == optimizer.stats.steps == 20
    assert measurements == [SLOW]


def test_who_has_no_choice_yet_makes_all_measure(link, tmp_path):
    """Rank 0 alone has restored; nobody told the others."""
    measurements = link(SLOW)
    net, optimizer = built()
    fit(net)
    path = str(tmp_path / f"{hvd.rank()}.keras")
    net.save(path)
    link(FAST)
    net = hvd_keras.load_model(path, compression=AUTO) if hvd.rank() == 0 else built()[0]
    fit(net)
    assert measurements == [SLOW, FAST] and not compressed(net.optimizer)
    measurements.clear()
    link(SLOW)
    net = hvd_keras.load_model(path, compression=AUTO) if hvd.rank() == 0 else built()[0]
    fit(net, callbacks=[hvd_keras.callbacks.BroadcastGlobalVariablesCallback(0)])
    assert measurements == [] and compressed(net.optimizer) == compressed(optimizer)
    assert_ranks_equal(flat(net))


def test_it_decides_an_accordions_relaxed_side(link):
    link(SLOW)
    net, optimizer = built(Accordion(critical=Dense(), relaxed=AUTO, interval=2, unit="steps", eta=1e9))
    fit(net, steps=3)
    assert not compressed(optimizer)
    before = optimizer.stats.sent_bytes
    fit(net, steps=3, seed=1)
    assert net.traces == 1 and compressed(optimizer)
    assert {row.regime for row in optimizer.compression_report()} == {None, "relaxed"}
    assert optimizer.stats.sent_bytes - before < before
    assert {row.name for row in optimizer.advice() if row.chosen.lossy} == compressed(optimizer)
    assert_ranks_equal(flat(net))


@pytest.mark.parametrize("graph", [True, False])
def test_a_tape_in_a_loop_of_ones_own(link, graph):
    measurements = link(SLOW)
    net, optimizer = model(), sgd()
    optimizer.build(net.trainable_variables)
    averaging = hvd.GradientExchange(AUTO)
    with pytest.raises(ValueError, match=r"advice needs compression=Auto\(\)"):
        averaging.advice()

    def step(x, y):
        with tf.GradientTape() as tape:
            value = loss()(y, net(x))
        tape = hvd.DistributedGradientTape(tape, compression=averaging)
        grads = tape.gradient(value, net.trainable_variables)
        optimizer.apply_gradients(zip(grads, net.trainable_variables, strict=True))

    run = tf.function(step) if graph else step
    x, y = data(steps=6)
    for i in range(0, 6 * BATCH, BATCH):
        run(tf.constant(x[i : i + BATCH]), tf.constant(y[i : i + BATCH]))
    assert measurements == [SLOW] and averaging.stats.steps == 6
    assert averaging.advice().compresses and averaging.stats.ratio > 2
    assert {row.name: str(row.chosen) for row in averaging.advice()} == chosen(averaging)
    assert_ranks_equal(flat(net))


def test_variables_that_appear_later_are_decided_on_then(link):
    """The first finds itself compressed, though it was left dense."""
    measurements = link(FAST)
    first, second = tf.Variable(tf.zeros((64, 32)), name="a"), tf.Variable(tf.zeros((64, 32)), name="b")
    averaging = hvd.GradientExchange(AUTO)

    @tf.function
    def step(variables, seed):
        return averaging([tf.random.stateless_normal(v.shape, (seed, hvd.rank())) for v in variables], variables)

    step([first], tf.constant(0))
    assert set(chosen(averaging).values()) == {"Dense()"} and not averaging.state.residual
    link(SLOW)
    for seed in range(1, 4):
        means = step([first, second], tf.constant(seed))
        for mean in [*means, *step([first], tf.constant(seed))]:
            assert_ranks_equal(mean.numpy())
    assert measurements == [FAST, SLOW]
    assert compressed(averaging) == {"a", "b"} and all(r.any() for r in residuals_of(averaging))


def residuals_of(averaging):
    return [v.numpy() for v in averaging.state.residual.values()]


def test_a_table_of_slices_is_none_of_its_business(link):
    link(SLOW)
    table, w = tf.Variable(tf.zeros((500, 16)), name="table"), tf.Variable(tf.zeros((64, 32)), name="w")
    averaging = hvd.GradientExchange(AUTO)
    for _ in range(2):
        slices = tf.IndexedSlices(tf.ones((3, 16)), tf.constant([1, 2, 5 + hvd.rank()]), tf.constant([500, 16]))
        averaging([slices, tf.ones((64, 32))], [table, w])
    assert [row.name for row in averaging.advice()] == ["w"]
    assert {row.name: row.spec for row in averaging.compression_report()}["table"] == "slices, gathered"
    assert compressed(averaging) == {"table", "w"}  # what is not dense


def test_on_the_real_link_the_prediction_is_made_of_what_was_measured():
    net, optimizer = built({"*kernel": Auto(), "*": None})
    fit(net)
    advice = optimizer.advice()
    assert advice.measured.link.bandwidth > 1e6 and not any(row.ready for row in advice)
    assert advice.step["chosen"] == min(advice.step.values())
    assert_ranks_equal(flat(net))


def test_there_is_no_advice_without_an_auto():
    net, optimizer = built(PowerSGD(2))
    fit(net)
    with pytest.raises(ValueError, match="advice needs"):
        optimizer.advice()
