"""Mirrors horovod.tensorflow.keras, on Keras 3: every public name of it, with an optimizer that compresses."""

import horovod.tensorflow.keras as _horovod
from horovod.tensorflow.keras import *  # noqa: F403

from hvd_accordion.comm.launch import initialiser as _initialiser
from hvd_accordion.utils.horovod_mirror import mirror as _mirror

__all__ = _mirror(_horovod, globals())

import hvd_accordion.tensorflow.keras.callbacks as callbacks
import hvd_accordion.tensorflow.keras.elastic as elastic
from hvd_accordion.tensorflow.broadcasting import broadcast_global_variables
from hvd_accordion.tensorflow.keras.loading import load_model
from hvd_accordion.tensorflow.keras.one_bit_adam import OneBitAdam, ZeroOneAdam
from hvd_accordion.tensorflow.keras.optimizer import DistributedOptimizer, PartialDistributedOptimizer

__all__ += [
    "DistributedOptimizer",
    "OneBitAdam",
    "PartialDistributedOptimizer",
    "ZeroOneAdam",
    "broadcast_global_variables",
    "callbacks",
    "elastic",
    "load_model",
]

init = _initialiser(_horovod)
