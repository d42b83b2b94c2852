"""A group's exchange in a traced graph: one branch for each of its specs, over variables that all of them share."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import tensorflow as tf

from hvd_accordion.compression import CompressionSpec, Dense
from hvd_accordion.ops import tensorflow as ops
from hvd_accordion.policy import assignment
from hvd_accordion.policy.layers import Group, Layer, SwitchableGroup
from hvd_accordion.tensorflow.exchange.driver import Driver
from hvd_accordion.tensorflow.exchange.planning import Plan
from hvd_accordion.tensorflow.exchange.rows import Rows
from hvd_accordion.tensorflow.exchange.state import State
from hvd_accordion.tensorflow.exchange.traffic import Traffic
from hvd_accordion.training.channel import Channel


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


class LevelSwitch:
    """Runs exchanges of groups, with residuals and memory from the state's variables."""

    def __init__(self, plan: Plan, state: State, rows: Rows, traffic: Traffic) -> None:
        self.plan, self.state, self.rows, self.traffic = plan, state, rows, traffic

    def now(self) -> Now:
        return Now(self.state.step.read_value(), self.state.levels.read_value())

    def run(self, group: SwitchableGroup, given: dict[str, Any], now: Now, driver: Driver) -> Exchanged:
        """The exchange of a group's gradients under the spec that holds now. Nothing is put back yet."""
        grads = [dense_gradient(self.state, layer, given[layer.name]) for layer in group.layers]
        branches = [partial(self._under, group, i, grads, now.step, driver) for i in range(len(group.specs))]
        done: Exchanged = branches[0]() if len(branches) == 1 else tf.switch_case(self._index(group, now), branches)
        return done

    def _under(
        self, group: SwitchableGroup, index: int, grads: list[tf.Tensor], step: tf.Tensor, driver: Driver
    ) -> Exchanged:
        """Under one of the group's specs."""
        spec, names = group.specs[index], [layer.name for layer in group.layers]
        one = Group(f"{group.name}.{index}.{spec.tag}", spec, group.layers, group.has_residual)
        channel = self._channel(one)
        before = dict(channel.memory)
        done, ok, nbytes = driver.run(channel.exchange(one, grads, step), one.name)
        self.traffic.count(group, spec, nbytes)
        residual = [channel.residual[name] for name in names] if group.has_residual else []
        # what this spec does not use stays for the others
        kept = [{part: channel.memory[name].get(part, old) for part, old in before[name].items()} for name in names]
        return Exchanged(done.mean, residual, kept, ok, tf.constant(nbytes, tf.float64))

    def _channel(self, group: Group) -> Channel:
        """With the values of the state's variables: what an exchange leaves must get back there."""
        state, (rank, size) = self.state, self.state.me
        keys = {layer.name: self.plan.numbers[layer.name] for layer in group.layers}
        held = keys if group.has_residual else {}
        residual = {name: state.residual[key].read_value() for name, key in held.items()}
        memory = {
            name: {part: self.rows.read(v) for part, v in state.memory_of(key).items()} for name, key in keys.items()
        }
        settings = self.plan.settings
        decay = settings.residual_decay
        return Channel(ops, settings.seed, rank, size, residual, memory, residual_decay=decay)

    def _index(self, group: SwitchableGroup, now: Now) -> Any:
        """Which of the group's specs holds now."""
        plan, layer = self.plan, group.layers[0]
        controller, small = plan.controller, plan.settings.min_compress_numel
        dense = group.specs.index(Dense()) if Dense() in group.specs else 0

        def number(spec: CompressionSpec) -> Any:
            if not assignment.is_compressible(layer, spec, plan.size, small):
                return dense
            index = group.specs.index(spec)
            return index if spec.active(0) else tf.where(spec.active(now.step), index, dense)

        numbers = [number(spec) for spec in controller.policy[layer.name].specs(layer.name)]
        if len(numbers) == 1:
            return numbers[0]
        position = [x.name for x in controller.levels.adaptive].index(layer.name)
        return tf.gather(tf.stack(numbers), now.levels[position])

    def keep(self, results: list[tuple[SwitchableGroup, Exchanged]], ok: tf.Tensor) -> None:
        """Puts residuals and memory into their variables, if all values were finite: else the step leaves no trace."""
        state, numbers = self.state, self.plan.numbers
        kept: list[tuple[tf.Variable, tf.Tensor]] = []
        for group, done in results:
            for i, layer in enumerate(group.layers):
                key = numbers[layer.name]
                kept += [(state.residual[key], done.residual[i])] if done.residual else []
                kept += [(state.memory_of(key)[name], value) for name, value in done.memory[i].items()]

        def keep() -> tf.Tensor:
            for into, value in kept:
                into.assign(value)
            return ok

        tf.cond(ok, keep, lambda: ok)


def dense_gradient(state: State, layer: Layer, grad: Any) -> tf.Tensor:
    """Dense; zeros where there is none."""
    if grad is None:
        # nothing that TensorFlow finds to be constant: it would run the collective once, when it optimises the graph
        return tf.fill(layer.shape, tf.cast(state.step.read_value() < 0, layer.dtype))
    return tf.ensure_shape(tf.convert_to_tensor(grad), layer.shape)
