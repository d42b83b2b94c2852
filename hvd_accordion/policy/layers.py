"""Layers: one parameter tensor each, and the groups of them that are exchanged together."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_accordion.compression import CompressionSpec
from hvd_accordion.compression.base import ITEMSIZE, size


@dataclass(frozen=True)
class Layer:
    """One parameter tensor, as all ranks must know it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str = "cpu"

    @property
    def numel(self) -> int:
        return size(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Group:
    """Layers that are exchanged together: one spec, one dtype, one device, all with a residual or all without."""

    name: str
    spec: CompressionSpec
    layers: tuple[Layer, ...]
    has_residual: bool


@dataclass(frozen=True)
class SwitchableGroup:
    """Layers that are exchanged together in a traced graph, which holds an exchange for each of `specs`."""

    name: str
    specs: tuple[CompressionSpec, ...]
    layers: tuple[Layer, ...]

    @property
    def has_residual(self) -> bool:
        return any(spec.lossy and spec.error_feedback for spec in self.specs)
