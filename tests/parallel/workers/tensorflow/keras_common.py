"""A small Keras network, its batches and its training, the same in all TensorFlow workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import hvd_accordion.tensorflow.keras as hvd
from hvd_accordion import QSGD, Accordion, Dense, PowerSGD, TopK
from hvd_accordion.tensorflow import allgather
from tests.parallel import reference

SPECS = {
    "none": None,
    **reference.SPECS,
    "accordion": Accordion(interval=1, eta=0.1),
    "accordion-kinds": Accordion(critical=Dense(), relaxed=TopK(0.02), interval=4, unit="steps", eta=0.5),
    "globs": {"conv*": QSGD(7), "*/kernel": Accordion(QSGD(7), PowerSGD(1), interval=2, unit="steps"), "*": None},
}
BATCH, STEPS = 8, 5  # of a rank, of an epoch


def model(seed: int = 7) -> keras.Model:
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((14, 14, 1)),
            layers.Conv2D(8, 3, strides=2, activation="relu", name="conv1"),
            layers.Conv2D(24, 3, activation="relu", name="conv2"),
            layers.Flatten(),
            layers.Dense(48, activation="tanh", name="dense1"),
            layers.Dense(48, activation="tanh", name="dense2"),
            layers.Dense(48, activation="tanh", name="dense3"),
            layers.Dense(10, name="dense4"),
        ]
    )


def data(rank: int | None = None, steps: int = STEPS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The batches of one rank, one after the other."""
    rng = np.random.default_rng((seed, hvd.rank() if rank is None else rank))
    x = rng.standard_normal((steps * BATCH, 14, 14, 1)).astype(np.float32)
    return x, rng.integers(0, 10, steps * BATCH)


def joined(steps: int = STEPS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Batches of all ranks, as one process would see them."""
    parts = [data(rank, steps, seed) for rank in range(hvd.size())]
    xs, ys = ([part[i].reshape(steps, BATCH, *part[i].shape[1:]) for part in parts] for i in (0, 1))
    x, y = np.concatenate(xs, axis=1), np.concatenate(ys, axis=1)
    return x.reshape(-1, *x.shape[2:]), y.reshape(-1)


def loss() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def sgd(**options: Any) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(**{"learning_rate": 0.05, "momentum": 0.9, **options})


def compiled(
    compression: Any = None,
    optimizer: Any = None,
    net: Any = None,
    compile_options: Any = None,
    built: bool = False,
    **options: Any,
):
    """A model that trains under the compression, and its optimizer.

    `built`: with its variables. A step that makes them is traced twice.
    """
    net = net or model()
    wrapped = hvd.DistributedOptimizer(optimizer or sgd(), compression=compression, **options)
    net.compile(wrapped, loss=loss(), **(compile_options or {}))
    if built:
        wrapped.build(net.trainable_variables)
    return net, wrapped


def fit(
    net: keras.Model, epochs: int = 1, steps: int = STEPS, callbacks: Sequence[Any] = (), seed: int = 0, **options: Any
):
    x, y = data(steps=steps, seed=seed)
    told = [hvd.callbacks.EpochCallback(), *callbacks]
    return net.fit(x, y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=told, **options)


def flat(net: keras.Model) -> np.ndarray:
    return np.concatenate([v.numpy().astype(np.float64).reshape(-1) for v in net.trainable_variables])


def everyone(x: np.ndarray) -> np.ndarray:
    """x of every rank, one row each."""
    return allgather(tf.constant(x.reshape(1, -1)), name="everyone").numpy()


def assert_ranks_equal(x: np.ndarray, what: object = "") -> None:
    rows = everyone(x)
    assert np.isfinite(rows).all(), what
    for row in rows[1:]:
        np.testing.assert_array_equal(rows[0], row, f"ranks differ: {what}")


def exchange_of(optimizer: Any) -> Any:
    return optimizer._hvd


def residuals(optimizer: Any) -> dict[str, np.ndarray]:
    """Layer name -> residual."""
    numbers = optimizer._hvd._engine.plan.numbers
    kept = optimizer._hvd.state.residual
    return {name: kept[key].numpy() for name, key in numbers.items() if key in kept}
