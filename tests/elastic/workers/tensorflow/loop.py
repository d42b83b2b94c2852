"""Horovod's documented elastic form of a training loop under TensorFlow 2, with several compressions side by side.

At every step ranks are bit-equal, and what was applied and what waits is what was given; each rank's share of what waits
survives a change of the ranks.
"""

import keras
import numpy as np
import tensorflow as tf

import hvd_accordion.tensorflow as hvd
from hvd_accordion import Accordion, Dense, PowerSGD, TopK
from hvd_accordion.tensorflow.exchange import registry
from tests.elastic.changes import Changes

LR, BATCH = 0.05, 48
SPECS = {
    "dense*": Dense(),
    "power*": PowerSGD(2),
    "top*": TopK(0.1),
    "adaptive*": Accordion(TopK(0.2), TopK(0.05), eta=1e9, unit="steps", interval=5),
}

hvd.init()
changes = Changes()
keras.utils.set_random_seed(3)
inputs = keras.Input((32,))
model = keras.Model(
    inputs,
    [
        keras.layers.Dense(4, name=f"{name}_b")(keras.layers.Dense(48, "tanh", name=f"{name}_a")(inputs))
        for name in ("plain", "dense", "power", "top", "adaptive")
    ],
)
plain = [v for v in model.trainable_variables if v.path.startswith("plain")]
others = [v for v in model.trainable_variables if not v.path.startswith("plain")]
optimizer = keras.optimizers.SGD(LR)
generator = np.random.default_rng(1)
examples = generator.standard_normal((BATCH, 32), np.float32)
targets = (examples @ generator.standard_normal((32, 4)) / 6).astype(np.float32)


def get_batch():
    """This rank's part."""
    return tf.constant(examples[hvd.rank() :: hvd.size()]), tf.constant(targets[hvd.rank() :: hvd.size()])


@tf.function(reduce_retracing=True)
def train_one_batch(data, target, allreduce=True):
    with tf.GradientTape(persistent=True) as tape:
        losses = [tf.reduce_mean((output - target) ** 2) for output in model(data, training=True)]
        loss = tf.add_n(losses)
    given = tape.gradient(loss, plain + others)
    gradients = given
    if allreduce:
        gradients = hvd.DistributedGradientTape(tape).gradient(loss, plain)
        gradients += hvd.DistributedGradientTape(tape, compression=SPECS).gradient(loss, others)
    optimizer.apply_gradients(zip(gradients, plain + others, strict=True))
    return tf.stack(losses), given


def flat(tensors):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in tensors])


def residuals():
    """Of each variable, zeros where there is none."""
    found = {id(v): np.zeros(v.shape) for v in plain + others}
    for exchange in registry.alive():
        for v in others:
            key = exchange.key(v) if exchange.knows_any([v]) else None
            if key in exchange.state.residual:
                found[id(v)] = exchange.state.residual[key].numpy()
    return flat(found.values())


def weights():
    return flat(plain + others)


def mean(x, name):
    return hvd.allreduce(tf.constant(x), op=hvd.Average, name=name).numpy()


def total():
    """What was applied until now, and the mean of what waits."""
    return weights() / -LR + mean(residuals(), "waiting")


# Initialize model and optimizer state so we can synchronize across workers
train_one_batch(*get_batch(), allreduce=False)


@hvd.elastic.run
def train(state):
    changes.enter()
    held, share = state.held.get(changes.host), residuals() / hvd.size()
    np.testing.assert_allclose(share, 0.0 if held is None else held, atol=1e-6, err_msg="residuals")
    begin, given, done = total(), 0.0, False
    while not done:
        losses, gradients = train_one_batch(*get_batch())
        given = given + mean(flat(gradients), "given")
        check(state, begin + given)
        if changes.steps == 0:
            record(state, losses=mean(losses.numpy(), "losses").tolist())
        state.batch += 1
        if state.batch % 3 == 0:
            state.commit()
        done = changes.step(hvd.rank(), hvd.size())
    (compressed,) = (x for x in registry.alive() if x.knows_any(others))
    regimes = sorted({row.regime for row in compressed.compression_report() if row.regime})
    losses = mean(losses.numpy(), "losses").tolist()
    record(state, regimes=regimes, losses=losses, traced=train_one_batch.experimental_get_tracing_count(), over=True)


def check(state, expected):
    everyone = hvd.allgather(tf.constant(weights()[None]), name="weights").numpy()
    assert (everyone == everyone[0]).all(), f"ranks differ at step {state.batch}"
    begin = 0
    now = total()
    for v in plain + others:
        part = slice(begin, begin := begin + v.shape.num_elements())
        off = np.abs(now[part] - expected[part]).max() / np.abs(expected[part]).max()
        assert off < 1e-4, f"{v.path}, {hvd.size()} ranks: the books are off by {off} at step {state.batch}"
    shares = hvd.allgather(tf.constant(residuals()[None] / hvd.size()), name="shares").numpy()
    state.held = dict(zip(hosts_of(), shares, strict=True))


def hosts_of():
    """The names of all ranks' hosts."""
    text = changes.host.encode().ljust(32)
    told = hvd.allgather(tf.constant(np.frombuffer(text, np.uint8)[None]), name="hosts").numpy()
    return [bytes(name).decode().strip() for name in told]


def record(state, **what):
    changes.record(rank=hvd.rank(), size=hvd.size(), step=state.batch, **what)


def on_state_reset():
    optimizer.learning_rate.assign(LR)


state = hvd.elastic.TensorFlowKerasState(model, optimizer, batch=0, held={})
state.register_reset_callbacks([on_state_reset])
train(state)
