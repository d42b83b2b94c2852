"""Batches whose size follows an AccordionBatchSize, under Keras: the same on all ranks, and what that saves."""

import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
import hvd_accordion.tensorflow.keras as hvd_keras
from hvd_accordion import Accordion, AccordionBatchSize, PowerSGD, TopK
from tests.parallel.workers.tensorflow.keras_common import (
    BATCH,
    STEPS,
    assert_ranks_equal,
    compiled,
    data,
    fit,
    flat,
    loss,
    model,
    sgd,
)

EPOCHS = 4
# of STEPS = 5 micro-batches an epoch: two epochs one by one, then 4 and the one that is left over
GROUPS = [*[(1, 1.0)] * (2 * STEPS), *((n, s * n / 4) for s in (1.0, 2.5) for n in (4, 1))]


def rule(**options):
    return AccordionBatchSize(8 * hvd.size(), 32 * hvd.size(), **{"eta": 1e3, "interval": 1, "warmup": 2, **options})


def by_hand():
    """Sums of micro-batches, averaged by Horovod's own allreduce."""
    net, optimizer, step = model(), sgd(), 0
    x, y = (tf.constant(part) for part in data())
    variables = [v.value for v in net.trainable_variables]

    @tf.function
    def gradients(i):
        with tf.GradientTape() as tape:
            value = loss()(y[BATCH * i : BATCH * i + BATCH], net(x[BATCH * i : BATCH * i + BATCH], training=True))
        return tape.gradient(value, variables)

    @tf.function
    def averages(sums):
        return [hvd.allreduce(g, op=hvd.Average, name=f"by_hand.{i}") for i, g in enumerate(sums)]

    for size, scale in GROUPS:
        sums = [np.zeros(v.shape, np.float32) for v in variables]
        for _ in range(size):
            sums = [total + g.numpy() for total, g in zip(sums, gradients(tf.constant(step % STEPS)), strict=True)]
            step += 1
        optimizer.learning_rate = np.float32(0.05) * np.float32(scale)
        optimizer.apply(averages([tf.constant(x / np.float32(size)) for x in sums]), net.trainable_variables)
    return net


def test_fit_equals_accumulation_by_hand():
    net, optimizer = compiled(batch_size=rule())
    fit(net, EPOCHS)
    np.testing.assert_allclose(flat(net), flat(by_hand()), rtol=1e-5, atol=1e-7)
    assert_ranks_equal(flat(net))
    stats = optimizer.stats
    assert (stats.steps, stats.updates) == (EPOCHS * STEPS, len(GROUPS))
    assert stats.ratio == pytest.approx(EPOCHS * STEPS / len(GROUPS))


def test_composes_with_compression():
    compression = {"conv*": TopK(0.05), "*/kernel": Accordion(PowerSGD(4), PowerSGD(1), interval=1, eta=1e3), "*": None}
    net, optimizer = compiled(compression, batch_size=rule())
    fit(net, EPOCHS)
    assert_ranks_equal(flat(net))
    assert optimizer.stats.updates == len(GROUPS)
    report = optimizer.compression_report()
    assert report.batch.startswith(f"batch size {32 * hvd.size()} (relaxed)")
    assert {row.spec for row in report if row.regime} == {"PowerSGD(rank=1)"}


def test_what_only_rank_0_restored_goes_to_all(tmp_path):
    x, y = (tf.constant(part) for part in data())

    def stepping(net):
        variables = [v.value for v in net.trainable_variables]

        @tf.function
        def step(i):
            with tf.GradientTape() as tape:
                value = loss()(y[BATCH * i : BATCH * i + BATCH], net(x[BATCH * i : BATCH * i + BATCH], training=True))
            net.optimizer.apply(tape.gradient(value, variables), net.trainable_variables)

        return lambda i: step(tf.constant(i % STEPS))

    net, _ = compiled(batch_size=rule(), steps_per_epoch=STEPS)
    step = stepping(net)
    for i in range(2 * STEPS + 3):
        step(i)
    restored, optimizer = compiled(batch_size=rule(), steps_per_epoch=STEPS)
    optimizer.build(restored.trainable_variables)
    path = tf.train.Checkpoint(model=net, optimizer=net.optimizer).save(str(tmp_path / "checkpoint"))
    if hvd.rank() == 0:
        tf.train.Checkpoint(model=restored, optimizer=optimizer).restore(path).assert_consumed()
    callback = hvd_keras.callbacks.BroadcastGlobalVariablesCallback(0)
    callback.set_model(restored)
    callback.on_train_begin()
    assert int(optimizer._hvd_sums.count) == 3
    step = stepping(restored)
    for i in range(3, STEPS):
        step(i)
    assert_ranks_equal(flat(restored))
    assert optimizer.stats.updates == 2 * STEPS + 2
