"""A group's exchange in a traced graph: one branch for each of its specs, with what they keep in variables."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import tensorflow as tf

from hvd_accordion.compression import CompressionSpec, Context, Dense, exchange
from hvd_accordion.ops import tensorflow as ops
from hvd_accordion.policy import assignment
from hvd_accordion.policy.assignment import Layer, SwitchableGroup
from hvd_accordion.tensorflow.exchange.driver import Driver
from hvd_accordion.tensorflow.exchange.planning import Plan
from hvd_accordion.tensorflow.exchange.rows import Rows
from hvd_accordion.tensorflow.exchange.state import State
from hvd_accordion.tensorflow.exchange.traffic import Traffic


class Exchanged(NamedTuple):
    """What a group's exchange leaves: a tensor or dict for each layer, and what the branch that ran has counted.

    residual: empty where the group has none.
    ok: whether all ranks' values were finite.
    """

    mean: list[tf.Tensor]
    residual: list[tf.Tensor]
    memory: list[dict[str, tf.Tensor]]
    ok: tf.Tensor
    nbytes: tf.Tensor


class Now(NamedTuple):
    """Where a step stands, as tensors: they are read once, before anything is exchanged."""

    step: tf.Tensor
    levels: tf.Tensor


class Channel:
    """Runs exchanges of groups: takes residuals and memory from variables, and puts back what is left."""

    def __init__(self, plan: Plan, state: State, rows: Rows, traffic: Traffic) -> None:
        self.plan, self.state, self.rows, self.traffic = plan, state, rows, traffic

    def now(self) -> Now:
        return Now(self.state.step.read_value(), self.state.levels.read_value())

    def run(self, group: SwitchableGroup, given: dict[str, Any], now: Now, driver: Driver) -> Exchanged:
        """The exchange of a group's gradients under the spec that holds now. Nothing is put back yet."""
        plan, state = self.plan, self.state
        rank, size = state.me
        grads = [dense_gradient(state, layer, given[layer.name]) for layer in group.layers]
        names = tuple(layer.name for layer in group.layers)
        context = Context(names, group.layers[0].dtype, now.step, plan.settings.seed, rank, size)
        branches = [partial(self._under, group, i, grads, context, driver) for i in range(len(group.specs))]
        if len(branches) == 1:
            return branches[0]()
        return tf.switch_case(self._index(group, now), branches)

    def _under(
        self, group: SwitchableGroup, index: int, grads: list[tf.Tensor], context: Context, driver: Driver
    ) -> Exchanged:
        """Under one of the group's specs."""
        spec, state = group.specs[index], self.state
        keys = [self.plan.numbers[name] for name in context.names]
        residual = [state.residual[key].read_value() for key in keys] if group.has_residual else None
        memory = [{name: self.rows.read(v) for name, v in state.memory.get(key, {}).items()} for key in keys]
        rounds = exchange(spec, ops, grads, residual, memory, context)
        done, ok, nbytes = driver.run(rounds, f"{group.name}.{index}.{spec.tag}")
        self.traffic.count(group, spec, nbytes)
        # what this spec does not use stays for the others
        kept = [{name: new.get(name, old[name]) for name in old} for old, new in zip(memory, done.memory, strict=True)]
        return Exchanged(done.mean, done.residual or [], kept, ok, tf.constant(nbytes, tf.float64))

    def _index(self, group: SwitchableGroup, now: Now) -> Any:
        """Which of the group's specs holds now."""
        plan, layer = self.plan, group.layers[0]
        controller, small = plan.controller, plan.settings.min_compress_numel
        dense = group.specs.index(Dense()) if Dense() in group.specs else 0

        def number(spec: CompressionSpec) -> Any:
            if not assignment.allowed(layer, spec, plan.size, small):
                return dense
            index = group.specs.index(spec)
            return index if spec.active(0) else tf.where(spec.active(now.step), index, dense)

        sides = assignment.sides(controller.policy[layer.name])
        numbers = [number(assignment.settled(layer, side, controller.chosen)) for side in sides]
        if len(numbers) == 1:
            return numbers[0]
        position = [x.name for x in controller.adaptive].index(layer.name)
        return tf.where(tf.equal(now.levels[position], 0), *numbers)

    def keep(self, results: list[tuple[SwitchableGroup, Exchanged]], ok: tf.Tensor) -> None:
        """Puts residuals and memory into their variables, if all values were finite: else the step leaves no trace."""
        state, numbers = self.state, self.plan.numbers
        kept: list[tuple[tf.Variable, tf.Tensor]] = []
        for group, done in results:
            for i, layer in enumerate(group.layers):
                key = numbers[layer.name]
                kept += [(state.residual[key], done.residual[i])] if done.residual else []
                kept += [(state.memory[key][name], value) for name, value in done.memory[i].items()]

        def keep() -> tf.Tensor:
            for into, value in kept:
                into.assign(value)
            return ok

        tf.cond(ok, keep, lambda: ok)


def dense_gradient(state: State, layer: Layer, grad: Any) -> tf.Tensor:
    """Dense; zeros where there is none."""
    if grad is None:
        # not what TensorFlow could tell to be constant: that it would send once and for all, as it simplifies the graph
        return tf.fill(layer.shape, tf.cast(state.step.read_value() < 0, layer.dtype))
    return tf.ensure_shape(tf.convert_to_tensor(grad), layer.shape)
