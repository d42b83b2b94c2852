"""Mirrors horovod.keras.callbacks."""

from hvd_accordion.tensorflow.keras.callbacks import *  # noqa: F403
from hvd_accordion.tensorflow.keras.callbacks import __all__  # noqa: F401
