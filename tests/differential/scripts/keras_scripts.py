"""All scripts of Keras: importing them registers them."""

import keras_fits
import keras_loops

__all__ = ["keras_fits", "keras_loops"]
