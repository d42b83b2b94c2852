"""The collectives that an exchange requests, and the bytes that one rank sends for each.

An exchange is a generator: it yields a request and receives the result. A driver carries the requests out: over Horovod
in torch and TensorFlow, or over simulated ranks in numpy.
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
    """True if `is_finite()` holds for every exchange of this step. Sends nothing: the flag is equal on all ranks.

    `is_finite` returns a flag on the device. The driver calls it only if a result depends on it.
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
