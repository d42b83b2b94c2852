"""What users of Keras do with an optimizer, compressed, on real ranks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
import hvd_accordion.tensorflow.keras as hvd_keras
from hvd_accordion import QSGD, Accordion, PowerSGD, TopK, Warmup
from tests.parallel import user_policy
from tests.parallel.local_memory import Counted
from tests.parallel.workers.tensorflow.keras_common import (
    BATCH,
    assert_ranks_equal,
    compiled,
    data,
    everyone,
    fit,
    flat,
    loss,
    model,
    residuals,
    sgd,
)


def test_an_embedding_batch_norm_and_dropout_under_fit_with_callbacks_and_steps_per_execution():
    keras.utils.set_random_seed(hvd.rank())
    layers = keras.layers
    net = keras.Sequential(
        [
            layers.Input((6,)),
            layers.Embedding(100, 32),
            layers.Flatten(),
            layers.Dense(64),
            layers.BatchNormalization(),
            layers.Activation("relu"),
            layers.Dropout(0.3),
            layers.Dense(48, activation="relu"),
            layers.Dense(10),
        ]
    )
    policy = Accordion(PowerSGD(4), PowerSGD(1), interval=1, eta=0.05)
    optimizer = hvd_keras.DistributedOptimizer(sgd(learning_rate=0.05 * hvd.size()), compression=policy)
    net.compile(optimizer, loss=loss(), metrics=["accuracy"], steps_per_execution=4)
    rng = np.random.default_rng(hvd.rank())
    x = rng.integers(0, 100, (320, 6))
    y = x[:, 0] // 10
    callbacks = [
        hvd_keras.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd_keras.callbacks.MetricAverageCallback(),
        hvd_keras.callbacks.LearningRateWarmupCallback(0.05 * hvd.size(), warmup_epochs=3),
        hvd_keras.callbacks.LearningRateScheduleCallback(0.05 * hvd.size(), lambda epoch: 0.1, start_epoch=6),
    ]
    history = net.fit(x, y, batch_size=16, epochs=8, callbacks=callbacks, validation_split=0.1, verbose=0).history
    assert history["accuracy"][-1] > 0.9 > 0.5 > history["accuracy"][0]
    assert_ranks_equal(flat(net))
    for name in ("loss", "accuracy", "val_loss", "lr"):
        assert_ranks_equal(np.array(history[name]), name)
    assert history["lr"][0] < history["lr"][2] == pytest.approx(0.05 * hvd.size(), rel=0.05)  # set every 4 steps
    assert history["lr"][-1] == pytest.approx(0.005 * hvd.size(), rel=1e-5)
    steps = optimizer.stats.steps
    assert optimizer._hvd._engine.controller.epoch == 8 and steps == int(optimizer.iterations)
    report = {row.name: row for row in optimizer.compression_report()}
    assert report["dense/kernel"].regime in ("critical", "relaxed")
    assert report["batch_normalization/gamma"].spec == "Dense()"
    seeds = [v for v in net.variables if v.name == "seed_generator_state"]
    assert seeds and len(np.unique(everyone(seeds[0].numpy().astype(np.float64)), axis=0)) == hvd.size()


def test_epochs_are_known_from_fit():
    regimes = []

    class NormWindow(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 0:
                regimes.append([row.regime for row in self.model.optimizer.compression_report() if row.regime])

    net, optimizer = compiled(Accordion(PowerSGD(4), PowerSGD(1), interval=1, eta=1e9))
    fit(
        net, epochs=4, callbacks=[NormWindow(), hvd_keras.callbacks.MetricAverageCallback()]
    )  # two that tell: told once
    assert [set(r) for r in regimes] == [{"critical"}, {"critical"}, {"relaxed"}, {"relaxed"}]
    assert optimizer._hvd._engine.controller.epoch == 4
    assert 0 < optimizer.stats.critical_fraction == pytest.approx(0.5)


def test_a_drop_of_the_learning_rate_counts_from_its_first_step_on():
    net, optimizer = compiled(Accordion(PowerSGD(4), PowerSGD(1), interval=10, eta=1e9), steps_per_epoch=5)
    fit(net, epochs=12)
    state = optimizer._hvd.state
    assert state.levels.numpy().all()
    optimizer.learning_rate = 0.005
    fit(net, steps=1)
    assert not state.levels.numpy().any()
    assert float(optimizer.learning_rate) == pytest.approx(0.005)


def test_a_learning_rate_schedule_is_watched_too():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([59], [0.05, 0.001])
    net, optimizer = compiled(Accordion(PowerSGD(4), PowerSGD(1), interval=10, eta=1e9), sgd(learning_rate=schedule))
    fit(net, epochs=12)
    assert optimizer._hvd.state.levels.numpy().all()
    fit(net, epochs=1)
    assert not optimizer._hvd.state.levels.numpy().any()


class Overflowing(keras.layers.Layer):
    """Makes the gradients of one rank infinite where the input says so."""

    def call(self, x):
        @tf.custom_gradient
        def identity(x):
            def grad(dy):
                bad = tf.reduce_any(x > 1e6)
                return tf.where(bad, tf.constant(np.inf, dy.dtype), dy)

            return x, grad

        return identity(x)


def test_mixed_precision_with_loss_scaling_skips_an_overflow_on_all_ranks_without_a_trace():
    keras.config.set_dtype_policy("mixed_float16")
    keras.utils.set_random_seed(4)
    net = keras.Sequential([keras.layers.Input((32,)), keras.layers.Dense(64), Overflowing(), keras.layers.Dense(48)])
    scaled = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=256.0, dynamic_growth_steps=5)
    net, optimizer = compiled(TopK(0.1), scaled, net)
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    rng = np.random.default_rng(hvd.rank())
    x, y = rng.standard_normal((64, 32)).astype("float32"), rng.integers(0, 48, 64)
    net.fit(x, y, batch_size=8, verbose=0, shuffle=False)
    assert float(optimizer.dynamic_scale) == 512.0  # after five sound steps
    before = flat(net), residuals(optimizer), float(optimizer.dynamic_scale), int(optimizer.iterations)
    bad = x[:8].copy()
    weights = net.layers[0].kernel.numpy()
    if hvd.rank() == hvd.size() - 1:
        bad[0] = 3e6 * weights[:, 0] / np.linalg.norm(weights[:, 0]) ** 2
    seen = net.layers[0](bad).numpy()
    assert (seen > 1e6).any() == (hvd.rank() == hvd.size() - 1) or np.isinf(seen).any()
    net.fit(bad, y[:8], batch_size=8, verbose=0, shuffle=False)
    np.testing.assert_array_equal(flat(net), before[0])
    for name, residual in residuals(optimizer).items():
        np.testing.assert_array_equal(residual, before[1][name], name)
    assert float(optimizer.dynamic_scale) == before[2] / 2 and int(optimizer.iterations) == before[3]
    net.fit(x, y, batch_size=8, verbose=0, shuffle=False)
    assert int(optimizer.iterations) > before[3]
    assert_ranks_equal(flat(net))
    assert max(np.abs(r).max() for r in residuals(optimizer).values()) < 10  # not in the scale of the loss


def test_what_keras_would_do_by_itself_under_mixed_float16_is_refused_on_all_ranks():
    keras.config.set_dtype_policy("mixed_float16")
    net, _ = compiled(TopK(0.1))
    with pytest.raises(ValueError, match=r"LossScaleOptimizer\(optimizer\)"):
        fit(net)
    with pytest.raises(ValueError, match=r"LossScaleOptimizer\(optimizer\)"):
        wrapped = keras.optimizers.LossScaleOptimizer(hvd_keras.DistributedOptimizer(sgd(), compression=TopK(0.1)))
        wrapped.build(net.trainable_variables)


def test_nan_without_loss_scaling_reaches_the_weights_of_all_ranks_and_no_residual():
    net, optimizer = compiled(PowerSGD(2))
    fit(net)
    before = residuals(optimizer)
    x, y = data()
    if hvd.rank() == 0:
        x[:BATCH] = np.nan
    net.fit(x[:BATCH], y[:BATCH], batch_size=BATCH, verbose=0)
    assert np.isnan(flat(net)).any()
    assert len({bool(b) for b in np.isnan(everyone(flat(net))).any(axis=1)}) == 1
    for name, residual in residuals(optimizer).items():
        np.testing.assert_array_equal(residual, before[name], name)


@pytest.mark.parametrize("passes", [2, 3])
def test_compression_of_several_backward_passes(passes, tmp_path):
    net, optimizer = compiled(PowerSGD(2), backward_passes_per_step=passes, average_aggregated_gradients=True)
    fit(net, steps=6)
    assert_ranks_equal(flat(net))
    assert optimizer.stats.steps == 6 // passes
    fit(net, steps=4)  # what is left over waits for the next batches
    assert optimizer.stats.steps == 10 // passes
    fit(net, steps=1)
    file = tmp_path / f"{hvd.rank()}.keras"
    net.save(file)
    options = {"backward_passes_per_step": passes, "average_aggregated_gradients": True}
    loaded = hvd_keras.load_model(file, compression=PowerSGD(2), **options)
    for going_on in (net, loaded):
        fit(going_on, steps=passes, seed=1)
    np.testing.assert_array_equal(flat(net), flat(loaded))


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"steps_per_execution": 5}, {}], ids=str)
def test_ways_of_running_are_the_same_training(options):
    nets = []
    for compile_options in ({}, options):
        keras.backend.clear_session()
        net, _ = compiled(TopK(0.05), compile_options=compile_options)
        fit(net, epochs=2)
        nets.append(flat(net))
    np.testing.assert_allclose(nets[0], nets[1], rtol=1e-4, atol=1e-6)


def test_two_optimizers_in_a_custom_train_step():
    class Gan(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = keras.Sequential([keras.layers.Input((16,)), keras.layers.Dense(80), keras.layers.Dense(16)])
            self.second = keras.Sequential([keras.layers.Input((16,)), keras.layers.Dense(90), keras.layers.Dense(4)])
            policy = Accordion(PowerSGD(2), TopK(0.01), interval=1, eta=1e9)
            self.first_optimizer = hvd_keras.DistributedOptimizer(keras.optimizers.Adam(0.001), compression=policy)
            self.second_optimizer = hvd_keras.DistributedOptimizer(sgd(), compression=QSGD(7))

        def train_step(self, batch):
            with tf.GradientTape(persistent=True) as tape:
                made = self.first(batch)
                value = tf.reduce_mean((made - batch) ** 2)
                other = tf.reduce_mean(self.second(tf.stop_gradient(made)) ** 2)
            weights = self.first.trainable_variables
            self.first_optimizer.apply_gradients(zip(tape.gradient(value, weights), weights, strict=True))
            weights = self.second.trainable_variables
            self.second_optimizer.apply_gradients(zip(tape.gradient(other, weights), weights, strict=True))
            return {"loss": value}

    keras.utils.set_random_seed(5)
    net = Gan()
    net.compile()
    x = np.random.default_rng(hvd.rank()).standard_normal((40, 16)).astype("float32")
    net.fit(x, batch_size=8, epochs=4, verbose=0, callbacks=[hvd_keras.callbacks.BroadcastGlobalVariablesCallback(0)])
    assert_ranks_equal(flat(net))
    assert net.first_optimizer.stats.steps == net.second_optimizer.stats.steps == 20
    assert {row.regime for row in net.first_optimizer.compression_report()} == {None, "relaxed"}


def test_a_subset_of_the_variables_and_missing_gradients():
    net = model()
    optimizer = hvd_keras.DistributedOptimizer(sgd(), compression=TopK(0.1))
    optimizer.build(net.trainable_variables)
    variables = net.trainable_variables[2:6]
    grads = [tf.random.stateless_normal(v.shape, (hvd.rank(), i)) for i, v in enumerate(variables)]
    before = [v.numpy() for v in net.trainable_variables]
    optimizer.apply(grads, variables)
    optimizer.apply([*grads[:3], None], variables)
    changed = [not np.array_equal(v.numpy(), old) for v, old in zip(net.trainable_variables, before, strict=True)]
    assert changed == [2 <= i < 6 for i in range(len(before))]
    assert_ranks_equal(flat(net))


def test_a_model_that_learns_its_shapes_late_and_an_optimizer_that_was_used_before():
    net = keras.Sequential([keras.layers.Dense(64), keras.layers.Dense(10)])
    net, _ = compiled(PowerSGD(2), net=net)
    x, y = data()
    callbacks = [hvd_keras.callbacks.BroadcastGlobalVariablesCallback(0)]
    net.fit(x.reshape(len(x), -1), y, batch_size=BATCH, verbose=0, epochs=2, callbacks=callbacks)
    assert_ranks_equal(flat(net))
    used = model()
    used.compile(sgd(), loss=loss())
    used.fit(*data(rank=0), batch_size=BATCH, verbose=0)
    velocity = used.optimizer.momentums[0].numpy()
    optimizer = hvd_keras.DistributedOptimizer(used.optimizer, compression=PowerSGD(2))
    np.testing.assert_array_equal(optimizer.momentums[0].numpy(), velocity)
    assert int(optimizer.iterations) == 5
    used.compile(optimizer, loss=loss())
    fit(used)
    assert_ranks_equal(flat(used)) and int(optimizer.iterations) == 10


def test_tf_variables_and_variables_that_appear_later():
    averaging = hvd.GradientExchange(TopK(0.1), sparse_as_dense=True)
    first, second = tf.Variable(tf.zeros((64, 32)), name="w"), tf.Variable(tf.zeros((64, 32)), name="w")

    @tf.function
    def step(variables, seed):
        return averaging([tf.random.stateless_normal(v.shape, (seed, hvd.rank())) for v in variables], variables)

    for seed in range(3):
        (mean,) = step([first], seed)
    for seed in range(3):
        mean, other = step([first, second], seed)
    assert_ranks_equal(mean.numpy())
    assert_ranks_equal(other.numpy())
    assert [row.name for row in averaging.compression_report()] == ["w", "w_1"]
    assert averaging.stats.steps == 6


@pytest.mark.parametrize("graph", [True, False])
def test_a_gradient_that_appears_later(graph):
    first, second = tf.Variable(tf.zeros((64, 32)), name="a"), tf.Variable(tf.zeros((64, 32)), name="b")
    averaging = hvd.GradientExchange(TopK(0.1, error_feedback=False))

    def step(both):
        mine = tf.fill((64, 32), 1.0 + hvd.rank())
        return averaging([mine, mine if both else None], [first, second])

    run = tf.function(step) if graph else step
    mean = (hvd.size() + 1) / 2
    for both in (False, False, True, True, False):
        a, b = run(both)
        assert float(tf.reduce_max(a)) == pytest.approx(mean)
        if both:
            assert float(tf.reduce_max(b)) == pytest.approx(mean)
    assert averaging.stats.steps == 5


@pytest.mark.parametrize("spec", [None, TopK(0.1)], ids=str)
def test_nothing_but_local_or_missing_gradients(spec):
    averaging = hvd.GradientExchange(spec)
    first, second = tf.Variable(tf.zeros((64, 32)), name="a"), tf.Variable(tf.zeros((64, 32)), name="b")
    assert averaging([None, None], [first, second]) == [None, None]
    averaging.register_local(first)
    (own,) = averaging([tf.fill((64, 32), 2.0)], [first])
    assert float(tf.reduce_max(own)) == pytest.approx(2.0 / hvd.size())


def test_slices_travel_beside_compressed_layers(tmp_path):
    keras.utils.set_random_seed(3)
    net = keras.Sequential(
        [keras.layers.Input((5,)), keras.layers.Embedding(500, 16), keras.layers.Flatten(), keras.layers.Dense(60)]
    )
    adaptive = Accordion(TopK(0.1), TopK(0.01), interval=1)
    net, optimizer = compiled({"*dense*": PowerSGD(2), "*": adaptive}, net=net)
    rng = np.random.default_rng(hvd.rank())
    told = [hvd_keras.callbacks.EpochCallback()]
    net.fit(rng.integers(0, 500, (40, 5)), rng.integers(0, 60, 40), batch_size=8, epochs=2, verbose=0, callbacks=told)
    assert_ranks_equal(flat(net))
    assert not any("embedding" in name for name in residuals(optimizer))
    assert tf.train.Checkpoint(optimizer=optimizer).write(str(tmp_path / str(hvd.rank())))
    report = {row.name.split("/")[0]: row for row in optimizer.compression_report()}
    assert (report["embedding"].spec, report["embedding"].regime) == ("slices, gathered", None)
    assert report["embedding"].sent_bytes == (hvd.size() - 1) * 40 * (16 * 4 + 8)
    dense, optimizer = compiled(TopK(0.01), net=keras.models.clone_model(net), sparse_as_dense=True)
    dense.fit(rng.integers(0, 500, (40, 5)), rng.integers(0, 60, 40), batch_size=8, epochs=2, verbose=0)
    assert any("embedding" in name and r.any() for name, r in residuals(optimizer).items())


def test_the_seen_parameters_of_the_optimizer_are_those_of_keras():
    optimizer = hvd_keras.DistributedOptimizer(keras.optimizers.AdamW(0.01, weight_decay=0.1), compression=PowerSGD(2))
    assert isinstance(optimizer, keras.optimizers.AdamW) and type(optimizer).__name__ == "AdamW"
    assert optimizer.get_config() == {
        **keras.optimizers.AdamW(0.01, weight_decay=0.1).get_config(),
        "name": optimizer.name,
    }
    again = type(optimizer).from_config(optimizer.get_config())
    assert again._hvd is not optimizer._hvd and again._hvd.settings == optimizer._hvd.settings
    net, _ = compiled(net=model(), optimizer=keras.optimizers.Adam())
    net.compile(again, loss=loss())
    fit(net)
    assert_ranks_equal(flat(net))
    assert again.stats.sent_bytes < again.stats.dense_bytes


def test_horovods_own_wrapper_is_taken_over():
    import horovod.keras as theirs

    theirs.init()
    import horovod.tensorflow.keras as of_tensorflow

    options = {"op": of_tensorflow.Sum, "backward_passes_per_step": 2, "average_aggregated_gradients": True}
    optimizer = hvd_keras.DistributedOptimizer(of_tensorflow.DistributedOptimizer(sgd(), **options))
    assert optimizer._hvd.settings.backward_passes_per_step == 2 and optimizer._hvd_sums.average
    wrapped = theirs.DistributedOptimizer(sgd(momentum=0.8), op=theirs.Sum, compression=theirs.Compression.fp16)
    optimizer = hvd_keras.DistributedOptimizer(wrapped, compression=TopK(0.1))
    assert type(optimizer).__mro__[2] is keras.optimizers.SGD and optimizer.momentum == 0.8
    assert optimizer._hvd.settings.op == hvd.Sum
    net = model()
    net.compile(optimizer, loss=loss())
    fit(net)
    assert_ranks_equal(flat(net))


def test_momentum_correction_scales_the_velocity():
    net, optimizer = compiled(None)
    fit(net)
    before = [v.numpy() for v in optimizer.momentums]
    callback = hvd_keras.callbacks.LearningRateScheduleCallback(0.05, lambda epoch: 0.1)
    callback.set_model(net)
    callback.on_epoch_begin(0)
    callback.on_train_batch_begin(0)
    for v, old in zip(optimizer.momentums, before, strict=True):
        np.testing.assert_allclose(v.numpy(), old * 0.1, rtol=1e-5)
    assert float(optimizer.learning_rate) == pytest.approx(0.005)


def test_metrics_are_averaged():
    callback = hvd_keras.callbacks.MetricAverageCallback()
    callback.set_model(keras.Sequential())
    rank, mean = float(hvd.rank()), (hvd.size() - 1) / 2
    logs = {"b": rank, "a": 1.0, "of classes": np.array([rank, 2.0]), "listed": [rank, rank], "note": "kept"}
    callback.on_epoch_end(0, logs)
    assert (logs["b"], logs["a"], logs["note"]) == (mean, 1.0, "kept") and type(logs["b"]) is float
    np.testing.assert_array_equal(logs["of classes"], [mean, 2.0])
    np.testing.assert_array_equal(logs["listed"], [mean, mean])
    with pytest.raises(ValueError, match=r"configured differently: .*metric (val_)?loss"):
        callback.on_epoch_end(1, {"loss": 1.0, **({"val_loss": 1.0} if hvd.rank() == 0 else {})})


def test_local_variables_are_not_broadcast():
    net = model(seed=hvd.rank())
    net, _ = compiled(PowerSGD(2), net=net)
    kept = net.layers[-1].kernel
    callback = hvd_keras.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=[kept])
    callback.set_model(net)
    callback.on_train_begin()
    rows = everyone(kept.numpy())
    assert not np.array_equal(rows[0], rows[1])
    assert_ranks_equal(net.layers[0].kernel.numpy())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("spec", [None, TopK(0.1), PowerSGD(2), Accordion(PowerSGD(2), QSGD(7))], ids=str)
def test_gradients_of_other_dtypes(spec, dtype):
    v = tf.Variable(tf.zeros((64, 32), dtype), name="w")
    averaging = hvd.GradientExchange(spec if spec is not None or dtype != "bfloat16" else {"*": None})
    exact = np.mean([np.random.default_rng(r).standard_normal((64, 32)) for r in range(hvd.size())], axis=0)
    mine = tf.constant(np.random.default_rng(hvd.rank()).standard_normal((64, 32)), dtype)
    total = 0.0
    for _ in range(30):
        (mean,) = averaging([mine], [v])
        assert mean.dtype == dtype
        total += mean.numpy().astype(np.float64)
    assert_ranks_equal(total)
    limit = {"float16": 2e-3, "bfloat16": 2e-2, "float64": 1e-12}[dtype] if spec is None else 0.6
    assert np.linalg.norm(total / 30 - exact) <= limit * np.linalg.norm(exact)


def test_a_process_set_exchanges_for_itself(others):
    if others.included() and others is not hvd.global_process_set:
        # what only they do must not confuse the names of what all do
        early = hvd.GradientExchange(TopK(0.1), process_set=others)
        early([tf.ones((64, 32))], [tf.Variable(tf.zeros((64, 32)))])
    v = tf.Variable(tf.zeros((64, 32)), name="w")
    averaging = hvd.GradientExchange(Accordion(TopK(0.1), PowerSGD(1), interval=2, unit="steps"), process_set=others)
    for step in range(6):
        mine = tf.constant(np.random.default_rng((step, hvd.rank())).standard_normal((64, 32)), tf.float32)
        (mean,) = averaging([mine], [v])
        rows = everyone(mean.numpy())
        for member in others.ranks[1:]:
            np.testing.assert_array_equal(rows[others.ranks[0]], rows[member])
        if not others.included():
            np.testing.assert_array_equal(mean.numpy(), mine.numpy())
    assert averaging.stats.steps == (6 if others.included() else 0)
    everybody = hvd.GradientExchange(TopK(0.1))
    assert_ranks_equal(everybody([tf.ones((64, 32))], [v])[0].numpy())


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (user_policy.Staircase(first=3), user_policy.EXPECTED),
        (Warmup(PowerSGD(1), steps=4, levels=2), [PowerSGD(r) for r in (4, 4, 2, 2, 1, 1, 1, 1)]),
        (
            Accordion(levels=[PowerSGD(4), PowerSGD(2), PowerSGD(1)], interval=1, unit="steps", eta=1e9),
            [PowerSGD(4)] * 2 + [PowerSGD(1)] * 6,
        ),
    ],
    ids=["users", "warmup", "levels"],
)
def test_other_policies_in_a_graph_that_is_traced_once(policy, expected):
    exchange, w, traces, specs = hvd.GradientExchange(policy), tf.Variable(tf.zeros((60, 50))), [], []
    noise = tf.random.stateless_normal((8, 60, 50), [hvd.rank(), 1])

    @tf.function
    def step(gradient):
        traces.append(None)
        w.assign_sub(exchange([gradient], [w])[0])

    for i in range(8):
        specs += [row.spec for row in exchange.compression_report()] or [
            str(expected[0])
        ]  # built by the first exchange
        step(noise[i])
    assert specs == [str(spec) for spec in expected] and len(traces) == 1
    assert exchange.state.levels.numpy().tolist() == [list(policy.specs("w")).index(expected[-1])]
    assert_ranks_equal(w.numpy().ravel())


def test_memory_that_is_a_ranks_own():
    exchange, w = hvd.GradientExchange(Counted(0.2)), tf.Variable(tf.zeros((60, 50)))
    noise = tf.random.stateless_normal((8, 60, 50), [hvd.rank(), 2])

    @tf.function
    def step(gradient):
        w.assign_sub(exchange([gradient], [w])[0])

    def memory():
        (parts,) = exchange.state.own.values()
        return {part: v.numpy() for part, v in parts.items()}

    for i in range(3):
        step(noise[i])
    before, (residual,) = memory(), (v.numpy() for v in exchange.state.residual.values())
    assert not exchange.state.memory and len(np.unique(everyone(before["total"]), axis=0)) == hvd.size()
    exchange.broadcast(0)
    np.testing.assert_equal(memory(), before)

    state, rank, n = exchange.state, hvd.rank(), hvd.size()
    saved = state.arrays()
    assert state.load(saved) == [] and {"own.0.total", "own.0.part"} <= set(saved)
    np.testing.assert_equal(memory(), before)
    for owner, factors in (((rank, 2 * n), {"total": 1.0, "part": 0.5}), ((rank + 1, n), {"total": 0.0, "part": 0.0})):
        state.load({**saved, "owner": np.array(owner, np.int32)})
        step(noise[3])  # sums what went into the exchange: gradient and residual
        sent = noise[3].numpy() + residual * factors["part"]
        for part, factor in factors.items():
            np.testing.assert_allclose(memory()[part], before[part] * factor + sent, atol=1e-5)
    state.load(saved)
    state.move(rank, 3 * n)  # as if so many were here now
    for part, factor in {"total": 1.0, "part": 3.0}.items():
        np.testing.assert_allclose(memory()[part], before[part] * factor, rtol=1e-6)
