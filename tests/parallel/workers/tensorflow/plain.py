"""compression=None: what Horovod promises, on Keras 3."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
import hvd_accordion.tensorflow.keras as hvd_keras
from tests.parallel.workers.tensorflow.keras_common import (
    BATCH,
    assert_ranks_equal,
    compiled,
    data,
    everyone,
    fit,
    flat,
    joined,
    loss,
    model,
    sgd,
)


def alone(optimizer, epochs=2, net=None, **options):
    """A single process on the joined batches."""
    net = net or model()
    net.compile(optimizer, loss=loss(), **options)
    x, y = joined()
    net.fit(x, y, batch_size=BATCH * hvd.size(), epochs=epochs, shuffle=False, verbose=0)
    return flat(net)


OPTIMIZERS = {
    "sgd": lambda: sgd(),
    "nesterov": lambda: sgd(nesterov=True, weight_decay=0.01),
    "adam": lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.5),
    "adamw": lambda: keras.optimizers.AdamW(0.01, clipvalue=0.01),
    "ema": lambda: sgd(use_ema=True, ema_overwrite_frequency=3, clipnorm=0.1),
    "schedule": lambda: sgd(learning_rate=keras.optimizers.schedules.CosineDecay(0.1, 10)),
    "accumulation": lambda: sgd(gradient_accumulation_steps=2),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(sgd()),
    "lion": lambda: keras.optimizers.Lion(0.001),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fit_equals_a_single_process_on_the_joined_batch(name):
    net, optimizer = compiled(None, OPTIMIZERS[name]())
    fit(net, epochs=2)
    assert_ranks_equal(flat(net), name)
    expected = alone(OPTIMIZERS[name]())
    # Adam and Lion divide by (the sign of) what may be near zero: rounding shows more there
    limit = {"adam": 1e-4, "adamw": 1e-4, "lion": 1e-2}.get(name, 1e-6)
    assert np.linalg.norm(flat(net) - expected) <= limit * np.linalg.norm(expected), name
    assert type(optimizer).__name__ == type(OPTIMIZERS[name]()).__name__


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_predivide_factor": 2.0},
        {"groups": 2},
        {"groups": 0},
        {"compression": hvd.Compression.none},
        {"device_dense": "/cpu:0"},
    ],
    ids=str,
)
def test_arguments_of_horovod_change_nothing_in_the_mean(options):
    net = model()
    if options.get("groups") == 2:
        options = {"groups": [[v for v in net.trainable_variables[:4]], [net.trainable_variables[5]]]}
    net, _ = compiled(net=net, **options)
    fit(net, epochs=2)
    expected = alone(sgd())
    assert np.linalg.norm(flat(net) - expected) <= 1e-6 * np.linalg.norm(expected)


def test_sum_and_fp16():
    net, _ = compiled(op=hvd.Sum, optimizer=sgd(learning_rate=0.05 / hvd.size()))
    fit(net, epochs=2)
    expected = alone(sgd())
    assert np.linalg.norm(flat(net) - expected) <= 1e-5 * np.linalg.norm(expected)
    net, _ = compiled(hvd.Compression.fp16)
    fit(net, epochs=2)
    assert_ranks_equal(flat(net))
    assert 0 < np.linalg.norm(flat(net) - expected) <= 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"steps_per_execution": 4}], ids=str)
def test_ways_of_running(options):
    net, _ = compiled(compile_options=options)
    fit(net, epochs=2)
    expected = alone(sgd())
    assert np.linalg.norm(flat(net) - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("average", [True, False])
def test_backward_passes_add_up_before_they_are_exchanged(average):
    net, optimizer = compiled(backward_passes_per_step=2, average_aggregated_gradients=average)
    fit(net, steps=6)
    assert_ranks_equal(flat(net))
    assert optimizer.stats.steps == 3 and int(optimizer.iterations) == 6
    expected = model()
    apply = sgd()
    parts = [data(rank, 6) for rank in range(hvd.size())]
    for step in range(0, 6, 2):
        grads = []
        for x, y in parts:
            for i in (step, step + 1):
                at = slice(i * BATCH, (i + 1) * BATCH)
                with tf.GradientTape() as tape:
                    value = loss()(y[at], expected(x[at]))
                grads.append(tape.gradient(value, expected.trainable_variables))
        by = len(grads) if average else hvd.size()
        apply.apply_gradients(
            [
                (tf.add_n(list(g)) / by, v)
                for g, v in zip(zip(*grads, strict=True), expected.trainable_variables, strict=True)
            ]
        )
    assert np.linalg.norm(flat(net) - flat(expected)) <= 1e-6 * np.linalg.norm(flat(expected))


def test_backward_passes_of_slices_as_dense_and_of_some_of_the_variables():
    net, optimizer = compiled(net=slices_model(), backward_passes_per_step=2, sparse_as_dense=True)
    x = np.random.default_rng(hvd.rank()).integers(0, 50, (40, 5))
    net.fit(x, x[:, 0] % 10, batch_size=10, epochs=2, shuffle=False, verbose=0)
    assert_ranks_equal(flat(net))
    assert optimizer.stats.steps == 4
    kernel = net.layers[-1].kernel
    before = kernel.numpy()
    for _ in range(2):
        optimizer.apply([tf.fill(kernel.shape, float(hvd.rank()))], [kernel])
    assert not np.array_equal(kernel.numpy(), before)
    assert_ranks_equal(kernel.numpy())


def slices_model():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [keras.layers.Input((5,)), keras.layers.Embedding(50, 8), keras.layers.Flatten(), keras.layers.Dense(10)]
    )


@pytest.mark.parametrize("dense", [False, True])
def test_slices_of_an_embedding(dense):
    net, optimizer = compiled(net=slices_model(), optimizer=sgd(momentum=0.0), sparse_as_dense=dense)
    parts = [np.random.default_rng(rank).integers(0, 50, (20, 5)) for rank in range(hvd.size())]
    labels = [np.random.default_rng(10 + rank).integers(0, 10, 20) for rank in range(hvd.size())]
    x, y = parts[hvd.rank()], labels[hvd.rank()]
    net.fit(x, y, batch_size=20, epochs=3, shuffle=False, verbose=0)
    assert_ranks_equal(flat(net))
    single = slices_model()
    single.compile(sgd(momentum=0.0), loss=loss())
    single.fit(
        np.concatenate(parts), np.concatenate(labels), batch_size=20 * hvd.size(), epochs=3, shuffle=False, verbose=0
    )
    assert np.linalg.norm(flat(net) - flat(single)) <= 1e-6 * np.linalg.norm(flat(single))
    sent = {row.name: row.sent_bytes for row in optimizer.compression_report()}["embedding/embeddings"]
    n = hvd.size()
    assert sent == pytest.approx(2 * (n - 1) / n * 50 * 8 * 4 if dense else (n - 1) * 100 * (8 * 4 + 8))


def tape_step(net, optimizer, tape_options, x, y):
    with tf.GradientTape() as tape:
        value = loss()(y, net(x))
    tape = hvd.DistributedGradientTape(tape, **tape_options)
    optimizer.apply_gradients(zip(tape.gradient(value, net.trainable_variables), net.trainable_variables, strict=True))


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("options", [{}, {"groups": 3}, {"compression": hvd.Compression.none}], ids=str)
def test_the_tape_averages(options, graph):
    net, optimizer = model(), sgd()
    optimizer.build(net.trainable_variables)
    step = tf.function(tape_step) if graph else tape_step
    x, y = data()
    for i in range(5):
        at = slice(i * BATCH, (i + 1) * BATCH)
        step(net, optimizer, options, tf.constant(x[at]), tf.constant(y[at]))
    assert_ranks_equal(flat(net))
    expected = alone(sgd(), epochs=1)
    assert np.linalg.norm(flat(net) - expected) <= 1e-6 * np.linalg.norm(expected)


def test_the_tape_of_tf_variables_with_nested_sources_and_missing_gradients():
    a, b, unused = tf.Variable([1.0, 2.0], name="a"), tf.Variable([3.0], name="a"), tf.Variable([1.0])
    rank = float(hvd.rank())
    with hvd.DistributedGradientTape(tf.GradientTape(persistent=True)) as tape:
        y = tf.reduce_sum(a * (rank + 1.0)) + tf.reduce_sum(b * rank)
    grads = tape.gradient(y, {"x": [a], "y": b, "z": unused})
    mean = (hvd.size() - 1) / 2
    np.testing.assert_allclose(grads["x"][0], [mean + 1] * 2)
    np.testing.assert_allclose(grads["y"], [mean])
    assert grads["z"] is None
    np.testing.assert_allclose(tape.gradient(y, b), [mean])
    assert isinstance(tape, tf.GradientTape)


def test_a_gradient_that_only_some_ranks_have_counts_as_zero_on_the_others():
    v, w = tf.Variable([1.0, 2.0]), tf.Variable([1.0])
    exchange = hvd.GradientExchange()
    grads = [tf.constant([2.0, 4.0]) if hvd.rank() == 0 else None, tf.constant([1.0])]
    for _ in range(3):
        first, second = exchange(grads, [v, w])
        np.testing.assert_allclose(first, np.array([2.0, 4.0]) / hvd.size())
        np.testing.assert_allclose(second, [1.0])


def test_adasum_works_as_in_horovod():
    v = tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(v * (1.0 + hvd.rank()))
    (got,) = hvd.DistributedGradientTape(tape, op=hvd.Adasum).gradient(y, [v])
    expected = hvd.allreduce(tf.constant([1.0 + hvd.rank()] * 2), op=hvd.Adasum, name="adasum.expected")
    np.testing.assert_allclose(got, expected)


def test_local_sources_stay_a_ranks_own():
    a, b = tf.Variable([1.0]), tf.Variable([1.0])
    with tf.GradientTape(persistent=True) as tape:
        y = a * float(hvd.rank()) + b * float(hvd.rank())
    wrapped = hvd.DistributedGradientTape(tape)
    wrapped.register_local_source(a)
    local, others = wrapped.get_local_and_global_gradients(y, [a, b])
    assert local[0][0] is a and others[0][0] is b
    np.testing.assert_allclose(local[0][1], [hvd.rank() / hvd.size()])
    np.testing.assert_allclose(others[0][1], [(hvd.size() - 1) / 2])
    unscaled = hvd.DistributedGradientTape(tape, scale_local_gradients=False)
    unscaled.register_local_source(a)
    np.testing.assert_allclose(unscaled.gradient(y, [a, b])[0], [hvd.rank()])


def test_local_layers_of_an_optimizer():
    net = model()
    last = net.layers[-1]
    optimizer = hvd_keras.PartialDistributedOptimizer(sgd(), local_layers=last)
    net.compile(optimizer, loss=loss())
    fit(net)
    assert_ranks_equal(flat(keras.Sequential(net.layers[:1])))
    rows = everyone(last.kernel.numpy())
    assert not np.array_equal(rows[0], rows[1])


def test_broadcast_variables_of_both_kinds_and_all_dtypes():
    values = [
        tf.Variable(tf.cast([hvd.rank() + 1, 2], dtype))
        for dtype in (tf.float32, tf.float16, tf.bfloat16, tf.float64, tf.int32, tf.uint32, tf.int64, tf.bool)
    ]
    kept = keras.Variable(np.full(3, hvd.rank(), np.float32))
    for inplace in (False, True):
        numbers = [v for v in values if inplace is False or v.dtype in (tf.float32, tf.int32)]
        hvd.broadcast_variables([*numbers, kept], root_rank=hvd.size() - 1, inplace=inplace)
        for v in numbers:
            assert v.numpy()[0] == tf.cast(hvd.size(), v.dtype).numpy(), v.dtype
        np.testing.assert_array_equal(kept.numpy(), np.full(3, hvd.size() - 1))


def test_broadcast_of_global_variables():
    with pytest.raises(RuntimeError, match="does not support eager execution"):
        hvd.broadcast_global_variables(0)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        v = tf.compat.v1.get_variable("v", initializer=float(hvd.rank() + 5))
        session.run(tf.compat.v1.global_variables_initializer())
        session.run(hvd.broadcast_global_variables(0))
        assert session.run(v) == 5.0


def test_process_sets(first):
    v = tf.Variable([0.0])
    mine = tf.constant([float(hvd.rank())])
    (got,) = hvd.GradientExchange(process_set=first)([mine], [v])
    np.testing.assert_allclose(got, [hvd.rank()])
    net, _ = compiled(process_set=first)
    fit(net)
    rows = everyone(flat(net))
    assert not np.array_equal(rows[0], rows[1])
