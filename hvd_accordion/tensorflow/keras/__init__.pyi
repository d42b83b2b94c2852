"""Types of Horovod's names, which have none, and of ours."""

from typing import Any

from hvd_accordion.tensorflow.broadcasting import broadcast_global_variables as broadcast_global_variables
from hvd_accordion.tensorflow.keras import callbacks as callbacks
from hvd_accordion.tensorflow.keras import elastic as elastic
from hvd_accordion.tensorflow.keras.loading import load_model as load_model
from hvd_accordion.tensorflow.keras.one_bit_adam import OneBitAdam as OneBitAdam
from hvd_accordion.tensorflow.keras.one_bit_adam import ZeroOneAdam as ZeroOneAdam
from hvd_accordion.tensorflow.keras.optimizer import DistributedOptimizer as DistributedOptimizer
from hvd_accordion.tensorflow.keras.optimizer import PartialDistributedOptimizer as PartialDistributedOptimizer
from hvd_accordion.utils.horovod_basics import *  # noqa: F403

def allgather(value: Any, name: str | None = None) -> Any: ...
def allreduce(
    value: Any,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: int | None = None,
    compression: type[Any] = ...,
) -> Any: ...
def broadcast(value: Any, root_rank: int, name: str | None = None) -> Any: ...
def reducescatter(value: Any, name: str | None = None, op: int | None = 0) -> Any: ...
