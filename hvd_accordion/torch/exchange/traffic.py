"""What each layer sent at its last exchange."""

from __future__ import annotations

from collections.abc import Mapping

from hvd_accordion.compression import CompressionSpec, Dense
from hvd_accordion.policy.layers import Group, Layer


class Traffic:
    """Bytes of each layer, counted a group at a time."""

    def __init__(self) -> None:
        self.sent: dict[str, tuple[CompressionSpec | None, float]] = {}  # None is the spec of a sparse layer
        self._counted: dict[str, float] = {}  # by group

    def replan(self) -> None:
        """Groups may have other layers from now on."""
        self._counted = {}

    def count(self, group: Group, nbytes: float, world_size: int) -> None:
        """Shares a group's bytes among its layers as their own specs would have it."""
        if self._counted.get(group.name) == nbytes:
            return
        self._counted[group.name] = nbytes
        predicted = [group.spec.bytes_per_step(x.shape, x.dtype, world_size) for x in group.layers]
        for layer, part in zip(group.layers, predicted, strict=True):
            self.sent[layer.name] = group.spec, nbytes * part / sum(predicted)

    def per_step(
        self, layers: Mapping[str, Layer], specs: Mapping[str, CompressionSpec], world_size: int
    ) -> dict[str, float]:
        """Bytes of each layer a step: as counted at the last, or what the spec says where that is a new one."""
        found = {}
        for name, layer in layers.items():
            spec, nbytes = self.sent.get(name, (Dense(), 0.0))
            counted = name in self.sent and spec in (None, specs[name])
            found[name] = nbytes if counted else specs[name].bytes_per_step(layer.shape, layer.dtype, world_size)
        return found
