"""Bytes that each layer sends, as counted when its exchange was traced."""

from __future__ import annotations

from hvd_accordion.compression import CompressionSpec
from hvd_accordion.policy.layers import SwitchableGroup
from hvd_accordion.tensorflow.exchange.planning import Plan
from hvd_accordion.tensorflow.exchange.state import State


class Traffic:
    """Counts the bytes of each layer under each of its specs.

    Args:
        plain: the spec with the cost of Horovod's own compressor, where that is used.
    """

    def __init__(self, plan: Plan, state: State, plain: CompressionSpec | None) -> None:
        self.plan, self.state, self.plain = plan, state, plain
        self._counted: dict[tuple[str, CompressionSpec], float] = {}

    def clear(self) -> None:
        self._counted.clear()

    def count(self, group: SwitchableGroup, spec: CompressionSpec, nbytes: float) -> None:
        """Shares a group's bytes among its layers in proportion to what the spec predicts for each."""
        predicted = [spec.bytes_per_step(x.shape, x.dtype, self.plan.size) for x in group.layers]
        for layer, share in zip(group.layers, predicted, strict=True):
            self._counted[layer.name, spec] = nbytes * share / sum(predicted)

    def bytes_per_step(self) -> dict[str, float]:
        """Layer name -> bytes a step at the levels of now; of slices those of the last step."""
        plan, found = self.plan, {}
        specs = plan.controller.specs()
        for name, layer in plan.layers.items():
            spec = self.plain or specs[name]
            if plan.is_sparse(name):
                found[name] = float(self.state.slice_bytes[plan.numbers[name]])
            elif (name, spec) in self._counted:
                found[name] = self._counted[name, spec]
            else:
                found[name] = spec.bytes_per_step(layer.shape, layer.dtype, plan.size)
        return found
