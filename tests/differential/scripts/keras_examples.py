"""What Keras scripts share: a small network, examples of this rank."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tests.differential.harness import Script, register

KERAS: dict[str, Script] = {}
script = register(KERAS)


def network() -> keras.Model:
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Input((24,)), keras.layers.Dense(40, "tanh", name="first")]
    return keras.Sequential([*layers, keras.layers.Dense(4, name="last")])


def examples(hvd: Any, steps: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """`steps` batches of six."""
    rng = np.random.default_rng(1000 + hvd.rank())
    return rng.standard_normal((6 * steps, 24), np.float32), rng.integers(0, 4, 6 * steps)


def loss() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def fitted(hvd: Any, net: keras.Model, optimizer: Any, epochs: int = 1, callbacks: Any = (), **options: Any) -> Any:
    net.compile(hvd.DistributedOptimizer(optimizer), loss(), jit_compile=False, **options)
    x, y = examples(hvd)
    net.fit(x, y, batch_size=6, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))
    return net
