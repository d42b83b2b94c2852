"""Which layers are exchanged, which kind of gradients they have, and in which groups they travel."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import tensorflow as tf

from hvd_accordion.compression import CompressionSpec
from hvd_accordion.policy import assignment, grouping
from hvd_accordion.policy.layers import Layer, SwitchableGroup
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.settings import Settings


class Kind(IntEnum):
    """Of a layer's gradients; where ranks have different ones the largest counts."""

    NONE, SLICES, DENSE = range(3)


def kind_of(grad: Any, sparse_as_dense: bool) -> Kind:
    if grad is None:
        return Kind.NONE
    return Kind.SLICES if isinstance(grad, tf.IndexedSlices) and not sparse_as_dense else Kind.DENSE


class Plan:
    """The layers of an exchange, equal on all ranks.

    Attributes:
        numbers: layer name -> its number in the state, as text.
        kinds: layer name -> kind of its gradients, as agreed on; missing before that.
        group_of: layer name -> index of its group, where the user gave lists of variables.
    """

    def __init__(self, controller: Controller, settings: Settings) -> None:
        self.controller, self.settings = controller, settings
        self.numbers: dict[str, str] = {}
        self.kinds: dict[str, Kind] = {}
        self.group_of: dict[str, int] = {}

    @property
    def size(self) -> int:
        """Ranks that exchange."""
        return self.controller.world_size

    @property
    def layers(self) -> dict[str, Layer]:
        return self.controller.layers

    def add(self, layer: Layer) -> str:
        """The number of a new layer."""
        self.numbers[layer.name] = str(len(self.numbers))
        return self.numbers[layer.name]

    def is_sparse(self, name: str) -> bool:
        """Whether the layer's gradients are IndexedSlices."""
        return self.kinds.get(name) == Kind.SLICES

    def sparse(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.is_sparse(name)]

    def dense(self, names: Iterable[str]) -> list[Layer]:
        """Layers whose gradients are neither missing nor slices, in the order of the variables."""
        among = set(names)
        layers = [layer for name, layer in self.layers.items() if name in among]
        return [layer for layer in layers if self.kinds[layer.name] == Kind.DENSE and layer.numel]

    def runs(self, layers: list[Layer]) -> list[list[Layer]]:
        """The layers cut up as the user's `groups` say; in one run by default."""
        groups = self.settings.groups
        if isinstance(groups, int) and groups > 0:
            return grouping.split(layers, groups)
        if isinstance(groups, list):
            runs: dict[Any, list[Layer]] = {}
            for layer in layers:
                runs.setdefault(self.group_of.get(layer.name, layer.name), []).append(layer)
            return list(runs.values())
        return [layers[::-1]]  # in the order of backward

    def groups(self, names: Iterable[str]) -> list[SwitchableGroup]:
        """The groups in which these layers' dense gradients travel."""
        controller, small = self.controller, self.settings.min_compress_numel
        limit = None if self.settings.groups else grouping.BUCKET_BYTES
        runs = self.runs(self.dense(names))
        return grouping.parts(runs, controller.policy, self.size, small, limit)

    def reachable_specs(self, layer: Layer) -> tuple[CompressionSpec, ...]:
        """All that the layer may travel under, as its Auto has chosen."""
        policy, small = self.controller.policy[layer.name], self.settings.min_compress_numel
        return tuple(assignment.reachable_specs(layer, policy, self.size, small))

    def all_specs(self, layer: Layer) -> tuple[CompressionSpec, ...]:
        """All that the layer may travel under, whatever its Auto will choose."""
        policy, small = self.controller.policy[layer.name], self.settings.min_compress_numel
        found = assignment.reachable_specs(layer, policy, self.size, small)
        return tuple(dict.fromkeys([*found, *assignment.auto_specs(layer, policy, self.size, small)]))

    def check(self, layer: Layer, grad: Any) -> None:
        """ValueError unless the gradient is what its layer was planned for."""
        if grad is None:
            return
        sparse = isinstance(grad, tf.IndexedSlices)
        if self.is_sparse(layer.name) and not sparse:
            raise ValueError(f"the gradient of {layer.name} is dense but was IndexedSlices at the first step")
        shape = tf.TensorShape(layer.shape) if sparse else grad.shape
        if grad.dtype.name != layer.dtype or not shape.is_compatible_with(layer.shape):
            raise ValueError(
                f"the gradient of {layer.name} must be {layer.dtype} {layer.shape} as the variable is, "
                f"got {grad.dtype.name} {tuple(shape)}"
            )
