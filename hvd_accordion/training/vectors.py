"""Lists of tensors, one per parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from hvd_accordion.comm.collectives import Tensor

Vectors: TypeAlias = list[Tensor]


def each(function: Callable[..., Tensor], *vectors: Vectors) -> Vectors:
    """Applies `function` to the corresponding tensors of each parameter."""
    return [function(*tensors) for tensors in zip(*vectors, strict=True)]
