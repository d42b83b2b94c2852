"""The collectives that an exchange may ask for, and what each makes one rank send.

An exchange is a generator: it yields one of these and is sent the result. Who carries them out (Horovod under torch or
TensorFlow, a cluster of simulated ranks in numpy) is none of its business.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

Tensor: TypeAlias = Any


@dataclass(frozen=True)
class AllReduce:
    """Mean over the ranks of each of `tensors`. Result: a list of the same shapes; the memory of `tensors` may be reused."""

    tensors: Sequence[Tensor]


@dataclass(frozen=True)
class AllGather:
    """The vector `tensor` (of equal length on all ranks) of every rank. Result: a matrix, one row per rank."""

    tensor: Tensor


@dataclass(frozen=True)
class AllToAll:
    """Row r of the matrix `tensor` (one row per rank) goes to rank r. Result: a matrix, row r came from rank r."""

    tensor: Tensor


@dataclass(frozen=True)
class AllFinite:
    """Whether `sound()` holds for every exchange of this step, on the device. Costs nothing: it is equal on all ranks.

    Asked for only where something depends on it.
    """

    is_finite: Callable[[], Tensor]


Request: TypeAlias = AllReduce | AllGather | AllToAll | AllFinite
T = TypeVar("T")
Rounds: TypeAlias = Generator[Request, Any, T]


def payload(request: Request) -> list[Tensor]:
    """The tensors that a request hands to the network."""
    if isinstance(request, AllReduce):
        return list(request.tensors)
    return [] if isinstance(request, AllFinite) else [request.tensor]


def sent(request: type[Request], nbytes: float, world_size: int) -> float:
    """Bytes that one rank sends for a payload of `nbytes`, in the bandwidth-optimal form of the collective.

    AllReduce 2 (n-1)/n B (reduce-scatter, then gather), AllGather (n-1) B, AllToAll (n-1)/n B.
    """
    n = world_size
    if request is AllReduce:
        return 2 * (n - 1) / n * nbytes
    if request is AllGather:
        return (n - 1) * nbytes
    return (n - 1) / n * nbytes if request is AllToAll else 0.0
