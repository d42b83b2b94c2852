"""User scripts of tests/differential/scripts under an average by hand and under this package."""

from __future__ import annotations

import copy
from typing import Any

import horovod.tensorflow as horovod
import keras
import numpy as np
import pytest
import tensorflow as tf

import hvd_accordion.tensorflow.keras as hvd
from hvd_accordion.tensorflow.gradient_exchange import GradientExchange
from tests.differential.harness import EXACT, LOSSY, Horovod, Script
from tests.differential.scripts.keras_examples import KERAS
from tests.differential.scripts.keras_scripts import *  # noqa: F403


class ByHand:
    """Horovod's own Keras side fails on Keras 3: here each gradient is averaged by an allreduce of its own in `apply`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(horovod, name)

    def DistributedOptimizer(self, optimizer: Any, op: Any = horovod.Average, **_: Any) -> Any:
        class Averaging(type(optimizer)):  # type: ignore[misc]
            def apply(self, grads: Any, trainable_variables: Any = None) -> None:
                grads = [tf.convert_to_tensor(g) for g in grads]  # slices, too
                means = [horovod.allreduce(g, op=op, name=f"by.hand.{i}") for i, g in enumerate(grads)]
                super().apply(means, trainable_variables)

        return Averaging.from_config(optimizer.get_config())


def trained(script: Script, module: Any, **options: Any) -> np.ndarray:
    """Everything that the script trained, as one vector."""
    keras.utils.set_random_seed(0)
    found = script.train(Horovod(module, options))
    return np.concatenate([np.ravel(v).astype(np.float64) for v in found.trainable_variables])


class Ledger:
    """What the exchanges were given, what they gave back, and what waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sums: dict[tuple[int, str], list[tf.Variable]] = {}
        self.exchanges: list[GradientExchange] = []
        self.exchange = GradientExchange.__call__
        ledger = self

        def recorded(exchange: Any, gradients: Any, variables: Any, steps: Any = None) -> Any:
            averaged = ledger.exchange(exchange, gradients, variables, steps)
            for given, applied, v in zip(gradients, averaged, variables, strict=True):
                if given is not None:
                    ledger.add(exchange, exchange.key(v), v, given, applied)
            return averaged

        monkeypatch.setattr(GradientExchange, "__call__", tf.autograph.experimental.do_not_convert(recorded))

    def add(self, exchange: Any, key: str, v: Any, given: Any, applied: Any) -> None:
        if exchange not in self.exchanges:
            self.exchanges.append(exchange)
        at = self.exchanges.index(exchange), key
        if at not in self.sums:
            with tf.init_scope():
                self.sums[at] = [tf.Variable(tf.zeros(v.shape, tf.float64), trainable=False) for _ in range(2)]
        for total, value in zip(self.sums[at], (given, applied), strict=True):
            total.assign_add(tf.cast(tf.convert_to_tensor(value), tf.float64))

    def check(self) -> None:
        for (i, key), (given, applied) in self.sums.items():
            residual = self.exchanges[i].state.residual.get(key)
            waiting = tf.zeros_like(given) if residual is None else tf.cast(residual, tf.float64)
            means = [
                horovod.allreduce(x, op=horovod.Average, name=f"ledger.{i}.{key}.{j}").numpy()
                for j, x in enumerate((given.read_value(), waiting))
            ]
            error = np.abs(means[0] - applied.numpy() - means[1]).max()
            assert error <= 1e-5 * max(1.0, np.abs(means[0]).max()), f"{key}: {error} was lost"


def assert_ranks_equal(x: np.ndarray, what: str) -> None:
    everyone = horovod.allgather(tf.constant(x[None]), name="ranks.equal").numpy()
    assert np.isfinite(everyone).all() and (everyone == everyone[0]).all(), f"ranks differ: {what}"


@pytest.mark.parametrize("script", KERAS.values(), ids=lambda script: script.name)
def test_script(script, monkeypatch):
    expected = trained(script, ByHand())
    for mode, compression in EXACT.items():
        error = np.abs(trained(script, hvd, compression=compression) - expected).max()
        assert error <= script.tolerance, f"{mode} differs from an average by hand by {error}"
    for mode, compression in LOSSY.items():
        ledger = Ledger(monkeypatch)
        assert_ranks_equal(trained(script, hvd, compression=copy.deepcopy(compression), min_compress_numel=64), mode)
        if script.conserves:
            ledger.check()
        monkeypatch.undo()
