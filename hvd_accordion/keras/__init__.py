"""Mirrors horovod.keras: with Keras 3 the same as hvd_accordion.tensorflow.keras."""

import horovod.keras as _horovod
from horovod.keras import *  # noqa: F403

from hvd_accordion.comm.launch import initialiser as _initialiser
from hvd_accordion.utils.horovod_mirror import mirror as _mirror

__all__ = _mirror(_horovod, globals())

import hvd_accordion.keras.callbacks as callbacks
import hvd_accordion.keras.elastic as elastic
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
