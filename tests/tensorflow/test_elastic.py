"""Elastic training in one process: what ranks that come and go do to a rank that stays, and to one that has just come.

Collectives are simulated: all ranks have the same gradients, so that a mean is the gradient, if its scale is right.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
import hvd_accordion.tensorflow.keras as hvd_keras
from hvd_accordion import Accordion, AccordionBatchSize, Dense, PowerSGD, RandomK, TopK
from hvd_accordion.comm import naming
from hvd_accordion.tensorflow import elastic as of_tensorflow
from hvd_accordion.tensorflow.exchange import registry
from hvd_accordion.tensorflow.exchange.shared import shared
from hvd_accordion.training import elastic

SHAPE = (60, 50)
ACCORDION = Accordion(TopK(0.2), TopK(0.02), unit="steps", interval=3)
SPECS = [None, hvd.Compression.fp16, Dense(), PowerSGD(2), TopK(0.1), RandomK(0.1), ACCORDION]


@pytest.fixture(autouse=True)
def job(monkeypatch):
    """As one that an elastic launcher has started; with no exchanges of other tests."""
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    monkeypatch.setattr(naming, "_generation", 0)
    monkeypatch.setattr(elastic, "check_process_set", lambda *_: None)  # made-up ranks
    monkeypatch.setattr(registry, "_built", [])
    monkeypatch.setattr(registry, "_waiting", [])
    monkeypatch.setattr(registry, "_synchronised", True)
    monkeypatch.setattr(of_tensorflow, "broadcast_object", lambda x, *_, **__: x)
    monkeypatch.setattr(of_tensorflow, "broadcast_variables", lambda *_: None)


def gather(ranks, count):
    ranks.count = count
    naming.gathered()
    registry.move()


def gradient(seed: int) -> tf.Tensor:
    return tf.constant(np.random.default_rng(seed).standard_normal(SHAPE), tf.float32)


def variable() -> tf.Variable:
    return tf.Variable(tf.zeros(SHAPE), name="w")


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [layers.Input((60,)), layers.Dense(50, activation="relu", name="first"), layers.Dense(40, name="second")]
    )


def compiled(ranks, compression=ACCORDION, **options) -> keras.Model:
    net = network()
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    net.compile(
        hvd_keras.DistributedOptimizer(optimizer, compression=compression, process_set=ranks, **options), loss="mse"
    )
    return net


def fit(net, callbacks=(), epochs=1, steps=4):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8 * steps, 60), np.float32), rng.standard_normal((8 * steps, 40), np.float32)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8).repeat()
    return net.fit(data, steps_per_epoch=steps, epochs=epochs, verbose=0, callbacks=list(callbacks))


def state_of(exchange) -> dict[str, np.ndarray]:
    return exchange.state.arrays()


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


# graphs that outlive a change of ranks


@pytest.mark.parametrize("compression", SPECS, ids=str)
def test_a_graph_of_the_users_is_traced_once_and_right_for_any_number_of_ranks(compression, twins):
    w = variable()
    exchange = hvd.GradientExchange(compression, process_set=twins)
    given, got, traced = np.zeros(SHAPE), np.zeros(SHAPE), []

    def waits():
        return state_of(exchange).get("residual.0", np.zeros(SHAPE))

    @tf.function
    def step(g):
        traced.append(1)
        return exchange([g], [w])[0]

    for i, count in enumerate([2, 2, 2, 3, 3, 1, 2, 3]):
        if count != twins.count:
            before, factor = waits(), count / twins.count
            gather(twins, count)
            np.testing.assert_allclose(waits(), before * factor, rtol=1e-6)
            given += before * (factor - 1)
        given += gradient(i)
        got += step(gradient(i))
        assert count > 1 or not waits().any()  # one that is left alone applies what it kept
    assert traced == [1]
    np.testing.assert_allclose(got + waits(), given, atol=5e-3 if compression is hvd.Compression.fp16 else 2e-5)


@pytest.mark.parametrize(
    ("compression", "options"),
    [(None, {}), (PowerSGD(2), {}), (ACCORDION, {}), (TopK(0.1), {"backward_passes_per_step": 2})],
    ids=str,
)
def test_fit_is_the_same_as_without_an_elastic_job(compression, options, twins, monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC", "0")
    plain = compiled(twins, compression, **options)
    fit(plain, epochs=2)
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    net = compiled(twins, compression, **options)
    fit(net, epochs=2)
    assert_same(dict(enumerate(net.get_weights())), dict(enumerate(plain.get_weights())))
    ours, theirs = state_of(net.optimizer._hvd), state_of(plain.optimizer._hvd)
    assert_same(ours, theirs)


@pytest.mark.parametrize("graph", [False, True])
def test_the_adaptive_batch_goes_on_among_other_ranks(graph, twins):
    batch = AccordionBatchSize(6, 12, interval=2, unit="steps", eta=1e9, warmup=0)
    net = compiled(twins, Dense(), batch_size=batch)
    net.run_eagerly = not graph
    fit(net, steps=4)
    assert int(net.optimizer._hvd.state.passes) == 2
    gather(twins, 3)
    fit(net, steps=4)
    assert net.optimizer.stats.updates == 4 + 2
    with pytest.raises(ValueError, match="small must be a multiple of the 4 ranks, got 6"):
        gather(twins, 4)


def test_slices_and_missing_gradients_go_through_a_graph(twins):
    table, w, unused = tf.Variable(tf.ones((40, 30))), variable(), tf.Variable(tf.ones((40, 30)))
    exchange = hvd.GradientExchange(Dense(), process_set=twins)

    @tf.function
    def step(rows, g):
        slices = tf.IndexedSlices(tf.ones((tf.size(rows), 30)), rows, (40, 30))
        return exchange([slices, g, None], [table, w, unused])

    for count in (2, 3):
        gather(twins, count)
        slices, mean, missing = step(tf.constant([3, 5]), gradient(0))
        np.testing.assert_array_equal(slices.indices, [3, 5] * count)
        np.testing.assert_allclose(slices.values, np.full((2 * count, 30), 1 / count), rtol=1e-6)
        np.testing.assert_allclose(mean, gradient(0), rtol=1e-6)
        assert missing is None


def test_a_mean_that_a_graph_has_no_place_for_is_an_error_on_all_ranks(twins, monkeypatch):
    import horovod.tensorflow as theirs

    def another_has_one(xs, op, **_):  # kinds, what graphs lack, whether an Auto must choose
        return [tf.maximum(x, [0, 2, 0, 0, 0]) if op == hvd.Max else x for x in xs]

    monkeypatch.setattr(theirs, "grouped_allreduce", another_has_one)
    w, other = variable(), variable()
    exchange = hvd.GradientExchange(Dense(), process_set=twins)
    step = tf.function(lambda g: exchange([g, None], [w, other]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="missing on some ranks but not on all"):
        step(gradient(0))


def test_one_thread_is_too_few(twins, monkeypatch):
    monkeypatch.setattr(tf.config.threading, "get_inter_op_parallelism_threads", lambda: 1)
    w = variable()
    exchange = hvd.GradientExchange(PowerSGD(2), process_set=twins)
    with pytest.raises(RuntimeError, match="needs 2 inter-op threads of TensorFlow or more, got 1"):
        tf.function(lambda g: exchange([g], [w]))(gradient(0))
    exchange([gradient(0)], [w])


def test_a_collective_that_failed_is_horovods_error(twins, monkeypatch):
    import horovod.tensorflow as theirs

    def gone(*_, **__):
        raise tf.errors.UnknownError(None, None, "Horovod has been shut down")

    monkeypatch.setattr(theirs, "allgather", gone)
    w = variable()
    exchange = hvd.GradientExchange(PowerSGD(2), process_set=twins)
    for step in (lambda g: exchange([g], [w]), tf.function(lambda g: exchange([g], [w]))):
        with pytest.raises(hvd.elastic.HorovodInternalError, match="shut down"):
            of_tensorflow._translated(step)(gradient(0))


def test_other_errors_stay_what_they_are():
    def wrong():
        raise tf.errors.InvalidArgumentError(None, None, "Horovod can't be blamed")

    with pytest.raises(tf.errors.InvalidArgumentError):
        of_tensorflow._translated(wrong)()


def test_some_of_the_ranks_are_refused(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    with pytest.raises(ValueError, match=r"process_set must be hvd.global_process_set"):
        hvd.GradientExchange(Dense(), process_set=hvd.ProcessSet([0]))


@pytest.mark.parametrize(
    ("compression", "options"),
    [(None, {"backward_passes_per_step": 2}), (None, {"batch_size": AccordionBatchSize(6, 12)}), (TopK(0.1), {})],
    ids=str,
)
def test_what_knows_of_steps_before_must_wait_for_the_state(compression, options, twins, monkeypatch):
    """Others may be in the midst of an update, or at another level, where a rank that has just come begins."""
    monkeypatch.setattr(registry, "_synchronised", False)
    with pytest.raises(RuntimeError, match=r"must be part of a state of hvd.elastic"):
        fit(compiled(twins, compression, **options))
    net = compiled(twins, compression, **options)
    hvd_keras.elastic.KerasState(net).sync()
    fit(net)


def test_what_knows_of_no_step_before_may_begin_at_once_as_in_horovods_example(twins, monkeypatch):
    monkeypatch.setattr(registry, "_synchronised", False)
    fit(compiled(twins, None))


def test_what_can_not_follow_a_change_is_refused():
    with pytest.raises(ValueError, match="ECLK does not work in elastic training: its ranks hold parts of one sum"):
        hvd.ECLK([variable()], PowerSGD(2), smoothness=1.0, strong_convexity=0.1)
    with pytest.raises(ValueError, match="estimate_smoothness does not work in elastic training"):
        hvd.estimate_smoothness(lambda: 0.0, [variable()])


# states


@pytest.mark.parametrize("compression", [PowerSGD(2), RandomK(0.1), ACCORDION], ids=str)
def test_commit_and_restore_resume_bit_for_bit(compression, twins):
    net = compiled(twins, compression, backward_passes_per_step=2)
    state = hvd_keras.elastic.KerasState(net, epoch=0)
    fit(net, steps=7)  # one micro-batch waits
    state.epoch = 1
    state.save()
    results = []
    for _ in range(2):
        fit(net, steps=4)
        results.append({**state_of(net.optimizer._hvd), **dict(enumerate(net.get_weights()))})
        state.epoch = 2
        state.restore()
        assert state.epoch == 1
    assert_same(*results)


def test_a_residual_that_was_saved_among_others_is_scaled_when_it_is_restored(twins):
    net = compiled(twins, TopK(0.05))
    state = hvd_keras.elastic.KerasState(net)
    fit(net)
    state.save()
    before = state_of(net.optimizer._hvd)
    gather(twins, 3)
    fit(net)
    state.restore()
    after = state_of(net.optimizer._hvd)
    np.testing.assert_allclose(after["residual.0"], before["residual.0"] * 1.5, rtol=1e-6)
    assert [*after["owner"]] == [0, 3]
    assert after["step"] == before["step"]


def as_newcomer(monkeypatch, told):
    """From now on this process is rank 1, to which rank 0 tells this."""
    monkeypatch.setattr(of_tensorflow, "rank", lambda: 1)
    monkeypatch.setattr(of_tensorflow, "broadcast_object", lambda x, *_, **__: told if x is None else x)
    monkeypatch.setattr(registry, "_built", [])


def without_residual(arrays):
    return {k: v for k, v in arrays.items() if not k.startswith(("residual", "owner", "slice_bytes"))}


def test_a_newcomer_gets_what_all_have_in_common(twins, monkeypatch):
    old = compiled(twins, {"first*": PowerSGD(2), "*": ACCORDION}, backward_passes_per_step=2)
    fit(old, steps=7)
    told = [shared(exchange) for exchange in registry.alive()]
    as_newcomer(monkeypatch, told)
    new = compiled(twins, {"first*": PowerSGD(2), "*": ACCORDION}, backward_passes_per_step=2)
    state = hvd_keras.elastic.KerasState(new)
    state.sync()
    assert_same(without_residual(state_of(new.optimizer._hvd)), without_residual(state_of(old.optimizer._hvd)))
    assert not any(v.any() for k, v in state_of(new.optimizer._hvd).items() if k.startswith("residual"))
    assert new.optimizer.stats == old.optimizer.stats
    assert str(new.optimizer.compression_report()) == str(old.optimizer.compression_report())
    assert int(new.optimizer._hvd_sums.count) == 1


def test_what_a_tape_will_keep_waits_until_there_is_one(twins, monkeypatch):
    def step(variables, seed):
        with tf.GradientTape() as tape:
            loss = sum(tf.reduce_sum(v * gradient(seed)) for v in variables)
        tape = hvd.DistributedGradientTape(tape, compression=PowerSGD(2), process_set=twins)
        return tape.gradient(loss, variables)

    old = [variable(), variable()]
    step(old, 0)
    (its,) = registry.alive()
    as_newcomer(monkeypatch, [shared(its)])
    new = [variable(), variable()]
    hvd.elastic.TensorFlowState(new).sync()
    assert registry.alive() == []
    exchange = hvd.GradientExchange(PowerSGD(2), process_set=twins)
    exchange.build(new)
    assert_same(without_residual(state_of(exchange)), without_residual(state_of(its)))


def test_what_a_state_can_not_do_is_an_error(twins):
    with pytest.raises(ValueError, match="Model must be built first"):
        hvd.elastic.TensorFlowKerasState(keras.Sequential([keras.layers.Dense(3)]), keras.optimizers.SGD())
    with pytest.raises(ValueError, match="optimizer must be given or compiled into the model"):
        hvd_keras.elastic.KerasState(network())
    with pytest.raises(ValueError, match="variables must be a list of at least one"):
        hvd.elastic.TensorFlowState()
    with pytest.raises(ValueError, match="session must be None"):
        hvd.elastic.TensorFlowState([variable()], session=object())


def test_the_logger_follows_rank_0(twins, monkeypatch):
    class Logger:
        started = 0

        def start(self, params):
            self.started += 1

        def log_epoch(self, *_):
            pass

        log_window = log_epoch

    logger = Logger()
    net = compiled(twins, logger=logger)
    fit(net)
    controller = net.optimizer._hvd._engine.controller
    assert (logger.started, controller.logger) == (1, logger)
    monkeypatch.setattr(type(twins), "rank", lambda _: 1)
    gather(twins, 3)
    assert (logger.started, controller.logger) == (1, None)
    monkeypatch.setattr(type(twins), "rank", lambda _: 0)
    gather(twins, 2)
    assert (logger.started, controller.logger) == (2, logger)


# callbacks


class Interrupted(Exception):
    pass


class Interrupt(keras.callbacks.Callback):
    """Ranks are gathered anew after so many batches."""

    def __init__(self, *after):
        super().__init__()
        self.after, self.batches, self.epochs = [*after], 0, []

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs.append(0)

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        self.epochs[-1] += 1
        if self.batches in self.after:
            raise Interrupted


def test_an_interrupted_epoch_goes_on_where_it_was(twins):
    net = compiled(twins)
    state = hvd_keras.elastic.KerasState(net, batch=0, epoch=0)
    interrupt = Interrupt(7, 10)
    callbacks = [
        hvd_keras.elastic.UpdateBatchStateCallback(state),
        hvd_keras.elastic.UpdateEpochStateCallback(state),
        interrupt,
    ]
    seen = []
    while True:
        try:
            fit(net, callbacks, epochs=3 - state.epoch, steps=5)
            break
        except Interrupted:
            seen.append((state.epoch, state.batch))
    # `batch` is that of the last batch: it is done again, as by Horovod
    assert seen == [(1, 1), (1, 3)] and interrupt.epochs == [5, 2, 3, 2, 5]
    assert (state.epoch, state.batch, net.stop_training) == (3, 0, False)
    assert net.optimizer._hvd._engine.controller.epoch == 3


def test_a_shortened_epoch_does_not_undo_another_callbacks_stop(twins):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    net = compiled(twins)
    state = hvd_keras.elastic.KerasState(net, batch=3)
    fit(net, [Stop(), hvd_keras.elastic.UpdateBatchStateCallback(state)], epochs=3, steps=5)
    assert net.optimizer._hvd._engine.controller.epoch == 1 and net.optimizer.stats.steps == 2


def test_commits_come_every_so_many_batches_and_at_the_end_of_an_epoch(twins):
    net = compiled(twins)
    state = hvd_keras.elastic.KerasState(net)
    commits = []
    state.commit = lambda: commits.append((int(net.optimizer.iterations), net.optimizer._hvd._engine.controller.epoch))
    fit(net, [hvd_keras.elastic.CommitStateCallback(state, 3)], epochs=2, steps=4)
    assert commits == [(3, 0), (4, 1), (6, 1), (8, 2)]


def test_variables_are_broadcast_again_when_ranks_were_gathered_anew(twins):
    net = compiled(twins)
    callback = hvd_keras.callbacks.BroadcastGlobalVariablesCallback(0)
    fit(net, [callback])
    assert callback.broadcast_done
    gather(twins, 3)
    assert not callback.broadcast_done
    fit(net, [callback])
    assert callback.broadcast_done
