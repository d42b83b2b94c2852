"""Mirrors horovod.tensorflow: every public name of it, with gradients that may travel compressed, on Keras 3 too.

`import hvd_accordion.tensorflow as hvd` in place of `import horovod.tensorflow as hvd` changes nothing until
`compression` is given, but that what Horovod 0.28 breaks on Keras 3 works.
"""

import horovod.tensorflow as _horovod
from horovod.tensorflow import *  # noqa: F403

for _name in dir(_horovod):
    if not _name.startswith("_"):
        globals()[_name] = getattr(_horovod, _name)

from hvd_accordion.tensorflow.distributed_optimizer import DistributedOptimizer  # noqa: E402
from hvd_accordion.tensorflow.broadcasting import broadcast_global_variables, broadcast_variables  # noqa: E402
from hvd_accordion.tensorflow.gradient_exchange import GradientExchange  # noqa: E402
from hvd_accordion.tensorflow.gradient_tape import (  # noqa: E402
    DistributedGradientTape,
    PartialDistributedGradientTape,
)

_OURS = [
    "DistributedGradientTape",
    "DistributedOptimizer",
    "GradientExchange",
    "PartialDistributedGradientTape",
    "broadcast_global_variables",
    "broadcast_variables",
]
__all__ = sorted({*(_name for _name in dir(_horovod) if not _name.startswith("_")), *_OURS})
