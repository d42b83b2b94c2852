"""Every public name of Horovod's modules for TensorFlow and Keras works on Keras 3, or says why it doesn't."""

import importlib
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
from tests.parallel import names
from tests.parallel.names import Refused
from tests.parallel.workers.tensorflow.keras_common import assert_ranks_equal, flat

COUNT = (True, False)


def mine(*shape):
    return tf.constant(np.full(shape or (2,), hvd.rank() + 1.0, np.float32))


def total():
    return sum(range(1, hvd.size() + 1))


def holds(value, expected):
    np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-3)
    return True


def reduced(op, expected):
    return lambda m: holds(hvd.allreduce(mine(), op=getattr(m, op)), expected())


def everyone():
    return np.repeat(np.arange(1.0, hvd.size() + 1), 2)


def scattered(value, by):
    return holds(np.asarray(value).reshape(-1)[:1], total() / by)


def among_ranks(m):
    return (
        0 <= m.local_rank() <= m.rank() < m.size()
        and m.local_rank() < m.local_size()
        and m.cross_rank() < m.cross_size()
    )


def timeline(m):
    """Where HOROVOD_TIMELINE=DYNAMIC, as tests/parallel/test_parallel.py sets it."""
    with tempfile.TemporaryDirectory() as folder:
        m.start_timeline(f"{folder}/timeline.json")
        hvd.allreduce(mine())
        m.stop_timeline()
    return True


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.layers.Input((6,)), keras.layers.Dense(4, name="first"), keras.layers.Dense(2, name="last")]
    )


def trained(optimizer, net=None, callbacks=(), **options):
    """A small training on data of each rank's own."""
    net = net or network()
    net.compile(optimizer, loss="mse", **options)
    rng = np.random.default_rng(hvd.rank())
    x, y = rng.standard_normal((8, 6)), rng.standard_normal((8, 2))
    net.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=list(callbacks), validation_data=(x, y))
    return net


def agree(optimizer, **options):
    assert_ranks_equal(flat(trained(optimizer, **options)))
    return True


def partly(optimizer_of):
    net = network()
    last = net.layers[-1]
    trained(optimizer_of(keras.optimizers.SGD(0.1), local_layers=last), net)
    rows = hvd.allgather(last.kernel.value[None]).numpy()
    assert_ranks_equal(net.layers[0].kernel.numpy())
    return not np.array_equal(rows[0], rows[1])


def taped(wrap):
    w = tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(w * mine())
    return holds(wrap(tape).gradient(y, [w])[0], total() / hvd.size())


def of_tensorflow_1(m):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        w = tf.compat.v1.get_variable("w", initializer=[float(hvd.rank())])
        step = m.DistributedOptimizer(tf.compat.v1.train.GradientDescentOptimizer(1.0)).minimize(w * (hvd.rank() + 1))
        session.run(tf.compat.v1.global_variables_initializer())
        session.run(m.broadcast_global_variables(0))
        session.run(step)
        return holds(session.run(w), [-total() / hvd.size()])


def aggregated(m):
    """Horovod's helper for several backward passes, which knows TensorFlow 1's graphs."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        helper = m.LocalGradientAggregationHelper(
            2,
            lambda grads, _: [hvd.allreduce(g, name="helper") for g in grads],
            False,
            True,
            hvd.rank(),
            "optimizer_type_legacy",
        )
        w = tf.compat.v1.get_variable("w", initializer=[0.0, 0.0])
        grads = helper.compute_gradients((tf.constant([2.0, 4.0]) * (hvd.rank() + 1),), (w,))
        for collection in (tf.compat.v1.global_variables_initializer, tf.compat.v1.local_variables_initializer):
            session.run(collection())
        first, second = session.run(grads), session.run(grads)
        del first
        return holds(second[0], np.array([2.0, 4.0]) * total() / hvd.size())


def normalized(layer, x, weights):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
        loss = tf.reduce_sum(tf.sin(y) * weights)
    return y, tape.gradient(loss, x)


def batch_norm(m):
    """Of unequal batches, against one process on the whole."""
    sizes = [4 + 2 * rank for rank in range(hvd.size())]
    whole = np.random.default_rng(0).standard_normal((sum(sizes), 3, 5)).astype(np.float32) * 3 + 1
    starts = np.cumsum([0, *sizes])
    own = slice(starts[hvd.rank()], starts[hvd.rank() + 1])
    weights = np.random.default_rng(1).standard_normal(whole.shape).astype(np.float32)
    alone = keras.layers.BatchNormalization(momentum=0.5)
    expected_y, expected_dx = normalized(alone, tf.constant(whole), weights)
    for run in (normalized, tf.function(normalized)):
        ours = m.SyncBatchNormalization(momentum=0.5)
        ours.build(whole.shape)
        y, dx = run(ours, tf.constant(whole[own]), tf.constant(weights[own]))
        np.testing.assert_allclose(y, expected_y[own], atol=1e-5)
        np.testing.assert_allclose(dx, expected_dx[own], atol=1e-5)
        for name in ("moving_mean", "moving_variance"):
            np.testing.assert_allclose(getattr(ours, name), getattr(alone, name), rtol=1e-5, atol=1e-6)
    mask = np.random.default_rng(2).random(whole.shape[:2]) < 0.6
    masked = m.SyncBatchNormalization()(tf.constant(whole[own]), training=True, mask=tf.constant(mask[own]))
    expected = keras.layers.BatchNormalization()(tf.constant(whole), training=True, mask=tf.constant(mask))
    np.testing.assert_allclose(masked, expected[own], atol=1e-5)
    net = keras.Sequential([keras.layers.Input((6,)), m.SyncBatchNormalization(), keras.layers.Dense(2)])
    clone = keras.models.clone_model(net)
    assert type(clone.layers[0]) is m.SyncBatchNormalization and clone.layers[0].name != "batch_normalization"
    with pytest.raises(ValueError, match="fused must be False for SyncBatchNormalization, got True"):
        m.SyncBatchNormalization(fused=True)
    from hvd_accordion.tensorflow.keras import DistributedOptimizer

    assert_ranks_equal(flat(trained(DistributedOptimizer(keras.optimizers.SGD(0.1)), clone)))
    return True


def variables(m):
    values = [tf.Variable(mine()), keras.Variable(np.full(3, hvd.rank(), np.float32))]
    m.broadcast_variables(values, root_rank=1)
    return holds(values[0], 2.0) and holds(values[1], 1.0)


def process_set(m):
    own = m.ProcessSet([0])
    return own.ranks == [0] and own.process_set_id is None


def built(m):
    return m.mpi_built() or m.gloo_built()


def flags(name):
    return lambda m: getattr(m, name)() in (True, False, 0, 1)


DYNAMIC = "dynamic process sets|HOROVOD_DYNAMIC_PROCESS_SETS"
SHARED = {
    "Adasum": reduced("Adasum", lambda: np.asarray(hvd.allreduce(mine(), op=hvd.Adasum, name="adasum"))),
    "Average": reduced("Average", lambda: total() / hvd.size()),
    "Sum": reduced("Sum", total),
    "Compression": lambda m: holds(hvd.allreduce(mine(), compression=m.Compression.fp16), total() / hvd.size()),
    "ProcessSet": process_set,
    "add_process_set": Refused(ValueError, DYNAMIC, lambda m: m.add_process_set([0])),
    "remove_process_set": lambda m: m.remove_process_set(m.ProcessSet([0])) is False,
    "ccl_built": flags("ccl_built"),
    "cuda_built": flags("cuda_built"),
    "ddl_built": flags("ddl_built"),
    "gloo_built": built,
    "gloo_enabled": flags("gloo_enabled"),
    "mpi_built": built,
    "mpi_enabled": flags("mpi_enabled"),
    "mpi_threads_supported": lambda m: not m.mpi_enabled() or m.mpi_threads_supported() in COUNT,
    "nccl_built": flags("nccl_built"),
    "rocm_built": flags("rocm_built"),
    "cross_rank": among_ranks,
    "cross_size": among_ranks,
    "local_rank": among_ranks,
    "local_size": among_ranks,
    "rank": among_ranks,
    "size": among_ranks,
    "global_process_set": lambda m: m.global_process_set.size() == hvd.size(),
    "init": lambda m: m.init() is None and m.is_initialized(),
    "is_initialized": lambda m: m.is_initialized(),
    "shutdown": lambda m: callable(m.shutdown),  # each worker calls it at its end
    "start_timeline": timeline,
    "stop_timeline": timeline,
}


def some(*names_of_rows, **more):
    return {**{name: SHARED[name] for name in SHARED if name not in names_of_rows}, **more}


TENSORFLOW = some(
    Max=reduced("Max", hvd.size),
    Min=reduced("Min", lambda: 1),
    Product=reduced("Product", lambda: np.prod(np.arange(1, hvd.size() + 1))),
    DistributedGradientTape=lambda m: taped(m.DistributedGradientTape),
    PartialDistributedGradientTape=lambda m: taped(m.PartialDistributedGradientTape),
    DistributedOptimizer=lambda m: of_tensorflow_1(m) and agree(m.DistributedOptimizer(keras.optimizers.SGD(0.1))),
    LocalGradientAggregationHelper=aggregated,
    SyncBatchNormalization=batch_norm,
    allgather=lambda m: holds(m.allgather(mine()), everyone()),
    allgather_object=lambda m: m.allgather_object({"rank": hvd.rank()})[1] == {"rank": 1},
    allreduce=lambda m: holds(m.allreduce(mine()), total() / hvd.size()),
    alltoall=lambda m: holds(m.alltoall(mine(hvd.size())), np.arange(1, hvd.size() + 1)),
    broadcast=lambda m: holds(m.broadcast(mine(), 1), 2.0),
    broadcast_=lambda m: holds(m.broadcast_([tf.Variable(mine(), name="in_place")], 1)[0], 2.0),
    broadcast_global_variables=Refused(
        RuntimeError, "does not support eager execution", lambda m: m.broadcast_global_variables(0)
    ),
    broadcast_object=lambda m: m.broadcast_object({"rank": hvd.rank()}, 1) == {"rank": 1},
    broadcast_object_fn=lambda m: m.broadcast_object_fn(1)({"rank": hvd.rank()}) == {"rank": 1},
    broadcast_variables=variables,
    check_extension=Refused(
        ImportError,
        "has not been built",
        lambda m: m.check_extension("nothing", "HOROVOD_WITH_NOTHING", __file__, "nothing"),
    ),
    check_num_rank_power_of_2=lambda m: m.check_num_rank_power_of_2(4) and not m.check_num_rank_power_of_2(3),
    gpu_available=lambda m: m.gpu_available("tensorflow") in COUNT,
    grouped_allgather=lambda m: holds(m.grouped_allgather([mine(), mine()])[1], everyone()),
    grouped_allreduce=lambda m: holds(m.grouped_allreduce([mine(), mine()])[1], total() / hvd.size()),
    grouped_reducescatter=lambda m: scattered(m.grouped_reducescatter([mine(4), mine(4)])[1], hvd.size()),
    handle_average_backwards_compatibility=lambda m: (
        m.handle_average_backwards_compatibility(None, None) == hvd.Average
    ),
    is_homogeneous=lambda m: m.is_homogeneous() in COUNT,
    join=lambda m: 0 <= int(m.join()) < hvd.size(),
    local_rank_op=lambda m: int(m.local_rank_op()) == hvd.local_rank(),
    local_size_op=lambda m: int(m.local_size_op()) == hvd.local_size(),
    process_set_included_op=lambda m: int(m.process_set_included_op()) == 1,
    rank_op=lambda m: int(m.rank_op()) == hvd.rank(),
    reducescatter=lambda m: scattered(m.reducescatter(mine(4)), hvd.size()),
    refs_to_vars=lambda m: m.refs_to_vars(m.vars_to_refs([w := tf.Variable(1.0)]))[0] is w,
    vars_to_refs=lambda m: m.refs_to_vars(m.vars_to_refs([w := tf.Variable(1.0)]))[0] is w,
    size_op=lambda m: int(m.size_op()) == hvd.size(),
    split_list=lambda m: m.split_list([1, 2, 3], 2) == [[1, 2], [3]],
)


def loaded(m):
    with tempfile.TemporaryDirectory() as folder:
        trained(keras.optimizers.SGD(0.1)).save(f"{folder}/net.keras")
        net = m.load_model(f"{folder}/net.keras")
    net.set_weights([hvd.broadcast(w, 0).numpy() for w in net.get_weights()])
    return agree(net.optimizer, net=net)


OF_KERAS = dict(
    DistributedOptimizer=lambda m: agree(m.DistributedOptimizer(keras.optimizers.Adam(0.1))),
    allgather=lambda m: holds(m.allgather([hvd.rank() + 1.0] * 2), everyone()),
    allreduce=lambda m: holds(m.allreduce([hvd.rank() + 1.0]), total() / hvd.size()),
    broadcast=lambda m: holds(m.broadcast([hvd.rank() + 1.0], 1), 2.0),
    broadcast_global_variables=TENSORFLOW["broadcast_global_variables"],
    load_model=loaded,
    reducescatter=lambda m: scattered(m.reducescatter([hvd.rank() + 1.0] * 4), hvd.size()),
)
TENSORFLOW_KERAS = some(
    "Adasum", is_version_greater_equal_than=lambda m: m.is_version_greater_equal_than("1.2.3", "1.2.0"), **OF_KERAS
)
KERAS = some(
    "ProcessSet",
    "add_process_set",
    "remove_process_set",
    PartialDistributedOptimizer=lambda m: partly(m.PartialDistributedOptimizer),
    **OF_KERAS,
)


def called(name, *args, **options):
    def fits(m):
        from hvd_accordion.tensorflow.keras import DistributedOptimizer

        callback = getattr(m, name)(*args, **options)
        return agree(DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9)), callbacks=[callback])

    return fits


def best(m):
    with tempfile.TemporaryDirectory() as folder:
        made = called("BestModelCheckpoint", filepath=f"{folder}/best.keras")(m)
        return made and keras.models.load_model(f"{folder}/best.keras", compile=False)


CALLBACKS = {
    "BestModelCheckpoint": best,
    "BroadcastGlobalVariablesCallback": called("BroadcastGlobalVariablesCallback", 0),
    "LearningRateScheduleCallback": called("LearningRateScheduleCallback", 0.1, 0.5),
    "LearningRateWarmupCallback": called("LearningRateWarmupCallback", 0.1, 1),
    "MetricAverageCallback": called("MetricAverageCallback"),
}
OF_TENSORFLOW = {
    "compression",
    "elastic",
    "functions",
    "gradient_aggregation",
    "gradient_aggregation_eager",
    "keras",
    "mpi_ops",
    "sync_batch_norm",
    "util",
}
TABLES = {  # names, and submodules
    "tensorflow": (TENSORFLOW, OF_TENSORFLOW),
    "tensorflow.keras": (TENSORFLOW_KERAS, {"callbacks", "elastic"}),
    "keras": (KERAS, {"callbacks", "elastic"}),
    "tensorflow.keras.callbacks": (
        {
            **CALLBACKS,
            "is_version_greater_equal_than": Refused(AttributeError, "", lambda m: m.is_version_greater_equal_than),
        },
        set(),
    ),
    "keras.callbacks": (CALLBACKS, set()),
}


@pytest.mark.parametrize("module", TABLES)
def test_every_name_has_a_row(module):
    table, submodules = TABLES[module]
    assert not names.differences(f"horovod.{module}", table, submodules)
    assert not names.missing_from_page(f"horovod.{module}")


DONE = set()  # what one module has from another need not be shown twice


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, (table, _) in TABLES.items() for name in table]
)
def test_a_name_works_or_says_why_not(module, name):
    row, ours = TABLES[module][0][name], importlib.import_module(f"hvd_accordion.{module}")
    shown = id(row), id(getattr(ours, name, None))
    if shown not in DONE:
        names.check(row, ours)
        DONE.add(shown)


@pytest.mark.parametrize("module", TABLES)
def test_submodules_are_found(module):
    for name in TABLES[module][1]:
        assert names.left_out(f"{module}.{name}") == []
