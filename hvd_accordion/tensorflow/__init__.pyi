"""Types of Horovod's names, which have none, and of ours."""

from collections.abc import Sequence
from typing import Any

from hvd_accordion.tensorflow import elastic as elastic
from hvd_accordion.tensorflow.broadcasting import broadcast_global_variables as broadcast_global_variables
from hvd_accordion.tensorflow.distributed_optimizer import DistributedOptimizer as DistributedOptimizer
from hvd_accordion.tensorflow.exchange.uneven import join as join
from hvd_accordion.tensorflow.gradient_exchange import GradientExchange as GradientExchange
from hvd_accordion.tensorflow.gradient_tape import DistributedGradientTape as DistributedGradientTape
from hvd_accordion.tensorflow.gradient_tape import PartialDistributedGradientTape as PartialDistributedGradientTape
from hvd_accordion.tensorflow.optim.error_compensated import ECLK as ECLK
from hvd_accordion.tensorflow.optim.error_compensated import ECLSVRG as ECLSVRG
from hvd_accordion.tensorflow.optim.error_compensated import ECSGD as ECSGD
from hvd_accordion.tensorflow.optim.error_compensated import EF21 as EF21
from hvd_accordion.tensorflow.optim.error_compensated import LSVRG as LSVRG
from hvd_accordion.tensorflow.optim.error_compensated import LKatyusha as LKatyusha
from hvd_accordion.tensorflow.optim.error_compensated import estimate_smoothness as estimate_smoothness
from hvd_accordion.tensorflow.sync_batch_norm import SyncBatchNormalization as SyncBatchNormalization
from hvd_accordion.utils.horovod_basics import *  # noqa: F403
from hvd_accordion.utils.horovod_basics import ProcessSet as ProcessSet

def allgather(
    tensor: Any, name: str | None = None, ignore_name_scope: Any = False, process_set: ProcessSet = ...
) -> Any: ...
def allgather_object(obj: Any, session: Any = None, name: str | None = None, process_set: ProcessSet = ...) -> Any: ...
def allreduce(
    tensor: Any,
    average: bool | None = None,
    device_dense: Any = "",
    device_sparse: Any = "",
    compression: type[Any] = ...,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: ProcessSet = ...,
    ignore_name_scope: Any = False,
) -> Any: ...
def alltoall(
    tensor: Any,
    splits: Any | None = None,
    name: str | None = None,
    ignore_name_scope: Any = False,
    process_set: ProcessSet = ...,
) -> Any: ...
def broadcast(
    tensor: Any, root_rank: int, name: str | None = None, ignore_name_scope: Any = False, process_set: ProcessSet = ...
) -> Any: ...
def broadcast_(variables: Any, root_rank: int, name: str | None = None, process_set: ProcessSet = ...) -> Any: ...
def broadcast_object(
    obj: Any, root_rank: int = 0, session: Any = None, name: str | None = None, process_set: ProcessSet = ...
) -> Any: ...
def broadcast_object_fn(
    root_rank: int = 0, session: Any = None, name: str | None = None, process_set: ProcessSet = ...
) -> Any: ...
def broadcast_variables(
    variables: Any, root_rank: int, process_set: ProcessSet = ..., inplace: Any = False
) -> None: ...
def grouped_allgather(
    tensors: Sequence[Any], name: str | None = None, ignore_name_scope: Any = False, process_set: ProcessSet = ...
) -> list[Any]: ...
def grouped_allreduce(
    tensors: Sequence[Any],
    average: bool | None = None,
    device_dense: Any = "",
    device_sparse: Any = "",
    compression: type[Any] = ...,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = ...,
    ignore_name_scope: Any = False,
    name: str | None = None,
) -> list[Any]: ...
def grouped_reducescatter(
    tensors: Sequence[Any],
    device_dense: Any = "",
    compression: type[Any] = ...,
    op: int | None = 0,
    process_set: ProcessSet = ...,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Any]: ...
def local_rank_op(name: str | None = None) -> Any: ...
def local_size_op(name: str | None = None) -> Any: ...
def process_set_included_op(process_set_id: Any = 0, name: str | None = None) -> Any: ...
def rank_op(name: str | None = None) -> Any: ...
def reducescatter(
    tensor: Any,
    device_dense: Any = "",
    compression: type[Any] = ...,
    op: int | None = 0,
    name: str | None = None,
    process_set: ProcessSet = ...,
    ignore_name_scope: Any = False,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Any: ...
def size_op(process_set_id: Any = 0, name: str | None = None) -> Any: ...
def is_homogeneous() -> bool: ...
