"""Types of Horovod's names, which have none, and of ours."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_accordion.torch import elastic as elastic
from hvd_accordion.torch.distributed_optimizer import DistributedOptimizer as DistributedOptimizer
from hvd_accordion.torch.exchange.uneven import join as join
from hvd_accordion.torch.gradient_exchange import GradientExchange as GradientExchange
from hvd_accordion.torch.optim.error_compensated import ECLK as ECLK
from hvd_accordion.torch.optim.error_compensated import ECLSVRG as ECLSVRG
from hvd_accordion.torch.optim.error_compensated import ECSGD as ECSGD
from hvd_accordion.torch.optim.error_compensated import EF21 as EF21
from hvd_accordion.torch.optim.error_compensated import LSVRG as LSVRG
from hvd_accordion.torch.optim.error_compensated import LKatyusha as LKatyusha
from hvd_accordion.torch.optim.error_compensated import estimate_smoothness as estimate_smoothness
from hvd_accordion.torch.optim.one_bit_adam import OneBitAdam as OneBitAdam
from hvd_accordion.torch.optim.one_bit_adam import ZeroOneAdam as ZeroOneAdam
from hvd_accordion.torch.optimizer_state import broadcast_optimizer_state as broadcast_optimizer_state
from hvd_accordion.utils.horovod_basics import *  # noqa: F403
from hvd_accordion.utils.horovod_basics import ProcessSet as ProcessSet

class SyncBatchNorm(torch.nn.SyncBatchNorm): ...

def allgather(tensor: Tensor, name: str | None = None, process_set: ProcessSet = ...) -> Tensor: ...
def allgather_async(tensor: Tensor, name: str | None = None, process_set: ProcessSet = ...) -> int: ...
def allgather_object(obj: Any, name: str | None = None) -> Any: ...
def allreduce(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Any] = ...,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = ...,
) -> Tensor: ...
def allreduce_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = ...,
) -> Tensor: ...
def allreduce_async(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = ...,
) -> int: ...
def allreduce_async_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = ...,
) -> int: ...
def alltoall(
    tensor: Tensor, splits: Tensor | None = None, name: str | None = None, process_set: ProcessSet = ...
) -> Any: ...
def alltoall_async(
    tensor: Tensor, splits: Tensor | None = None, name: str | None = None, process_set: ProcessSet = ...
) -> int: ...
def barrier(process_set: ProcessSet = ...) -> None: ...
def broadcast(tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = ...) -> Tensor: ...
def broadcast_(tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = ...) -> Tensor: ...
def broadcast_async(tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = ...) -> int: ...
def broadcast_async_(tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = ...) -> int: ...
def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = ...) -> Any: ...
def broadcast_parameters(params: Any, root_rank: int) -> None: ...
def grouped_allgather(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = ...
) -> list[Tensor]: ...
def grouped_allgather_async(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = ...
) -> int: ...
def grouped_allreduce(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Any] = ...,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = ...,
) -> list[Tensor]: ...
def grouped_allreduce_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = ...,
) -> list[Tensor]: ...
def grouped_allreduce_async(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = ...,
) -> int: ...
def grouped_allreduce_async_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = ...,
) -> int: ...
def grouped_reducescatter(
    tensors: Sequence[Tensor],
    name: str | None = None,
    compression: type[Any] = ...,
    op: int | None = 0,
    process_set: ProcessSet = ...,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Tensor]: ...
def grouped_reducescatter_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    op: int | None = 0,
    process_set: ProcessSet = ...,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int: ...
def poll(handle: int) -> bool: ...
def reducescatter(
    tensor: Tensor,
    name: str | None = None,
    compression: type[Any] = ...,
    op: int | None = 0,
    process_set: ProcessSet = ...,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Tensor: ...
def reducescatter_async(
    tensor: Tensor,
    name: str | None = None,
    op: int | None = 0,
    process_set: ProcessSet = ...,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int: ...
def sparse_allreduce_async(tensor: Tensor, name: str | None, op: int | None, process_set: ProcessSet = ...) -> int: ...
def synchronize(handle: int) -> Tensor: ...
