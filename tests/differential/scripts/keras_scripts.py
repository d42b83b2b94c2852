"""All scripts of Keras: importing them registers them."""

from tests.differential.scripts import keras_fits, keras_loops

__all__ = ["keras_fits", "keras_loops"]
