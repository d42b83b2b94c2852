"""AccordionBatchSize under Keras, on one rank: every update is that of a loop that accumulates by hand."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
import hvd_accordion.tensorflow.keras as hvd_keras
from hvd_accordion import Accordion, AccordionBatchSize, TopK

STEPS = 7  # micro-batches an epoch: with batches of 4, one of 4 and one of 3
RATE = 0.05
EPOCHS = 5


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [layers.Input((60,)), layers.Dense(50, activation="relu", name="first"), layers.Dense(40, name="second")]
    )


def sgd(rate=RATE):
    return keras.optimizers.SGD(rate, momentum=0.9, weight_decay=1e-3)


def rule(**options) -> AccordionBatchSize:
    """Large from the third epoch on: no norm changes by 1,000 times."""
    return AccordionBatchSize(8, 32, **{"eta": 1e3, "interval": 1, "warmup": 2, **options})


def made(net, batch_size, optimizer=None, **options):
    net.compile(hvd_keras.DistributedOptimizer(optimizer or sgd(), batch_size=batch_size, **options), loss="mse")
    return net.optimizer


def data(steps=STEPS):
    rng = np.random.default_rng(0)
    return rng.standard_normal((8 * steps, 60), np.float32), rng.standard_normal((8 * steps, 40), np.float32)


def fit(net, epochs=EPOCHS, callbacks=(), first=0):
    x, y = data()
    callbacks = [hvd_keras.callbacks.EpochCallback(), *callbacks]
    return net.fit(
        x, y, batch_size=8, epochs=epochs, initial_epoch=first, shuffle=False, verbose=0, callbacks=callbacks
    )


def gradients_of(net):
    """A function of a micro-batch's number."""
    x, y = (tf.constant(part) for part in data())
    loss = keras.losses.MeanSquaredError()

    @tf.function
    def gradients(i):
        with tf.GradientTape() as tape:
            value = loss(y[8 * i : 8 * i + 8], net(x[8 * i : 8 * i + 8], training=True))
        return tape.gradient(value, [v.value for v in net.trainable_variables])

    return lambda step: gradients(tf.constant(step % STEPS))


def by_hand(net, groups, optimizer=None, rate=lambda step: RATE):
    """`groups`: for each update, how many micro-batches and what scales the rate; summed and divided by numpy."""
    optimizer = optimizer or sgd()
    gradients, steps = gradients_of(net), itertools.count()
    for size, scale in groups:
        taken = [next(steps) for _ in range(size)]
        sums = [np.zeros(v.shape, np.float32) for v in net.trainable_variables]
        for step in taken:
            sums = [total + g.numpy() for total, g in zip(sums, gradients(step), strict=True)]
        optimizer.learning_rate = np.float32(rate(taken[-1])) * np.float32(scale)
        optimizer.apply([tf.constant(total / np.float32(size)) for total in sums], net.trainable_variables)


# batches of 1 in the first epoch and in the second, for which the first has nothing to compare with
BY_HAND = [*[(1, 1.0)] * (2 * STEPS), *((n, s * n / 4) for s in (1.0, 2.5, 4.0) for n in (4, 3))]


def assert_equal_weights(net, other, exactly=True):
    for ours, theirs in zip(net.get_weights(), other.get_weights(), strict=True):
        if exactly:
            np.testing.assert_array_equal(ours, theirs)
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def accumulated():
    net = network()
    by_hand(net, BY_HAND)
    return net


@pytest.mark.parametrize("steps_per_epoch", [None, STEPS])
def test_fit_equals_accumulation_by_hand_and_never_retraces(steps_per_epoch, accumulated):
    net = network()
    optimizer = made(net, rule(), steps_per_epoch=steps_per_epoch)
    seen, traced, step = [], [], net.train_step
    net.train_step = lambda data: traced.append(1) or step(data)

    def look(*_):
        seen.append((optimizer.get_config()["learning_rate"], len(traced)))

    fit(net, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=look)])
    assert_equal_weights(net, accumulated)
    assert (optimizer.stats.steps, optimizer.stats.updates) == (EPOCHS * STEPS, 2 * STEPS + 2 * 3)
    assert int(optimizer.iterations) == EPOCHS * STEPS
    assert [rate for rate, _ in seen] == [pytest.approx(RATE)] * EPOCHS
    assert all(count == seen[0][1] for _, count in seen)
    assert "batch size 32 (relaxed): 4 micro-batches of 8, learning rate x4" in str(optimizer.compression_report())


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_a_loop_of_ones_own(graph, accumulated):
    net = network()
    optimizer = hvd.DistributedOptimizer(sgd(), batch_size=rule())
    gradients = gradients_of(net)

    def apply(grads):
        optimizer.apply_gradients(zip(grads, net.trainable_variables, strict=True))

    apply = tf.function(apply) if graph else apply
    for step in range(EPOCHS * STEPS):
        apply(gradients(step))
        if step % STEPS == STEPS - 1:
            optimizer.end_epoch()
    assert_equal_weights(net, accumulated)


def test_a_schedule_counts_micro_batches():
    def schedule():
        return keras.optimizers.schedules.PiecewiseConstantDecay([9, 16, 20, 30], [0.05, 0.04, 0.06, 0.05, 0.03])

    net, other = network(), network()
    made(net, rule(), sgd(schedule()))
    fit(net)
    by_hand(other, BY_HAND, rate=lambda step: float(schedule()(step)))
    assert_equal_weights(net, other)


def test_loss_scaling():
    net, other = network(), network()
    scaling = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=1024.0)
    optimizer = made(net, rule(), scaling)
    fit(net)
    by_hand(other, BY_HAND)
    assert_equal_weights(net, other, exactly=False)
    assert optimizer.stats.updates == 2 * STEPS + 2 * 3 and int(optimizer.iterations) == EPOCHS * STEPS


def test_a_drop_of_the_rate_makes_the_batch_small_again():
    net, updates = network(), []
    optimizer = made(net, rule())

    def drop(epoch, _=None):
        optimizer.learning_rate = RATE if epoch < 3 else RATE / 10

    callbacks = [
        keras.callbacks.LambdaCallback(on_epoch_begin=drop),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: updates.append(optimizer.stats.updates)),
    ]
    fit(net, callbacks=callbacks)
    # seen with the first update of the epoch, which is still large; calm again after that epoch
    assert np.diff([0, *updates]).tolist() == [7, 7, 2, 1 + 3, 2]


def test_norms_weigh_each_update_by_its_micro_batches():
    """With a rate of 0 all epochs have the same summed gradient, whatever the batches."""
    net, norms = network(), []
    optimizer = made(net, rule(norm="exact"), keras.optimizers.SGD(0.0))

    def note(*_):
        optimizer.compression_report()
        norms.append(optimizer._hvd._engine.controller.batch.rule.norms["whole model"])

    fit(net, 3, [keras.callbacks.LambdaCallback(on_epoch_end=note)])
    gradients = gradients_of(network())
    total = [np.sum([g.numpy() for g in parts], axis=0) for parts in zip(*map(gradients, range(STEPS)), strict=True)]
    expected = np.sqrt(sum(np.square(x.astype(np.float64)).sum() for x in total))
    assert norms == pytest.approx([expected] * 3, rel=1e-5)


@pytest.mark.parametrize(("kind", "cut"), [("keras", 3 * STEPS + 2), ("checkpoint", 4 * STEPS + 5)])
def test_resumes_bit_equal(kind, cut, tmp_path):
    """Also in the middle of a batch."""

    def train(net, steps):
        gradients = gradients_of(net)
        for step in steps:
            net.optimizer.apply(gradients(step), net.trainable_variables)

    whole = network()
    made(whole, rule(), steps_per_epoch=STEPS)
    train(whole, range(cut))
    if kind == "keras":
        whole.save(tmp_path / "model.keras")
        resumed = hvd_keras.load_model(tmp_path / "model.keras", batch_size=rule(), steps_per_epoch=STEPS)
    else:
        path = tf.train.Checkpoint(model=whole, optimizer=whole.optimizer).save(str(tmp_path / "checkpoint"))
        resumed = network()
        made(resumed, rule(), steps_per_epoch=STEPS).build(resumed.trainable_variables)
        tf.train.Checkpoint(model=resumed, optimizer=resumed.optimizer).restore(path).assert_consumed()
    for net in (whole, resumed):
        train(net, range(cut, EPOCHS * STEPS))
    assert_equal_weights(whole, resumed)
    assert vars(resumed.optimizer.stats) == vars(whole.optimizer.stats)


def test_composes_with_accordion_and_logs():
    class Recorder:
        def __init__(self):
            self.params, self.epochs, self.windows = {}, [], []

        def start(self, params):
            self.params = dict(params)

        def log_epoch(self, epoch, metrics):
            self.epochs.append(metrics)

        def log_window(self, window, layers):
            self.windows.append(layers)

    net, recorder = network(), Recorder()
    made(net, rule(), compression=Accordion(TopK(0.5), TopK(0.1), interval=1, eta=1e3), logger=recorder)
    fit(net, 4)
    assert recorder.params["batch_size.large"] == 32
    told = [(m["batch_size"], m["lr_scale"], m["updates"]) for m in recorder.epochs]
    assert told == [(8, 1.0, 7), (8, 1.0, 7), (32, 1.0, 2), (32, 2.5, 2)]
    assert [set(w) for w in recorder.windows] == [{"first/kernel", "second/kernel", "whole model"}] * 4
    assert [w["whole model"].regime for w in recorder.windows] == ["critical", "relaxed", "relaxed", "relaxed"]
    # an Accordion's norms weigh updates too: a larger batch is no change
    assert all(w[name].ratio < 0.9 for w in recorder.windows[1:] for name in w)


def test_what_cannot_be_is_refused():
    refused = [
        ("batch_size must be an AccordionBatchSize or None, got 8", {"batch_size": 8}),
        ("backward_passes_per_step must be 1 with batch_size", {"backward_passes_per_step": 2}),
        (
            "gradient_accumulation_steps must be None",
            {"optimizer": keras.optimizers.SGD(gradient_accumulation_steps=2)},
        ),
    ]
    for message, options in refused:
        with pytest.raises((ValueError, TypeError), match=message):
            made(network(), **{"batch_size": rule(), **options})
    exchange, w = hvd.GradientExchange(batch_size=rule()), tf.Variable(tf.zeros((3, 2)))
    with pytest.raises(ValueError, match="batch_size needs a DistributedOptimizer"):
        exchange([tf.ones((3, 2))], [w])
    for options in ({"batch_size": rule()}, {"compression": exchange}):
        with pytest.raises(ValueError, match="batch_size must be None for a tape"):
            hvd.DistributedGradientTape(tf.GradientTape(), **options)
