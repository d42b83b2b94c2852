"""Sums over a window of the averaged gradients' sampled entries, in variables."""

from __future__ import annotations

import tensorflow as tf

from hvd_accordion.ops import tensorflow as ops
from hvd_accordion.policy import norm_sampling
from hvd_accordion.policy.assignment import Layer
from hvd_accordion.tensorflow.exchange.planning import Plan
from hvd_accordion.tensorflow.exchange.rows import Rows
from hvd_accordion.tensorflow.exchange.state import State, wide_dtype
from hvd_accordion.training.controller import Controller


class NormSums:
    """Makes the sums and adds to them."""

    def __init__(self, plan: Plan, state: State, rows: Rows) -> None:
        self.plan, self.state, self.rows = plan, state, rows
        # layer name, number of its entries that are sampled -> which; missing: all
        self._entries: dict[tuple[str, int], tf.Tensor] = {}

    @property
    def controller(self) -> Controller:
        return self.plan.controller

    def make(self, layer: Layer) -> None:
        """Variables for a layer whose norm counts, where they are not there yet."""
        key, state, controller = self.plan.numbers[layer.name], self.state, self.controller
        if layer in controller.adaptive and key not in state.summed:
            state.summed[key] = self._made(layer, controller.watched(layer.name, layer.numel))
        if controller.batch is not None and key not in state.summed_whole:
            state.summed_whole[key] = self._made(layer, controller.watched_of_whole(layer.numel))

    def _made(self, layer: Layer, size: int) -> tf.Variable:
        wide = wide_dtype(layer.dtype)
        summed = self.rows.made(tf.zeros(size, wide), wide)
        if size < layer.numel and (layer.name, size) not in self._entries:
            seed, count = self.plan.settings.seed, layer.numel
            self._entries[layer.name, size] = norm_sampling.entries(ops, layer.name, count, size, seed, summed)
        return summed

    @property
    def counted(self) -> list[str]:
        """Layers whose norms may count."""
        controller = self.controller
        return list(self.plan.layers) if controller.batch is not None else [x.name for x in controller.adaptive]

    def add(self, means: dict[str, tf.Tensor], ok: tf.Tensor, steps: tf.Tensor | int) -> None:
        """Adds averaged gradients, as often as each stands for a step, where all ranks' values were finite."""
        controller, state, numbers = self.controller, self.state, self.plan.numbers
        measured = state.measured.read_value()
        for i, accordion in enumerate(controller.accordions):
            mine = [x.name for x in controller.adaptive if controller.policy[x.name] is accordion]
            sums = {name: state.summed[numbers[name]] for name in mine if numbers[name] in state.summed}
            self._add(sums, means, ok & measured[i], steps)
        if controller.batch is not None:
            whole = {name: state.summed_whole[numbers[name]] for name in means if numbers[name] in state.summed_whole}
            self._add(whole, means, ok & state.measures_whole.read_value(), steps)

    def _add(
        self, sums: dict[str, tf.Variable], means: dict[str, tf.Tensor], counts: tf.Tensor, steps: tf.Tensor | int
    ) -> None:
        def add() -> tf.Tensor:
            for name, summed in sums.items():
                if name in means:
                    seen = tf.cast(self._sampled(name, means[name], self.rows.of(summed)), summed.dtype)
                    summed.assign_add(seen * tf.cast(steps, summed.dtype))
            return counts

        tf.cond(counts, add, lambda: counts)

    def _sampled(self, name: str, mean: tf.Tensor, size: int) -> tf.Tensor:
        """The entries of a layer that its norm is estimated from, as a vector."""
        flat = tf.reshape(mean, (-1,))
        return ops.take(flat, self._entries[name, size]) if (name, size) in self._entries else flat
