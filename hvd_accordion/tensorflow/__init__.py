"""Mirrors horovod.tensorflow: every public name of it, with gradients that may travel compressed, on Keras 3 too.

`import hvd_accordion.tensorflow as hvd` in place of `import horovod.tensorflow as hvd` changes nothing until
`compression` is given, but that what Horovod 0.28 breaks on Keras 3 works.
"""

import horovod.tensorflow as _horovod
from horovod.tensorflow import *  # noqa: F403

from hvd_accordion.comm.launch import initialiser as _initialiser
from hvd_accordion.utils.horovod_mirror import mirror as _mirror

__all__ = _mirror(_horovod, globals())

import hvd_accordion.tensorflow.elastic as elastic
from hvd_accordion.tensorflow.broadcasting import (
    broadcast_global_variables,
    broadcast_object_fn,
    broadcast_variables,
)
from hvd_accordion.tensorflow.distributed_optimizer import DistributedOptimizer
from hvd_accordion.tensorflow.exchange.uneven import join
from hvd_accordion.tensorflow.gradient_exchange import GradientExchange
from hvd_accordion.tensorflow.gradient_tape import (
    DistributedGradientTape,
    PartialDistributedGradientTape,
)
from hvd_accordion.tensorflow.optim.error_compensated import (
    ECLK,
    ECLSVRG,
    ECSGD,
    EF21,
    LSVRG,
    LKatyusha,
    estimate_smoothness,
)
from hvd_accordion.tensorflow.sync_batch_norm import SyncBatchNormalization

__all__ += [
    "ECLK",
    "ECLSVRG",
    "ECSGD",
    "EF21",
    "LSVRG",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "GradientExchange",
    "LKatyusha",
    "PartialDistributedGradientTape",
    "SyncBatchNormalization",
    "broadcast_global_variables",
    "broadcast_object_fn",
    "broadcast_variables",
    "elastic",
    "estimate_smoothness",
    "join",
]

init = _initialiser(_horovod)
