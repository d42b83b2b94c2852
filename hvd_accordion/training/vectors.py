"""Lists of tensors, one for each parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from hvd_accordion.comm.collectives import Tensor

Vectors: TypeAlias = list[Tensor]


def each(function: Callable[..., Tensor], *vectors: Vectors) -> Vectors:
    """The function of the first of all vectors' tensors, of the second, and so on."""
    return [function(*tensors) for tensors in zip(*vectors, strict=True)]
