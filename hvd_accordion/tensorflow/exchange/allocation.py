"""The variables that exchanges need: made with a layer, dropped when no exchange can use them any more."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from hvd_accordion.compression import CompressionSpec
from hvd_accordion.compression.sharing import Sharing
from hvd_accordion.policy.assignment import memory_sharing
from hvd_accordion.policy.layers import Layer, SwitchableGroup
from hvd_accordion.tensorflow.exchange.norm_sums import NormSums
from hvd_accordion.tensorflow.exchange.planning import Plan
from hvd_accordion.tensorflow.exchange.rows import Rows, initial_memory
from hvd_accordion.tensorflow.exchange.state import State, variable, wide_dtype


class Allocation:
    """Makes and drops the variables of a state."""

    def __init__(self, plan: Plan, state: State, rows: Rows, norms: NormSums) -> None:
        self.plan, self.state, self.rows, self.norms = plan, state, rows, norms
        state.declared.start = self._start

    def add(self, layer: Layer) -> None:
        """Of a layer that was just added."""
        self.state.slice_bytes[self.plan.add(layer)] = variable(0.0, tf.float64)
        self.make(layer)

    def make(self, layer: Layer) -> None:
        """What is not there yet of all that exchanges and norms of the layer may need."""
        self._keep(layer, self.plan.all_specs(layer))
        self.norms.make(layer)

    def _keep(self, layer: Layer, specs: tuple[CompressionSpec, ...]) -> None:
        key, wide, state = self.plan.numbers[layer.name], wide_dtype(layer.dtype), self.state
        if self.plan.size == 1:
            return
        if SwitchableGroup("", specs, (layer,)).has_residual and key not in state.residual:
            state.residual[key] = variable(tf.zeros(layer.shape, wide), wide)
        if state.memory_of(key):
            return
        made = {part: self.rows.made(value, wide) for part, value in self._initial_memory(layer, specs).items()}
        sharing = memory_sharing(layer.name, self.plan.controller.policy[layer.name])
        own = {part: v for part, v in made.items() if sharing[part] is not Sharing.SHARED}
        if shared := {part: v for part, v in made.items() if part not in own}:
            state.memory[key] = shared
        if own:
            state.own[key] = own
            state.declared.sharing |= {(key, part): sharing[part] for part in own}

    def _initial_memory(self, layer: Layer, specs: Sequence[CompressionSpec]) -> dict[str, tf.Tensor]:
        return initial_memory(specs, layer, wide_dtype(layer.dtype), self.plan.settings.seed)

    def refit(self) -> list[str]:
        """Gives restored variables the sizes of today's settings. Returns what was not taken up whole, in words."""
        return self.rows.refit(self.state, self.plan.numbers, self._fresh)

    def _fresh(self, name: str) -> dict[str, tf.Tensor]:
        """The memory of a layer at the start."""
        layer = self.plan.layers[name]
        return self._initial_memory(layer, self.plan.all_specs(layer))

    def _start(self, key: str) -> dict[str, tf.Tensor]:
        """The same, by the layer's number."""
        return self._fresh(next(name for name, number in self.plan.numbers.items() if number == key))

    def prune(self, traced: bool) -> None:
        """Keeps what layers need under what their Auto chose, and nothing else; everything if a graph was `traced`."""
        plan, state = self.plan, self.state
        for name in plan.controller.levels.chosen:
            if plan.is_sparse(name):
                continue
            layer, key = plan.layers[name], plan.numbers[name]
            specs = plan.reachable_specs(layer)
            self._keep(layer, specs)
            if traced:  # a graph may hold on to the rest
                continue
            if not SwitchableGroup("", specs, (layer,)).has_residual:
                state.forget(key, "residual")
            if not any(spec.lossy for spec in specs):
                state.forget(key, "memory", "own")
