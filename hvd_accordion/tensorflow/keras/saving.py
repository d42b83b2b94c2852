"""The state of compression in the files of Keras."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from hvd_accordion.tensorflow.gradient_exchange import GradientExchange
from hvd_accordion.tensorflow.keras.accumulation import LocalSums


class SavedState(keras.layers.Layer):
    """The state of compression, and sums under way, in the form in which Keras saves the parts of a model."""

    def __init__(self, exchange: GradientExchange, sums: LocalSums | None = None) -> None:
        super().__init__(name="compression_state", trainable=False)
        self.exchange, self.sums, self.built = exchange, sums, True

    def _sums(self) -> dict[str, tf.Variable]:
        return {} if self.sums is None else self.sums.named()

    def save_own_variables(self, store: Any) -> None:
        if hasattr(self.exchange, "state"):
            sums = {name: v.numpy() for name, v in self._sums().items()}
            for name, array in {**self.exchange.state.arrays(), **sums}.items():
                store[name] = array

    def load_own_variables(self, store: Any) -> None:
        if hasattr(self.exchange, "state"):
            saved = {name: store[name] for name in store.keys()}
            sums = self._sums()
            left = self.exchange.state.load({name: saved[name] for name in saved if name not in sums})
            if int(saved.get("count", 0)) and not sums:
                left.append(f"{int(saved['count'])} micro-batches of an incomplete batch")
            for name, v in sums.items():
                if name in saved:
                    v.assign(saved[name])
            self.exchange.restored(left)
