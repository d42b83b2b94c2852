"""Mirrors horovod.torch: every public name of it, submodules too, with a DistributedOptimizer that compresses.

`import hvd_accordion.torch as hvd` in place of `import horovod.torch as hvd` changes nothing until `compression` is given.
"""

import horovod.torch as _horovod
from horovod.torch import *  # noqa: F403

from hvd_accordion.comm.launch import initialiser as _initialiser
from hvd_accordion.utils.horovod_mirror import mirror as _mirror

__all__ = _mirror(_horovod, globals())

from hvd_accordion.torch import elastic
from hvd_accordion.torch.distributed_optimizer import DistributedOptimizer
from hvd_accordion.torch.exchange.uneven import join
from hvd_accordion.torch.gradient_exchange import GradientExchange
from hvd_accordion.torch.optim.error_compensated import (
    ECLK,
    ECLSVRG,
    ECSGD,
    EF21,
    LSVRG,
    LKatyusha,
    estimate_smoothness,
)
from hvd_accordion.torch.optim.one_bit_adam import OneBitAdam, ZeroOneAdam
from hvd_accordion.torch.optimizer_state import broadcast_optimizer_state

__all__ += [
    "ECLK",
    "ECLSVRG",
    "ECSGD",
    "EF21",
    "LSVRG",
    "DistributedOptimizer",
    "GradientExchange",
    "LKatyusha",
    "OneBitAdam",
    "ZeroOneAdam",
    "broadcast_optimizer_state",
    "elastic",
    "estimate_smoothness",
    "join",
]

init = _initialiser(_horovod)
