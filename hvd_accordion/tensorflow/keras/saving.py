"""The state of compression in the files of Keras."""

from __future__ import annotations

from typing import Any

import keras

from hvd_accordion.tensorflow.gradient_exchange import GradientExchange


class SavedState(keras.layers.Layer):
    """The state of compression in the form in which Keras saves the parts of a model."""

    def __init__(self, exchange: GradientExchange) -> None:
        super().__init__(name="compression_state", trainable=False)
        self.exchange, self.built = exchange, True

    def save_own_variables(self, store: Any) -> None:
        if hasattr(self.exchange, "state"):
            for name, array in self.exchange.state.arrays().items():
                store[name] = array

    def load_own_variables(self, store: Any) -> None:
        if hasattr(self.exchange, "state"):
            self.exchange.state.load({name: store[name] for name in store.keys()})
