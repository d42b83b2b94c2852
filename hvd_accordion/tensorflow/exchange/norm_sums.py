"""Sums over a window of the averaged gradients' sampled entries, in variables that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from functools import partial
from typing import Any

import tensorflow as tf

from hvd_accordion.ops import tensorflow as ops
from hvd_accordion.policy.layers import Layer
from hvd_accordion.tensorflow.exchange.planning import Plan
from hvd_accordion.tensorflow.exchange.rows import Rows
from hvd_accordion.tensorflow.exchange.state import State, wide_dtype
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.norm_window import NormWindow


class Sums(MutableMapping[str, tf.Tensor]):
    """Layer name -> value of its variable, in one of the state's dicts; setting a value assigns it."""

    def __init__(self, plan: Plan, state: State, rows: Rows, kind: str) -> None:
        self.plan, self.state, self.rows, self.kind = plan, state, rows, kind

    @property
    def _variables(self) -> dict[str, tf.Variable]:
        found: dict[str, tf.Variable] = getattr(self.state, self.kind)  # `State.forget` puts another dict there
        return found

    def __getitem__(self, name: str) -> tf.Tensor:
        return self.rows.read(self._variables[self.plan.numbers[name]])

    def __setitem__(self, name: str, value: tf.Tensor) -> None:
        self._variables[self.plan.numbers[name]].assign(value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("a graph may hold on to the variable: set it to zeros")

    def __iter__(self) -> Iterator[str]:
        return (name for name, key in self.plan.numbers.items() if key in self._variables)

    def __len__(self) -> int:
        return len(self._variables)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.plan.numbers[name] in self._variables

    def make(self, layer: Layer, value: tf.Tensor) -> None:
        """A variable for a layer that has none."""
        self._variables[self.plan.numbers[layer.name]] = self.rows.made(value, wide_dtype(layer.dtype))


class NormSums:
    """The windows of all that observe norms: each policy for its layers, the batch for all."""

    def __init__(self, plan: Plan, state: State, rows: Rows) -> None:
        self.plan, self.state, controller = plan, state, plan.controller
        window = partial(NormWindow, ops, seed=plan.settings.seed)
        self.layers, self.model = (Sums(plan, state, rows, kind) for kind in ("summed", "summed_whole"))
        self._of_layers = window(sample_size=controller.levels.sample_size, summed=self.layers)
        self._of_model = window(sample_size=lambda _, count: controller.batch.sample_size(count), summed=self.model)

    @property
    def controller(self) -> Controller:
        return self.plan.controller

    def make(self, layer: Layer) -> None:
        """Variables for a layer whose norm counts, where they are not there yet. Eagerly only."""
        if layer in self.controller.levels.adaptive and layer.name not in self.layers:
            self._make(layer, self._of_layers, self.layers)
        if self.controller.batch.adapts and layer.name not in self.model:
            self._make(layer, self._of_model, self.model)

    @staticmethod
    def _make(layer: Layer, window: NormWindow, sums: Sums) -> None:
        # the window keeps which entries it samples: a graph must find them made
        sample = window.sample(layer.name, tf.zeros(layer.numel, wide_dtype(layer.dtype)))
        sums.make(layer, tf.zeros_like(sample))

    @property
    def counted(self) -> list[str]:
        """Layers whose norms may count."""
        controller = self.controller
        return list(self.plan.layers) if controller.batch.adapts else [x.name for x in controller.levels.adaptive]

    def add(self, means: dict[str, tf.Tensor], ok: tf.Tensor, steps: Any) -> None:
        """Adds averaged gradients, as often as each stands for a step, where all ranks' values were finite."""
        controller, state = self.controller, self.state
        measured = state.measured.read_value()
        for i, policy in enumerate(controller.levels.observers):
            mine = [x.name for x in controller.levels.adaptive if controller.policy[x.name] is policy]
            self._add(self._of_layers, mine, means, ok & measured[i], steps)
        if controller.batch.adapts:
            self._add(self._of_model, means, means, ok & state.measures_whole.read_value(), steps)

    @staticmethod
    def _add(
        window: NormWindow, names: Iterable[str], means: dict[str, tf.Tensor], counts: tf.Tensor, steps: Any
    ) -> None:
        mine = {name: means[name] for name in names if name in means and name in window.summed}

        def add() -> tf.Tensor:
            window.add(mine, weight=steps)
            return counts

        tf.cond(counts, add, lambda: counts)
