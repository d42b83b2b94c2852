"""Callbacks: what of them needs no ranks."""

from __future__ import annotations

import horovod.tensorflow as horovod
import horovod.tensorflow.keras.callbacks as theirs
import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.keras as of_keras
import hvd_accordion.tensorflow.keras as hvd
from hvd_accordion import Accordion, PowerSGD
from hvd_accordion.tensorflow.keras.callbacks import (
    EpochCallback,
    LearningRateScheduleCallback,
    LearningRateWarmupCallback,
    MetricAverageCallback,
)
from hvd_accordion.tensorflow.keras.epochs import optimizers_of
from hvd_accordion.tensorflow.keras.learning_rate import innermost, learning_rate_of


def model(optimizer=None) -> keras.Model:
    net = keras.Sequential([keras.layers.Input((40,)), keras.layers.Dense(30)])
    net.compile(optimizer or hvd.DistributedOptimizer(keras.optimizers.SGD(1.0)), loss="mse")
    return net


def attached(callback, net=None, **params):
    callback.set_params(params)
    callback.set_model(net or model())
    callback.on_train_begin()
    return callback


def rates(callback, epochs: int, steps: int) -> list[float]:
    """The learning rate in each batch."""
    found = []
    for epoch in range(epochs):
        callback.on_epoch_begin(epoch)
        for batch in range(steps):
            callback.on_train_batch_begin(batch)
            found.append(learning_rate_of(callback.model.optimizer))
        callback.on_epoch_end(epoch, {})
    return found


# schedules


def test_a_constant_is_taken_to_the_power_of_the_epochs_since_the_start():
    callback = attached(LearningRateScheduleCallback(0.8, 0.5, start_epoch=1))
    assert rates(callback, 4, 2) == pytest.approx([1.0, 1.0, 0.8, 0.8, 0.4, 0.4, 0.2, 0.2])


def test_a_schedule_holds_from_its_start_up_to_not_including_its_end():
    callback = attached(LearningRateScheduleCallback(0.5, lambda epoch: epoch, start_epoch=1, end_epoch=3))
    assert rates(callback, 5, 1) == pytest.approx([1.0, 0.5, 1.0, 1.0, 1.0])


def test_a_staircase_asks_for_whole_epochs_once_each():
    asked = []
    callback = LearningRateScheduleCallback(1.0, lambda epoch: asked.append(epoch) or 1.0)
    rates(attached(callback), 3, 4)
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("told", [True, False])
def test_without_a_staircase_every_batch_has_its_own_fraction_of_an_epoch(told):
    callback = LearningRateScheduleCallback(
        2.0, lambda epoch: 1 + epoch, staircase=False, steps_per_epoch=4 if told else None
    )
    attached(callback, steps=9 if told else 4)  # what the user says counts
    assert rates(callback, 2, 4) == pytest.approx([2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5])


@pytest.mark.parametrize(
    "callback",
    [
        lambda: LearningRateScheduleCallback(0.1, 0.5, staircase=False),
        lambda: LearningRateWarmupCallback(0.1),
    ],
)
def test_fractions_of_an_epoch_need_its_number_of_steps(callback):
    callback = callback()
    name = type(callback).__name__
    with pytest.raises(ValueError, match=rf"specify the steps_per_epoch parameter to the {name}\(\)"):
        attached(callback, steps=None)


def test_an_initial_rate_is_required():
    with pytest.raises(ValueError, match="`initial_lr` is required"):
        LearningRateScheduleCallback(None, 0.5)


def test_the_rate_is_logged():
    callback, logs = attached(LearningRateScheduleCallback(0.25, lambda epoch: 1.0)), {"loss": 1.0}
    callback.on_epoch_begin(0)
    callback.on_train_batch_begin(0)
    callback.on_epoch_end(0, logs)
    assert logs == {"loss": 1.0, "lr": 0.25}
    callback.on_epoch_end(1, None)


@pytest.mark.parametrize("correct", [True, False])
def test_momentum_correction_scales_the_velocity_with_the_rate(correct):
    net = model(hvd.DistributedOptimizer(keras.optimizers.SGD(0.4, momentum=0.9)))
    net.fit(np.ones((8, 40)), np.ones((8, 30)), verbose=0)
    before = [v.numpy() for v in net.optimizer.momentums]
    callback = attached(LearningRateScheduleCallback(0.1, lambda epoch: 1.0, momentum_correction=correct), net)
    rates(callback, 1, 1)
    for velocity, old in zip(net.optimizer.momentums, before, strict=True):
        assert old.any()
        np.testing.assert_allclose(velocity, old * (0.25 if correct else 1.0), rtol=1e-6)


def test_an_optimizer_without_velocity_keeps_its_moments():
    net = model(hvd.DistributedOptimizer(keras.optimizers.Adam(0.4)))
    net.fit(np.ones((8, 40)), np.ones((8, 30)), verbose=0)
    before = [v.numpy() for v in net.optimizer._momentums]
    rates(attached(LearningRateScheduleCallback(0.1, lambda epoch: 1.0), net), 1, 1)
    for moment, old in zip(net.optimizer._momentums, before, strict=True):
        np.testing.assert_array_equal(moment, old)
    assert learning_rate_of(net.optimizer) == pytest.approx(0.1)


# warm-up


@pytest.mark.parametrize(("size", "steps", "epochs"), [(1, 2, 3), (4, 2, 3), (8, 5, 2)])
def test_the_warm_up_rises_in_equal_steps_from_a_ranks_share_to_the_whole(size, steps, epochs, monkeypatch):
    monkeypatch.setattr(horovod, "size", lambda: size)
    callback = attached(LearningRateWarmupCallback(0.8, warmup_epochs=epochs), steps=steps)
    found = rates(callback, epochs + 1, steps)
    share = np.arange(1, epochs * steps + 1) / (epochs * steps)
    expected = 0.8 / size + (0.8 - 0.8 / size) * share
    np.testing.assert_allclose(found, [*expected, *[0.8] * steps], rtol=1e-6)


@pytest.mark.parametrize(("verbose", "rank", "told"), [(1, 0, True), (1, 1, False), (0, 0, False)])
def test_the_end_of_the_warm_up_is_told_on_rank_0(verbose, rank, told, monkeypatch, capsys):
    monkeypatch.setattr(horovod, "size", lambda: 4)
    monkeypatch.setattr(horovod, "rank", lambda: rank)
    rates(attached(LearningRateWarmupCallback(0.8, 2, verbose=verbose), steps=3), 4, 3)
    line = "\nEpoch 2: finished gradual learning rate warmup to 0.8.\n"
    assert capsys.readouterr().out == (line if told else "")


# optimizers


def scaled():
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5, momentum=0.9), initial_scale=8.0)


def test_the_distributed_optimizers_of_a_model():
    ours = hvd.DistributedOptimizer(scaled())
    assert optimizers_of(model(ours)) == [ours]
    assert optimizers_of(model(keras.optimizers.SGD())) == []
    net = model(ours)
    net.second = hvd.DistributedOptimizer(keras.optimizers.Adam())
    net.again, net.plain = ours, keras.optimizers.Adam()
    assert optimizers_of(net) == [ours, net.second]


class Wrapping(keras.optimizers.Optimizer):
    """A user's optimizer around others."""

    def __init__(self, inner, **others):
        super().__init__(0.1)
        self.inner, self.others = inner, others

    def build(self, variables):
        self.inner.build(variables)
        super().build(variables)

    def apply(self, grads, trainable_variables=None):
        self.inner.apply(grads, trainable_variables)


def test_the_distributed_optimizers_within_others():
    ours, more = (hvd.DistributedOptimizer(keras.optimizers.SGD(), compression=Accordion(interval=1)) for _ in range(2))
    assert optimizers_of(model(Wrapping(Wrapping(ours), more=more, plain=keras.optimizers.SGD()))) == [more, ours]
    several = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(ours, {".*bias": more}))
    assert set(optimizers_of(model(several))) == {ours, more}
    net = model(Wrapping(ours))
    net.optimizer.inner.itself = net.optimizer  # no end
    net.fit(np.ones((8, 40)), np.ones((8, 30)), verbose=0, epochs=2, callbacks=[EpochCallback()])
    assert ours._hvd._engine.controller.epoch == 2


def own_step(optimizer):
    class Own(keras.Sequential):
        def train_step(self, data):
            return {}

    net = Own([keras.layers.Input((40,)), keras.layers.Dense(30)])
    net.compile(optimizer, loss="mse")
    return net


@pytest.mark.parametrize(
    ("net", "ranks", "warned"),
    [
        (lambda: model(keras.optimizers.SGD()), 2, True),
        (lambda: model(Wrapping(keras.optimizers.SGD())), 2, True),
        (lambda: model(keras.optimizers.SGD()), 1, False),
        (lambda: model(Wrapping(hvd.DistributedOptimizer(keras.optimizers.SGD()))), 2, False),
        (lambda: own_step(keras.optimizers.SGD()), 2, False),  # may use a tape
    ],
)
def test_a_training_without_any_exchange_is_warned_of(net, ranks, warned, monkeypatch, caplog):
    monkeypatch.setattr(horovod, "size", lambda: ranks)
    attached(EpochCallback(), net())
    assert ("2 ranks train, each for itself" in caplog.text) is warned


@pytest.mark.parametrize("module", [hvd.callbacks, of_keras.callbacks])
def test_the_best_model_is_saved_where_it_is_told_to(module, tmp_path):
    with pytest.raises(ValueError, match="filepath must be a path, got None"):
        attached(module.BestModelCheckpoint(monitor="loss"))
    later = module.BestModelCheckpoint(monitor="loss")
    later.filepath = str(tmp_path / "later.keras")
    now = module.BestModelCheckpoint("loss", 0, mode="min", filepath=tmp_path / "now.keras")
    model().fit(np.ones((8, 40)), np.ones((8, 30)), verbose=0, callbacks=[later, now])
    assert {path.name for path in tmp_path.iterdir()} == {"later.keras", "now.keras"}
    assert isinstance(now, theirs.BestModelCheckpoint)
    weights = hvd.callbacks.BestModelCheckpoint("loss", save_weights_only=True, filepath=tmp_path / "x.weights.h5")
    model().fit(np.ones((8, 40)), np.ones((8, 30)), verbose=0, callbacks=[weights])
    assert (tmp_path / "x.weights.h5").exists()


def test_rate_and_velocity_of_a_loss_scaled_optimizer_are_those_of_the_inner_one():
    ours = hvd.DistributedOptimizer(scaled())
    net = model(ours)
    assert isinstance(innermost(ours), keras.optimizers.SGD) and learning_rate_of(ours) == 0.5
    net.fit(np.ones((8, 40)), np.ones((8, 30)), verbose=0)
    before = [v.numpy() for v in ours.inner_optimizer.momentums]
    rates(attached(LearningRateScheduleCallback(0.25, lambda epoch: 1.0), net), 1, 1)
    for velocity, old in zip(ours.inner_optimizer.momentums, before, strict=True):
        assert old.any()
        np.testing.assert_allclose(velocity, old / 2, rtol=1e-6)
    assert learning_rate_of(ours) == float(ours.inner_optimizer.learning_rate) == 0.25


def test_every_callback_ends_the_epochs_of_all_optimizers():
    for callback in (EpochCallback(), MetricAverageCallback(), LearningRateScheduleCallback(1.0, 1.0)):
        net = model(hvd.DistributedOptimizer(keras.optimizers.SGD(), compression=Accordion(interval=1)))
        net.second = hvd.DistributedOptimizer(keras.optimizers.SGD(), compression=PowerSGD(2))
        net.fit(np.ones((8, 40)), np.ones((8, 30)), verbose=0, epochs=2, callbacks=[callback])
        net.second.apply([tf.ones(v.shape) for v in net.trainable_variables], net.trainable_variables)
        callback.on_epoch_end(2)
        assert [o._hvd._engine.controller.epoch for o in optimizers_of(net)] == [2, 1]


def test_one_ranks_metrics_are_its_own():
    callback, logs = attached(MetricAverageCallback()), {"loss": 0.1, "accuracy": np.float32(0.5)}
    callback.on_epoch_end(0, logs)
    assert logs == {"loss": 0.1, "accuracy": np.float32(0.5)}
    callback.on_epoch_end(1, None)
    callback.on_epoch_end(2, {})


def test_local_variables_must_be_variables():
    with pytest.raises(ValueError, match=r"must be of tf\.Variable type"):
        hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=[3])


def test_a_broadcast_builds_the_optimizer_and_happens_once():
    net = model(hvd.DistributedOptimizer(keras.optimizers.SGD(momentum=0.9), compression=PowerSGD(2)))
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=net.layers[0].bias)
    before = [w.copy() for w in net.get_weights()]
    attached(callback, net)
    assert callback.broadcast_done and net.optimizer.built
    for weight, old in zip(net.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, old)
