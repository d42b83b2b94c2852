"""In new processes: what was saved goes on as if it had never stopped, bit for bit."""

import keras
import numpy as np
import pytest

import hvd_accordion.tensorflow as hvd
import hvd_accordion.tensorflow.keras as hvd_keras
from hvd_accordion.tensorflow.keras import copies
from tests.parallel.workers.tensorflow.keras_checkpoint_common import NAMES, built, checkpoint, path
from tests.parallel.workers.tensorflow.keras_common import (
    SPECS,
    assert_ranks_equal,
    fit,
    flat,
    loss,
    model,
    residuals,
    sgd,
)


def assert_resumes(name, net, optimizer):
    assert optimizer.stats.steps == 10
    fit(net, epochs=2, seed=1)
    expected = np.load(path(name, "result") + ".npz")
    np.testing.assert_array_equal(flat(net), expected["weights"])
    np.testing.assert_array_equal(optimizer._hvd.state.levels.numpy(), expected["levels"])
    assert optimizer.stats.steps == 20


@pytest.mark.parametrize("name", NAMES)
def test_load_model(name):
    net = hvd_keras.load_model(path(name, "model") + ".keras", compression=SPECS[name])
    assert_resumes(name, net, net.optimizer)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_tensorflow_checkpoint(name, late):
    """Restored into variables that are there, or into those that are made later."""
    net, optimizer = built(name)
    if late:
        keras.backend.clear_session()
        net = model()
        optimizer = hvd_keras.DistributedOptimizer(sgd(), compression=SPECS[name])
        status = checkpoint(net, optimizer).read(path(name, "checkpoint"))
        optimizer.build(net.trainable_variables)
        net.compile(optimizer, loss=loss())
    else:
        status = checkpoint(net, optimizer).read(path(name, "checkpoint"))
    status.assert_existing_objects_matched()
    assert_resumes(name, net, optimizer)


def test_a_file_of_rank_0_for_all_gives_its_residual_to_nobody_else():
    net = hvd_keras.load_model(path("topk", "model", 0) + ".keras", compression=SPECS["topk"])
    fit(net, steps=1, seed=1)
    assert_ranks_equal(flat(net))
    others = hvd_keras.load_model(path("topk", "model", 0) + ".keras", compression=SPECS["topk"])
    before = residuals(others.optimizer)
    assert all(r.any() for r in before.values())
    others.optimizer._hvd.state.claim()
    assert all(r.any() == (hvd.rank() == 0) for r in residuals(others.optimizer).values())


def test_rank_0_restores_and_the_callback_tells_the_others():
    net, optimizer = built("accordion")
    if hvd.rank() == 0:
        net = hvd_keras.load_model(path("accordion", "model") + ".keras", compression=SPECS["accordion"])
        optimizer = net.optimizer
    callback = hvd_keras.callbacks.BroadcastGlobalVariablesCallback(0)
    fit(net, epochs=2, seed=1, callbacks=[callback])
    assert_ranks_equal(flat(net))
    assert_ranks_equal(optimizer._hvd.state.levels.numpy().astype(float))
    assert optimizer.stats.steps == 20 and optimizer._hvd._engine.controller.epoch == 4
    assert_ranks_equal(np.array([optimizer.stats.sent_bytes, optimizer.stats.critical_fraction]))


def test_what_keras_loads_by_itself_is_wrapped_again_or_refuses_to_train():
    copies._serialized.clear()
    net = keras.models.load_model(path("topk", "model") + ".keras")
    assert isinstance(net.optimizer, keras.optimizers.SGD) and int(net.optimizer.iterations) == 10
    assert all(m.numpy().any() for m in net.optimizer.momentums)
    with pytest.raises(ValueError, match="made from the config of a DistributedOptimizer"):
        fit(net)
    net.compile(hvd_keras.DistributedOptimizer(net.optimizer, compression=SPECS["topk"]), loss=loss())
    fit(net)
    assert_ranks_equal(flat(net))


def test_a_clone_trains_together_with_all_ranks():
    net, _ = built("topk")
    clone = keras.models.clone_model(net)
    clone.set_weights(net.get_weights())
    fit(clone)
    assert_ranks_equal(flat(clone))
    assert 0 < clone.optimizer.stats.sent_bytes < clone.optimizer.stats.dense_bytes


def test_a_file_of_keras_alone_gets_a_distributed_optimizer(tmp_path):
    net, _ = built("none")
    net.compile(
        keras.optimizers.Adam(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    fit(net)
    net.save(tmp_path / "keras.keras")
    loaded = hvd_keras.load_model(tmp_path / "keras.keras", compression=SPECS["topk"])
    assert isinstance(loaded.optimizer, keras.optimizers.Adam) and int(loaded.optimizer.iterations) == 5
    callbacks = [hvd_keras.callbacks.BroadcastGlobalVariablesCallback(0)]
    history = fit(loaded, epochs=2, callbacks=callbacks)
    assert "accuracy" in history.history and loaded.optimizer.stats.steps == 10
    assert_ranks_equal(flat(loaded))


def test_weights_alone_load_as_ever():
    net, _ = built("topk")
    net.load_weights(path("topk", "saved") + ".weights.h5")
    fit(net)
    assert_ranks_equal(flat(net))
