"""Mirrors horovod.keras.elastic: with Keras 3 the same as hvd_accordion.tensorflow.keras.elastic."""

from hvd_accordion.tensorflow.keras.elastic import *  # noqa: F403
from hvd_accordion.tensorflow.keras.elastic import TensorFlowKerasState, __all__  # noqa: F401
