"""Bad input and ranks that are configured differently: the same clear error on all of them, no hang."""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
import hvd_accordion.tensorflow.keras as hvd_keras
from hvd_accordion import Accordion, AccordionBatchSize, PowerSGD, TopK
from hvd_accordion.tensorflow.exchange import uneven
from tests.parallel.workers.tensorflow.keras_common import BATCH, compiled, data, fit, flat, model, sgd


def error_of(run):
    with pytest.raises(ValueError) as caught:
        run()
    message = str(caught.value)
    padded = np.frombuffer(message.encode()[:2000].ljust(2000, b"\0"), np.uint8)
    everyone = hvd.allgather(tf.constant(padded[None]), name="errors").numpy()
    texts = [bytes(row).decode().rstrip("\0") for row in everyone]
    assert len(set(texts)) == 1, texts
    return message


def mine(ours, others):
    """A value that the last rank has differently."""
    return ours if hvd.rank() == hvd.size() - 1 else others


def trained(net=None, **options):
    net, _ = compiled(net=net, **options)
    fit(net)


def test_different_specs():
    message = error_of(lambda: trained(compression=mine(PowerSGD(2), PowerSGD(4))))
    assert "rank=2" in message and "rank=4" in message


def test_compression_on_one_rank_only():
    assert "rank 0 has" in error_of(lambda: trained(compression=mine(None, TopK(0.01))))


def test_different_accordions():
    message = error_of(lambda: trained(compression=mine(Accordion(eta=0.4), Accordion(eta=0.5))))
    assert "eta=0.4" in message and "eta=0.5" in message


def test_different_batch_sizes():
    rules = AccordionBatchSize(16, 64, warmup=3), AccordionBatchSize(16, 64)
    assert "warmup=3" in error_of(lambda: trained(batch_size=mine(*rules)))
    message = error_of(lambda: trained(batch_size=AccordionBatchSize(15, 60)))
    assert f"small must be a multiple of the {hvd.size()} ranks, got 15" in message


def test_different_shapes_and_numbers_of_variables():
    net = keras.Sequential([*model().layers[:-1], keras.layers.Dense(mine(11, 12), name="dense4")])
    assert "(48, 11)" in error_of(lambda: trained(net, compression=PowerSGD(2)))
    keras.backend.clear_session()
    net = keras.Sequential(model().layers[: mine(-1, None)])
    assert "number of variables" in error_of(lambda: trained(net, compression=PowerSGD(2)))


def test_different_names():
    net = keras.Sequential([*model().layers[:-1], keras.layers.Dense(10, name=mine("other", "dense4"))])
    assert "other" in error_of(lambda: trained(net, compression=PowerSGD(2)))


@pytest.mark.parametrize(
    "option", ["seed", "backward_passes_per_step", "steps_per_epoch", "min_compress_numel", "groups"]
)
def test_different_options(option):
    assert option in error_of(lambda: trained(compression=PowerSGD(2), **{option: mine(3, 2)}))


def test_different_tapes():
    def step():
        v = tf.Variable(tf.zeros((64, 32)))
        with tf.GradientTape() as tape:
            y = tf.reduce_sum(v)
        hvd.DistributedGradientTape(tape, compression=mine(TopK(0.1), TopK(0.2))).gradient(y, [v])

    assert "ratio=0.1" in error_of(step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "topk"}, "compression must be .* got 'topk'"),
        ({"compression": {"*": 3}}, r"compression\['\*'\] must be"),
        ({"compression": TopK(0.1), "op": hvd.Adasum}, "op currently only supports Average and Sum"),
        ({"compression": TopK(0.1), "backward_passes_per_step": 0}, r"backward_passes_per_step must be .* got 0"),
        ({"compression": TopK(0.1), "steps_per_epoch": 0}, "steps_per_epoch must be .* got 0"),
        ({"compression": TopK(0.1), "steps_per_epoch": 2.5}, "steps_per_epoch must be .* got 2.5"),
        ({"compression": TopK(0.1), "seed": -1}, "seed must be .* got -1"),
        ({"compression": TopK(0.1), "gradient_predivide_factor": 0.0}, "gradient_predivide_factor must be"),
        ({"compression": TopK(0.1), "gradient_predivide_factor": 2.0, "op": hvd.Sum}, "gradient_predivide_factor"),
        ({"compression": TopK(0.1), "logger": 3}, "logger must have a method"),
        ({"compression": TopK(0.1), "groups": -1}, "groups must be .* got -1"),
        ({"compression": TopK(0.1), "groups": [[1]]}, "groups should be a non-negative integer or a list"),
        ({"compression": TopK(0.1), "process_set": 3}, r"process_set must be an hvd\.ProcessSet, got 3"),
        ({"process_set": hvd.ProcessSet([0])}, "process_set must be known to Horovod"),
        ({"compression": TopK(0.1), "average_aggregated_gradients": 1}, "average_aggregated_gradients must be"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        compiled(**options)


def test_bad_arguments_of_the_tape():
    with pytest.raises(TypeError, match=r"gradtape must be a tf\.GradientTape"):
        hvd.DistributedGradientTape(3)
    with pytest.raises(ValueError, match=r"op must be hvd\.Average or hvd\.Sum"):
        hvd.DistributedGradientTape(tf.GradientTape(), compression=TopK(0.1), op=hvd.Adasum)
    with pytest.raises(TypeError, match="compression must be"):
        hvd.DistributedGradientTape(tf.GradientTape(), compression=3)


def test_bad_optimizers():
    with pytest.raises(TypeError, match=r"optimizer must be a keras\.optimizers\.Optimizer"):
        hvd_keras.DistributedOptimizer("sgd")
    with pytest.raises(TypeError, match=r"optimizer must be a keras\.optimizers\.Optimizer"):
        hvd.DistributedOptimizer(3)
    with pytest.raises(ValueError, match="already"):
        hvd_keras.DistributedOptimizer(hvd_keras.DistributedOptimizer(sgd()))
    with pytest.raises(TypeError, match=r"tf\.compat\.v1\.train\.Optimizer"):
        hvd.DistributedOptimizer(tf.compat.v1.train.GradientDescentOptimizer(0.1), compression=TopK(0.1))


def test_a_glob_that_matches_no_variable():
    message = error_of(lambda: trained(compression={"nothing*": TopK(0.1)}))
    assert "'nothing*' matches no parameter name" in message and "conv1/kernel" in message


def test_gradients_of_another_shape_or_kind():
    v = tf.Variable(tf.zeros((64, 32)), name="w")
    averaging = hvd.GradientExchange(TopK(0.1))
    averaging([tf.zeros((64, 32))], [v])
    with pytest.raises(ValueError, match=r"the gradient of w must be float32 \(64, 32\)"):
        averaging([tf.zeros((32, 64))], [v])
    rows = tf.Variable(tf.zeros((10, 4)), name="rows")
    averaging = hvd.GradientExchange(TopK(0.1))
    averaging([tf.IndexedSlices(tf.ones((2, 4)), tf.constant([1, 2]), tf.constant([10, 4]))], [rows])
    with pytest.raises(ValueError, match="is dense but was IndexedSlices"):
        averaging([tf.zeros((10, 4))], [rows])


def test_slices_in_several_backward_passes():
    net = keras.Sequential([keras.layers.Input((5,)), keras.layers.Embedding(50, 8), keras.layers.Flatten()])
    net, _ = compiled(net=net, backward_passes_per_step=2)
    with pytest.raises(ValueError, match="IndexedSlices are not supported"):
        net.fit(np.zeros((8, 5)), np.zeros(8), batch_size=4, verbose=0)


def test_xla_is_refused_with_a_clear_error():
    net, _ = compiled(PowerSGD(2), compile_options={"jit_compile": True})
    with pytest.raises(ValueError, match="jit_compile must be False or 'auto', got True"):
        fit(net)

    @tf.function(jit_compile=True)
    def step(v):
        with tf.GradientTape() as tape:
            tape.watch(v)
            y = tf.reduce_sum(v)
        return hvd.DistributedGradientTape(tape).gradient(y, [v])

    with pytest.raises(ValueError, match="jit_compile must be False"):
        step(tf.ones(3))


def test_auto_jit_compile_is_turned_off_where_keras_would_turn_it_on(monkeypatch, caplog):
    net, _ = compiled(PowerSGD(2))
    assert not net.jit_compile  # without a GPU Keras resolves "auto" so
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: ["GPU:0"])
    net.jit_compile = True
    fit(net)
    assert not net.jit_compile
    assert [r.message for r in caplog.records if "jit_compile" in r.message] == [
        "jit_compile is off: Horovod's collectives can't be compiled by XLA"
    ]


def test_epochs_that_nobody_counts(monkeypatch):
    from hvd_accordion.training import counters

    monkeypatch.setattr(counters, "MAX_STEPS_OF_EPOCH", 3)
    net, _ = compiled(Accordion())
    x, y = data()
    with pytest.raises(tf.errors.OpError, match="steps_per_epoch"):
        net.fit(x, y, batch_size=BATCH, verbose=0)
    assert np.isfinite(flat(net)).all()


def test_join_beside_compression_is_refused_on_all_ranks():
    with pytest.raises(RuntimeError, match=r"hvd\.join\(\) knows .* steps_per_epoch, dataset\.repeat\(\)"):
        net, optimizer = compiled(TopK(0.1))
        fit(net)
        hvd.join()
    del net, optimizer
    gc.collect()
    uneven._compressing.clear()  # what failed tests before it left in tracebacks
    net, _ = compiled(None)
    fit(net, steps=1)
    x, y = data(steps=1 + hvd.rank())
    net.fit(x, y, batch_size=BATCH, verbose=0)  # Horovod's own: the last rank alone has a second step
    assert int(hvd.join()) == hvd.size() - 1
