"""Exchanges TensorFlow gradients: agreement before the first exchange, then a graph with a branch for each level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tensorflow as tf

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.compression import CompressionSpec
from hvd_accordion.policy.auto import Advice, advise
from hvd_accordion.policy.layers import Layer
from hvd_accordion.tensorflow.exchange import sparse
from hvd_accordion.tensorflow.exchange.allocation import Allocation
from hvd_accordion.tensorflow.exchange.calibration import measured
from hvd_accordion.tensorflow.exchange.configuration import Configuration
from hvd_accordion.tensorflow.exchange.controller_bridge import ControllerBridge
from hvd_accordion.tensorflow.exchange.driver import Driver
from hvd_accordion.tensorflow.exchange.level_switch import Exchanged, LevelSwitch
from hvd_accordion.tensorflow.exchange.negotiation import Names, Negotiation
from hvd_accordion.tensorflow.exchange.norm_sums import NormSums
from hvd_accordion.tensorflow.exchange.plain import Averaged, alone, plain
from hvd_accordion.tensorflow.exchange.planning import Kind, Plan
from hvd_accordion.tensorflow.exchange.rows import Rows
from hvd_accordion.tensorflow.exchange.state import State, outside
from hvd_accordion.tensorflow.exchange.traffic import Traffic
from hvd_accordion.tensorflow.transport import HorovodTransport, Sum
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.settings import Settings, plain_spec


class Engine:
    """Exchanges the gradients of named layers.

    Args:
        compressor: Horovod's own where gradients travel uncompressed, else None.
        prefix: of all names of collectives; unique to an engine, equal on all ranks.
    """

    def __init__(
        self,
        controller: Controller,
        state: State,
        settings: Settings,
        compressor: Any,
        transport: HorovodTransport,
        prefix: Prefix,
    ) -> None:
        self.controller, self.state, self.settings = controller, state, settings
        self.compressor, self.transport, self.prefix = compressor, transport, prefix
        rows, self._spec = Rows(), None if compressor is None else plain_spec(compressor)
        self.plan = Plan(controller, settings)
        self.norms = NormSums(self.plan, state, rows)
        self.allocation = Allocation(self.plan, state, rows, self.norms)
        self.traffic = Traffic(self.plan, state, self._spec)
        self.switch = LevelSwitch(self.plan, state, rows, self.traffic)
        self.negotiation = Negotiation(self.plan, self.transport, prefix)
        refit = self.allocation.refit
        self.bridge = ControllerBridge(controller, state, self.plan.numbers, prefix, self.transport, refit)
        self.advice: Advice | None = None
        self._functions: dict[Names, Any] = {}

    def add(self, layers: Sequence[Layer]) -> None:
        """Makes variables for layers that the controller already has."""
        for layer in layers:
            self.allocation.add(layer)
        self.bridge.begin()

    def move(self, configuration: Configuration, transport: HorovodTransport) -> None:
        """Among other ranks, as they are now: all is planned and agreed on anew. Sends nothing."""
        first = self.state.me[0] == 0
        self.state.move(transport.rank, transport.size)
        moved = first != (transport.rank == 0)
        logger = configuration.start_logger(self.controller.policy, transport) if moved else self.controller.logger
        self.controller.move(transport.size, logger)
        self.plan.kinds.clear()
        self.traffic.clear()
        self.negotiation.clear()
        self._functions.clear()
        for layer in self.plan.layers.values():
            self.allocation.make(layer)
        self.bridge.begin()

    # before the first exchange

    def agree(
        self, names: Names, grads: Sequence[Any], described: Callable[[], dict[str, str]], traced: bool = False
    ) -> None:
        """Compares the ranks' settings, and agrees on which gradients there are and of which kind; see `Negotiation`."""
        if not self.negotiation.is_due(names, grads):
            return
        begun = self.negotiation.begun
        with tf.init_scope():
            undecided = self.negotiation.agree(names, grads, described(), self._undecided, traced)
            for name in self.plan.sparse(names):  # a table's residual would be as large as the table, and never used
                self.state.forget(self.plan.numbers[name])
            if undecided:
                self._choose()
        if self.plan.size > 1:
            outside(lambda: self.allocation.prune(traced=begun))

    def _undecided(self) -> bool:
        self.bridge.sync()  # what was restored may hold an Auto's choice
        return self.controller.undecided and self.plan.size > 1

    def _choose(self) -> None:
        """An Auto decides, on all ranks alike."""
        layers = [x for name, x in self.plan.layers.items() if not self.plan.is_sparse(name)]
        choices = self.controller.levels.candidates()
        self.advice = advise(layers, choices, measured(layers, choices, str(self.prefix), self.transport))
        self.controller.choose({layer.name: layer.chosen for layer in self.advice})
        self.bridge.begin()

    # a step

    def __call__(self, names: Names, grads: Sequence[Any], learning_rate: Any, steps: Any = 1) -> list[Any]:
        """The averaged gradients; None where no rank has one. `steps`: micro-batches of which they are the means.

        ValueError where one is not what its layer was planned for.
        """
        for name, grad in zip(names, grads, strict=True):
            self.plan.check(self.plan.layers[name], grad)
        if not tf.executing_eagerly():
            return self._reduce(names, grads, learning_rate, steps)
        function = self._functions.get(names)
        if function is None:  # as one graph: its groups run side by side
            function = tf.function(partial(self._reduce, names), reduce_retracing=True, autograph=False)
            self._functions[names] = function
        return function(grads, tf.convert_to_tensor(learning_rate), tf.cast(steps, tf.int64))

    def _reduce(self, names: Names, grads: Sequence[Any], learning_rate: Any, steps: Any) -> list[Any]:
        given = {name: g for name, g in zip(names, grads, strict=True) if self.plan.kinds[name] != Kind.NONE}
        prefix = f"{self.prefix}.{self.negotiation.number(names)}"
        if self.plan.size == 1:
            means, sent = alone(self.plan, self.state, self.norms, given, steps)
        elif self._spec is not None:
            means, sent = self._plain(given, self._spec, prefix)
        else:
            means, sent = self._compressed(given, steps, prefix)
        self.bridge.tick(sent, learning_rate, steps)
        return [means.get(name, given.get(name)) for name in names]  # what is empty stays as it is

    def _plain(self, given: dict[str, Any], spec: CompressionSpec, prefix: str) -> Averaged:
        done = plain(self.plan, self.state, given, self.compressor, spec, prefix, self.transport)
        gathered = self._slices(given, prefix)
        joined = {name: its.slices for name, its in gathered.items()}
        return Averaged({**done.means, **joined}, tf.add_n([done.nbytes, *(its.nbytes for its in gathered.values())]))

    def _compressed(self, given: dict[str, Any], steps: Any, prefix: str) -> Averaged:
        plan, size = self.plan, self.plan.size
        self.state.claim()
        now, driver = self.switch.now(), Driver(prefix, self.transport, self.settings.scales(size))
        results = [(group, self.switch.run(group, given, now, driver)) for group in plan.groups(given)]
        gathered = self._slices(given, prefix)
        parts: list[Exchanged | sparse.Gathered] = [*(done for _, done in results), *gathered.values()]
        ok = tf.reduce_all(tf.stack([tf.constant(True), *(part.ok for part in parts)]))
        self.switch.keep(results, ok)
        means = {x.name: mean for group, done in results for x, mean in zip(group.layers, done.mean, strict=True)}
        self.norms.add(means, ok, steps)
        if self.settings.op == Sum:
            means = {name: mean * size for name, mean in means.items()}
        means = {name: tf.cast(mean, plan.layers[name].dtype) for name, mean in means.items()}
        nbytes = tf.add_n([tf.constant(0.0, tf.float64), *(part.nbytes for part in parts)])
        return Averaged({**means, **{name: its.slices for name, its in gathered.items()}}, nbytes)

    def _slices(self, given: dict[str, Any], prefix: str) -> dict[str, sparse.Gathered]:
        found = {}
        for name in self.plan.sparse(given):
            key = self.plan.numbers[name]
            at, summed = f"{prefix}.slices.{key}", self.settings.op == Sum
            found[name] = sparse.gather(self.plan.layers[name], given[name], at, self.transport, summed)
            self.state.slice_bytes[key].assign(found[name].nbytes)
        return found


def assembled(
    layers: Sequence[Layer],
    policy: dict[str, Any],
    configuration: Configuration,
    transport: HorovodTransport,
    prefix: Prefix,
) -> Engine:
    """An engine for the first layers, with a new state."""
    settings, logger = configuration.settings, configuration.start_logger(policy, transport)
    steps, small = settings.steps_per_epoch, settings.min_compress_numel
    controller = Controller(layers, policy, transport.size, steps, logger, small, settings.batch_size)
    state = State(transport.rank, transport.size)
    return Engine(controller, state, settings, configuration.compressor, transport, prefix)
