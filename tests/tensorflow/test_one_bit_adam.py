"""1-bit Adam and 0/1 Adam in Keras: the numpy oracle's trajectory, `fit`, files, what they refuse."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow.keras as hvd
from hvd_accordion import Dense, TopK
from tests.optim import adam_oracle

TOP = TopK(adam_oracle.RATIO, algorithm="allgather")
NUMBERS = {"beta_2": 0.99, "weight_decay": 0.1, "epsilon": 1e-8}
STEPS = 30
INTERVALS = {"warmup_steps": 9, "kappa": 3, "double_every": 4, "max_interval": 3}
DENSE, LOCAL = {0, 1, 2, 3, 5, 7}, {13, 15, 17, 18, 20, 21, 23, 24, 26, 27, 29}
CASES = {
    "OneBitAdam": ({"warmup_steps": 10}, set(range(10)), set(range(10, STEPS))),
    "ZeroOneAdam": (INTERVALS, DENSE, set(range(STEPS)) - DENSE - LOCAL),
}


def trajectory(kind, ranks, dtype, traced, **arguments):
    """Of two ranks with rank 0's gradients, which do as one does."""
    variables = [keras.Variable(x.astype(dtype), dtype=dtype, name=name) for name, x in adam_oracle.start().items()]
    optimizer = getattr(hvd, kind)(1.0, process_set=ranks, compression=TOP, **NUMBERS, **arguments)
    optimizer.build(variables)
    step = lambda *grads: optimizer.apply(grads, variables)  # noqa: E731
    step, traces = (tf.function(step), 1) if traced else (step, 0)
    found = []
    for t in range(STEPS):
        x = {v.name: v.numpy().astype(np.float64) for v in variables}
        optimizer.learning_rate = adam_oracle.rate(t)
        step(*(tf.constant(g, dtype) for g in adam_oracle.gradient(x, 0, t).values()))
        found.append({v.name: v.numpy() for v in variables})
    assert not traced or step.experimental_get_tracing_count() == traces
    return found, optimizer


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize(("dtype", "traced", "tolerance"), [("float32", True, 1e-5), ("float64", False, 1e-7)])
def test_the_trajectory_is_that_of_the_papers_formulas(kind, dtype, traced, tolerance, twins):
    arguments, dense, exchanges = CASES[kind]
    found, optimizer = trajectory(kind, twins, dtype, traced, **arguments)
    expected = adam_oracle.Oracle(1, dense, exchanges).run(STEPS)
    for t in range(STEPS):
        for name in adam_oracle.SHAPES:
            np.testing.assert_allclose(found[t][name], expected[t][0][name], atol=tolerance, err_msg=f"{t} {name}")
    assert optimizer.stats.steps == STEPS and not optimizer.warming_up


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [layers.Input((60,)), layers.Dense(50, activation="relu", name="first"), layers.Dense(40, name="second")]
    )


def fit(net, epochs=1, steps=5, **options):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8 * steps, 60), np.float32), rng.standard_normal((8 * steps, 40), np.float32)
    callbacks = [hvd.callbacks.EpochCallback()]
    return net.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks, **options)


def compiled(kind, ranks=None, **arguments):
    net, more = network(), {} if ranks is None else {"process_set": ranks}
    net.compile(getattr(hvd, kind)(**more, **arguments), loss="mse")
    return net


def assert_equal_weights(net, other):
    for ours, theirs in zip(net.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("weight_decay", [None, 0.01])
def test_without_compression_and_freezing_it_is_adamw(weight_decay, twins):
    """With so small an epsilon that it does not matter that Keras adds it before the correction."""
    options = {"weight_decay": weight_decay, "epsilon": 1e-12}
    schedule = keras.optimizers.schedules.CosineDecay(1e-2, 15)
    net, other = (
        compiled("OneBitAdam", twins, learning_rate=schedule, warmup_steps=100, **options),
        network(),
    )
    net.optimizer.exclude_from_weight_decay(var_names=["bias"])
    adam = keras.optimizers.Adam(schedule, **options)
    adam.exclude_from_weight_decay(var_names=["bias"])
    other.compile(adam, loss="mse")
    fit(net, epochs=3)
    fit(other, epochs=3)
    for ours, theirs in zip(net.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_clipping_accumulation_and_averages_are_kerass(twins):
    options = {
        "global_clipnorm": 0.1,
        "gradient_accumulation_steps": 2,
        "use_ema": True,
        "ema_momentum": 0.9,
        "epsilon": 1e-12,
    }
    net, other = compiled("OneBitAdam", twins, warmup_steps=100, **options), network()
    other.compile(keras.optimizers.Adam(**options), loss="mse")
    fit(net, epochs=2, steps=6)
    fit(other, epochs=2, steps=6)
    for ours, theirs in zip(net.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert net.optimizer.stats.steps == 6


@pytest.mark.parametrize("by", ["file", "checkpoint"])
def test_resumed_bit_for_bit(by, twins, tmp_path):
    """Within an interval."""

    def made():
        return compiled("ZeroOneAdam", twins, compression=TOP, learning_rate=1e-2, weight_decay=0.01, **INTERVALS)

    net = made()
    fit(net, steps=16)
    if by == "file":
        net.save(tmp_path / "net.keras")
        keras.backend.clear_session()
        other = hvd.load_model(tmp_path / "net.keras", process_set=twins)
        assert type(other.optimizer) is type(net.optimizer)
        assert other.optimizer.get_config() == net.optimizer.get_config()
    else:
        path = tf.train.Checkpoint(model=net, optimizer=net.optimizer).write(str(tmp_path / "checkpoint"))
        other = made()
        other.optimizer.build(other.trainable_variables)
        tf.train.Checkpoint(model=other, optimizer=other.optimizer).read(path)
    fit(net, steps=4)
    fit(other, steps=4)
    assert_equal_weights(net, other)
    assert other.optimizer.stats == net.optimizer.stats and other.optimizer.stats.steps == 20


def test_the_warmup_ends_by_measurement(twins):
    variable = keras.Variable(np.ones((40, 50), np.float32))
    optimizer = hvd.OneBitAdam(beta_2=0.95, process_set=twins)
    optimizer.build([variable])
    step, ends = tf.function(lambda g: optimizer.apply([g], [variable])), []
    for t in range(100):
        step(tf.fill((40, 50), tf.constant(1 + 2 * 0.5**t, tf.float32)))
        ends += [t + 1] if not optimizer.warming_up else []
    # as in torch, see tests/torch/test_one_bit_adam.py: the second moment of these gradients changes by 4 % till then
    norms, v = [], 0.0
    for t in range(100):
        v = 0.95 * v + 0.05 * (1 + 2 * 0.5**t) ** 2
        norms.append(v / (1 - 0.95 ** (t + 1)))
    expected = next(t + 1 for t in range(21, 100, 2) if norms[t] >= 0.96 * norms[t - 20])
    assert ends[0] == expected


def test_weights_without_gradients_stay(twins):
    variable = keras.Variable(np.ones((40, 50), np.float32))
    optimizer = hvd.OneBitAdam(warmup_steps=3, process_set=twins)
    optimizer.build([variable])
    g = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    g[:, -1] = 0
    for _ in range(6):
        optimizer.apply([tf.constant(g)], [variable])
    optimizer.apply([tf.ones((40, 50))], [variable])
    assert (variable.numpy()[:, -1] == 1).all() and (variable.numpy()[:, :-1] != 1).all()


class Log:
    def __init__(self):
        self.params, self.epochs = {}, {}

    def start(self, params):
        self.params = dict(params)

    def log_epoch(self, epoch, metrics):
        self.epochs[epoch] = dict(metrics)

    def log_window(self, window, layers):
        raise AssertionError("nothing adapts")


def test_reports_and_the_logger(twins):
    log = Log()
    arguments = {"warmup_steps": 4, "kappa": 4, "double_every": 4, "max_interval": 2}
    net = compiled("ZeroOneAdam", twins, logger=log, **arguments)
    fit(net, epochs=4, steps=4)
    assert log.params["optimizer"] == "ZeroOneAdam" and log.params["compression"] == "EFSignSGD()"
    first, second, third, fourth = (log.epochs[epoch]["sent_bytes"] for epoch in range(4))
    assert first > 10 * second and second == 2 * third == 2 * fourth
    report, stats = net.optimizer.compression_report(), net.optimizer.stats
    assert (stats.steps, stats.updates) == (16, 12) and stats.dense_bytes == 4 * first
    assert report.sent_bytes == pytest.approx(second / 8) and "each 2 steps" in str(report)
    assert [row.name for row in report] == ["first/kernel", "first/bias", "second/kernel", "second/bias"]


def test_an_embedding(twins):
    """IndexedSlices count as dense gradients."""
    net = keras.Sequential([keras.layers.Input((4,)), keras.layers.Embedding(50, 40), keras.layers.Flatten()])
    net.compile(hvd.OneBitAdam(warmup_steps=2, process_set=twins), loss="mse")
    before = net.get_weights()[0].copy()
    x = np.arange(32).reshape(8, 4)
    net.fit(x, np.ones((8, 160)), batch_size=2, epochs=2, shuffle=False, verbose=0)
    moved = (net.get_weights()[0] != before).all(axis=1)
    assert moved[:16].all() and not moved[16:].any()  # of rows 16 to 31 the first gradient came after the warm-up


def test_what_cannot_work_is_refused(twins):
    optimizer = hvd.OneBitAdam()
    with pytest.raises(ValueError, match="must not average by itself, as OneBitAdam does"):
        hvd.DistributedOptimizer(optimizer)
    with pytest.raises(ValueError, match="mixed_float16: a LossScaleOptimizer around OneBitAdam"):
        keras.optimizers.LossScaleOptimizer(optimizer)
    with pytest.raises(ValueError, match=r"betas\[1\] must be a number in \[0, 1\)"):
        hvd.OneBitAdam(beta_2=1.0)
    with pytest.raises(ValueError, match="kappa must be an integer >= 1"):
        hvd.ZeroOneAdam(kappa=0)
    with pytest.raises(TypeError, match="compression must be"):
        hvd.OneBitAdam(compression="signs")
    config = hvd.OneBitAdam(compression={"*kernel": Dense()}).get_config()
    with pytest.raises(ValueError, match="must have been a spec of hvd_accordion"):
        hvd.OneBitAdam.from_config(config)
