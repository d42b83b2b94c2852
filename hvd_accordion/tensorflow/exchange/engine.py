"""The way of a TensorFlow gradient: through its part's exchange, traced into the graph for each of its levels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.compression import CompressionSpec, Context, Dense, exchange
from hvd_accordion.ops import tensorflow as ops
from hvd_accordion.policy import assignment, norm_sampling
from hvd_accordion.policy.assignment import Layer, SwitchableGroup
from hvd_accordion.policy.auto import Advice, advise
from hvd_accordion.tensorflow.exchange import sparse
from hvd_accordion.tensorflow.exchange.agreement import largest, require_equal
from hvd_accordion.tensorflow.exchange.calibration import measured
from hvd_accordion.tensorflow.exchange.controller_bridge import ControllerBridge
from hvd_accordion.tensorflow.exchange.driver import Driver
from hvd_accordion.tensorflow.exchange.rows import Rows, initial_memory
from hvd_accordion.tensorflow.exchange.state import State, outside, variable
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.settings import Settings, plain_spec

NONE, SLICES, DENSE = range(3)  # kinds of gradients; where ranks have different ones the last of these counts


def wide_of(layer: Layer) -> tf.DType:
    """What residuals and sums are kept in."""
    return tf.float64 if layer.dtype == "float64" else tf.float32


class Engine:
    """Exchanges the gradients of named layers.

    Args:
        plain: Horovod's own compressor where nothing else is asked for, else None.
        prefix: of all names of collectives; unique to an engine, equal on all ranks.
    """

    def __init__(self, controller: Controller, state: State, settings: Settings, plain: Any, prefix: Prefix) -> None:
        self.controller, self.state, self.settings = controller, state, settings
        self.plain, self.prefix = plain, prefix
        self.process_set = settings.process_set
        self.rank, self.size = state.me
        self.numbers: dict[str, str] = {}  # of a layer in the state
        self.group_of: dict[str, int] = {}  # where the user gave groups of variables
        self.entries: dict[tuple[str, int], tf.Tensor] = {}  # of a layer, if so many are watched: which; missing: all
        self.kinds: dict[str, int] = {}
        self.traffic: dict[tuple[str, CompressionSpec], float] = {}  # of a layer under a spec, as traced
        self.rows = Rows()
        self.clock = ControllerBridge(controller, state, self.numbers, prefix, self.process_set, self.refit)
        self.advice: Advice | None = None
        self._signatures: dict[tuple[str, ...], int] = {}
        self._numbers = itertools.count()
        self._functions: dict[tuple[str, ...], Any] = {}

    def add(self, layers: Sequence[Layer]) -> None:
        """Makes variables for layers that the controller knows."""
        for layer in layers:
            key = self.numbers[layer.name] = str(len(self.numbers))
            self.state.slice_bytes[key] = variable(0.0, tf.float64)
            self._room(layer)
        self.clock.begin()

    def move(self, logger: Any) -> None:
        """Among other ranks, at the place that the state knows: all is planned and agreed on anew. Sends nothing."""
        self.rank, self.size = self.state.me
        self.controller.move(self.size, logger)
        for known in (self.kinds, self.traffic, self._signatures, self._functions):
            known.clear()
        self._numbers = itertools.count()
        for layer in self.controller.layers.values():
            self._room(layer)
        self.clock.begin()

    def _room(self, layer: Layer) -> None:
        """Makes what is kept of the layer, where it is not there yet."""
        key, state, controller = self.numbers[layer.name], self.state, self.controller
        self._keep(layer, self._specs(layer))
        if layer.name in self.clock.adaptive and key not in state.summed:
            state.summed[key] = self._watch(layer, controller.watched(layer.name, layer.numel))
        if controller.batch is not None and key not in state.summed_whole:
            state.summed_whole[key] = self._watch(layer, controller.watched_of_whole(layer.numel))

    def _watch(self, layer: Layer, size: int) -> tf.Variable:
        """Room for the sum of so many of the layer's entries."""
        summed = self.rows.made(tf.zeros(size, wide_of(layer)), wide_of(layer))
        if size < layer.numel and (layer.name, size) not in self.entries:
            seed, count = self.settings.seed, layer.numel
            self.entries[layer.name, size] = norm_sampling.entries(ops, layer.name, count, size, seed, summed)
        return summed

    def _keep(self, layer: Layer, specs: tuple[CompressionSpec, ...]) -> None:
        """Makes what exchanges under these specs keep of the layer, where it is not there yet."""
        key, wide, state = self.numbers[layer.name], wide_of(layer), self.state
        if self.size == 1:
            return
        if SwitchableGroup("", specs, (layer,)).has_residual and key not in state.residual:
            state.residual[key] = variable(tf.zeros(layer.shape, wide), wide)
        if key in state.memory:
            return
        memory = self._initial_memory(layer, specs)
        if memory:
            state.memory[key] = {part: self.rows.made(value, wide) for part, value in memory.items()}

    def _initial_memory(self, layer: Layer, specs: Sequence[CompressionSpec]) -> dict[str, tf.Tensor]:
        return initial_memory(specs, layer, wide_of(layer), self.settings.seed)

    def refit(self) -> list[str]:
        """Gives what was restored from other settings the sizes of now; returns of what it took up a part, in words."""
        layers = self.controller.layers
        return self.rows.refit(
            self.state, self.numbers, lambda name: self._initial_memory(layers[name], self._specs(layers[name]))
        )

    def _specs(self, layer: Layer) -> tuple[CompressionSpec, ...]:
        """All that the layer may travel under, whatever an Auto will choose."""
        policy, small = self.controller.policy[layer.name], self.settings.min_compress_numel
        found = assignment.candidates(layer, policy, self.size, small)
        return tuple(dict.fromkeys([*found, *assignment.choices(layer, policy, self.size, small)]))

    # before the first exchange

    def agree(
        self,
        names: tuple[str, ...],
        grads: Sequence[Any],
        described: Callable[[], dict[str, str]],
        traced: bool = False,
    ) -> None:
        """Compares the ranks' settings, and settles which gradients there are and of which kind.

        Once for each `names`, and again where a gradient appears that no rank had: on all ranks at the same step.

        Args:
            traced: a graph has no place for a mean where this rank has no gradient.

        Raises ValueError, on all ranks alike, where settings differ, or a graph has no place for a mean.
        """
        new = any(self.kinds.get(name, NONE) == NONE and g is not None for name, g in zip(names, grads, strict=True))
        if names in self._signatures and not new:
            return
        number = next(self._numbers)
        with tf.init_scope():
            require_equal({**described(), "exchanged": ", ".join(names)}, f"{self.prefix}.{number}", self.process_set)
            dense = self.settings.sparse_as_dense
            mine = [
                NONE if g is None else SLICES if isinstance(g, tf.IndexedSlices) and not dense else DENSE for g in grads
            ]
            self.clock.look()  # what was restored may hold an Auto's choice
            undecided = int(self.controller.undecided and self.size > 1)
            lacking = [int(traced and kind == NONE) for kind in mine]
            *told, undecided = largest([*mine, *lacking, undecided], f"{self.prefix}.{number}.kinds", self.process_set)
            for name, kind, lacks in zip(names, told, told[len(names) :], strict=False):
                if kind != NONE and lacks:
                    raise ValueError(
                        f"the gradient of {name} is missing on some ranks but not on all: in elastic training, inside of "
                        "tf.function, all ranks must have the same gradients"
                    )
                self.kinds[name] = max(kind, self.kinds.get(name, NONE))
                if self.kinds[name] == SLICES:  # a table's residual would be as large as the table, and never used
                    self.state.forget(self.numbers[name])
            if undecided:
                self._choose()
        if self.size > 1:
            outside(self._settle)
        self._signatures[names] = number

    def _choose(self) -> None:
        """An Auto decides, on all ranks alike."""
        layers = [x for name, x in self.controller.layers.items() if self.kinds.get(name) != SLICES]
        choices = self.controller.choices()
        self.advice = advise(layers, choices, measured(layers, choices, str(self.prefix), self.process_set))
        self.controller.choose({layer.name: layer.chosen for layer in self.advice})
        self.clock.begin()

    def _settle(self) -> None:
        """Keeps what an Auto's layers need under what it chose, and nothing else."""
        policy, small, state = self.controller.policy, self.settings.min_compress_numel, self.state
        for name in self.controller.chosen:
            if self.kinds.get(name) == SLICES:
                continue
            layer, key = self.controller.layers[name], self.numbers[name]
            specs = tuple(assignment.candidates(layer, policy[name], self.size, small, self.controller.chosen))
            self._keep(layer, specs)
            if self._signatures:  # a graph may hold on to the rest
                continue
            if not SwitchableGroup("", specs, (layer,)).has_residual:
                state.forget(key, "residual")
            if not any(spec.lossy for spec in specs):
                state.forget(key, "memory")

    # a step

    def __call__(self, names: tuple[str, ...], grads: Sequence[Any], learning_rate: Any, steps: Any = 1) -> list[Any]:
        """The averaged gradients; None where no rank has one. `steps`: micro-batches of which they are the means.

        ValueError where one is not what its layer was planned for.
        """
        for name, grad in zip(names, grads, strict=True):
            self._check(self.controller.layers[name], grad)
        if not tf.executing_eagerly():
            return self._reduce(names, grads, learning_rate, steps)
        function = self._functions.get(names)
        if function is None:  # as one graph: its parts run side by side
            function = tf.function(partial(self._reduce, names), reduce_retracing=True, autograph=False)
            self._functions[names] = function
        return function(grads, tf.convert_to_tensor(learning_rate), tf.cast(steps, tf.int64))

    def _check(self, layer: Layer, grad: Any) -> None:
        if grad is None:
            return
        sparse = isinstance(grad, tf.IndexedSlices)
        if self.kinds[layer.name] == SLICES and not sparse:
            raise ValueError(f"the gradient of {layer.name} is dense but was IndexedSlices at the first step")
        shape = tf.TensorShape(layer.shape) if sparse else grad.shape
        if grad.dtype.name != layer.dtype or not shape.is_compatible_with(layer.shape):
            raise ValueError(
                f"the gradient of {layer.name} must be {layer.dtype} {layer.shape} as the variable is, "
                f"got {grad.dtype.name} {tuple(shape)}"
            )

    def _reduce(self, names: tuple[str, ...], grads: Sequence[Any], learning_rate: Any, steps: Any) -> list[Any]:
        given = {name: g for name, g in zip(names, grads, strict=True) if self.kinds[name] != NONE}
        number = self._signatures[names]
        if self.size == 1:
            means, sent = self._alone(given, steps), tf.constant(0.0, tf.float64)
        elif self.plain is not None:
            means, sent = self._plainly(given, f"{self.prefix}.{number}")
        else:
            means, sent = self._compressed(given, steps, f"{self.prefix}.{number}")
        self.clock.tick(sent, learning_rate, steps)
        return [means.get(name, given.get(name)) for name in names]  # what is empty stays as it is

    def _compressed(self, given: dict[str, Any], steps: Any, prefix: str) -> tuple[dict[str, Any], tf.Tensor]:
        state = self.state
        state.claim()
        step, levels = state.step.read_value(), state.levels.read_value()
        driver = Driver(prefix, self.process_set, self.settings.scales(self.size))
        means, kept = {}, []
        flags, sent = [tf.constant(True)], [tf.constant(0.0, tf.float64)]
        for part in self._parts(given):
            mean, residual, memory, ok, nbytes = self._travel(part, given, step, levels, driver)
            flags.append(ok)
            sent.append(nbytes)
            for i, layer in enumerate(part.layers):
                key = self.numbers[layer.name]
                means[layer.name] = mean[i]
                kept += [(state.residual[key], residual[i])] if residual else []
                kept += [(state.memory[key][name], value) for name, value in memory[i].items()]
        joined, its_flags, its_sent = self._slices(given, prefix)
        ok = tf.reduce_all(tf.stack(flags + its_flags))

        def keep() -> tf.Tensor:
            for into, value in kept:
                into.assign(value)
            return ok

        tf.cond(ok, keep, lambda: ok)  # a step with NaN or Inf leaves no trace
        self._measure(means, ok, steps)
        if self.settings.op == hvd.Sum:
            means = {name: mean * self.size for name, mean in means.items()}
        layers = self.controller.layers
        return {**{n: tf.cast(x, layers[n].dtype) for n, x in means.items()}, **joined}, tf.add_n(sent + its_sent)

    def _parts(self, given: dict[str, Any]) -> list[SwitchableGroup]:
        policy, small = self.controller.policy, self.settings.min_compress_numel
        limit = None if self.settings.groups else assignment.BUCKET_BYTES
        return assignment.parts(self._runs(self._dense(given)), policy, self.size, small, limit, self.controller.chosen)

    def _dense(self, given: dict[str, Any]) -> list[Layer]:
        """Layers whose gradients are neither missing nor slices, in the order of the variables."""
        layers = [layer for name, layer in self.controller.layers.items() if name in given]
        return [layer for layer in layers if self.kinds[layer.name] == DENSE and layer.numel]

    def _runs(self, layers: list[Layer]) -> list[list[Layer]]:
        groups = self.settings.groups
        if isinstance(groups, int) and groups > 0:
            return assignment.split(layers, groups)
        if isinstance(groups, list):
            runs: dict[Any, list[Layer]] = {}
            for layer in layers:
                runs.setdefault(self.group_of.get(layer.name, layer.name), []).append(layer)
            return list(runs.values())
        return [layers[::-1]]  # in the order of backward

    def _travel(
        self, part: SwitchableGroup, given: dict[str, Any], step: tf.Tensor, levels: tf.Tensor, driver: Driver
    ) -> Any:
        """Averages, new residuals and memory of the layers, whether all were finite, bytes sent."""
        names = tuple(layer.name for layer in part.layers)
        grads = [self._gradient(layer, given[layer.name]) for layer in part.layers]
        context = Context(names, part.layers[0].dtype, step, self.settings.seed, self.rank, self.size)
        branches = [partial(self._under, part, i, grads, context, driver) for i in range(len(part.specs))]
        if len(branches) == 1:
            return branches[0]()
        return tf.switch_case(self._index(part, step, levels), branches)

    def _under(
        self, part: SwitchableGroup, index: int, grads: list[tf.Tensor], context: Context, driver: Driver
    ) -> Any:
        """An exchange under one of the part's specs."""
        spec, state = part.specs[index], self.state
        keys = [self.numbers[name] for name in context.names]
        residual = [state.residual[key].read_value() for key in keys] if part.has_residual else None
        memory = [{name: self.rows.read(v) for name, v in state.memory.get(key, {}).items()} for key in keys]
        rounds = exchange(spec, ops, grads, residual, memory, context)
        done, ok, nbytes = driver.run(rounds, f"{part.name}.{index}.{spec.tag}")
        self._count(part, spec, nbytes)
        # what a spec does not know of stays for the others
        kept = [{name: new.get(name, old[name]) for name in old} for old, new in zip(memory, done.memory, strict=True)]
        return done.mean, done.residual or [], kept, ok, tf.constant(nbytes, tf.float64)

    def _index(self, part: SwitchableGroup, step: tf.Tensor, levels: tf.Tensor) -> Any:
        """Which of the part's specs holds now."""
        layer = part.layers[0]
        policy = self.controller.policy[layer.name]
        dense = part.specs.index(Dense()) if Dense() in part.specs else 0

        def number(spec: CompressionSpec) -> Any:
            if not assignment.allowed(layer, spec, self.size, self.settings.min_compress_numel):
                return dense
            index = part.specs.index(spec)
            return index if spec.active(0) else tf.where(spec.active(step), index, dense)

        numbers = [number(assignment.settled(layer, side, self.controller.chosen)) for side in assignment.sides(policy)]
        if len(numbers) == 1:
            return numbers[0]
        return tf.where(tf.equal(levels[self.clock.position(layer.name)], 0), *numbers)

    def _gradient(self, layer: Layer, grad: Any) -> tf.Tensor:
        """Dense; zeros where there is none."""
        if grad is None:
            # not what TensorFlow could tell to be constant: that it would send once and for all, as it simplifies the graph
            return tf.fill(layer.shape, tf.cast(self.state.step.read_value() < 0, layer.dtype))
        return tf.ensure_shape(tf.convert_to_tensor(grad), layer.shape)

    def _slices(self, given: dict[str, Any], prefix: str) -> tuple[dict[str, Any], list[tf.Tensor], list[tf.Tensor]]:
        joined, flags, sent = {}, [], []
        for name in (name for name in given if self.kinds[name] == SLICES):
            layer, key = self.controller.layers[name], self.numbers[name]
            at, summed = f"{prefix}.slices.{key}", self.settings.op == hvd.Sum
            joined[name], ok, nbytes = sparse.average(layer, given[name], at, self.process_set, summed)
            self.state.slice_bytes[key].assign(nbytes)
            flags.append(ok)
            sent.append(nbytes)
        return joined, flags, sent

    def _measure(self, means: dict[str, tf.Tensor], ok: tf.Tensor, steps: Any) -> None:
        """Adds the watched entries to the window's sums, each as often as it stands for a step, if all was sound."""
        controller, state = self.controller, self.state
        measured = state.measured.read_value()
        for i, accordion in enumerate(controller.accordions):
            self._add(self.clock.summed(accordion), means, ok & measured[i], steps)
        if controller.batch is not None:
            numbers = {name: state.summed_whole.get(self.numbers[name]) for name in means}
            whole = {name: summed for name, summed in numbers.items() if summed is not None}
            self._add(whole, means, ok & state.measures_whole.read_value(), steps)

    def _add(self, sums: dict[str, tf.Variable], means: dict[str, tf.Tensor], really: tf.Tensor, steps: Any) -> None:
        def add() -> tf.Tensor:
            for name, summed in sums.items():
                if name in means:
                    seen = tf.cast(self._watched(name, means[name], self.rows.of(summed)), summed.dtype)
                    summed.assign_add(seen * tf.cast(steps, summed.dtype))
            return really

        tf.cond(really, add, lambda: really)

    def _watched(self, name: str, mean: tf.Tensor, size: int) -> tf.Tensor:
        """The entries of a layer of which its norm is made, as a vector."""
        flat = tf.reshape(mean, (-1,))
        return ops.take(flat, self.entries[name, size]) if (name, size) in self.entries else flat

    def _count(self, part: SwitchableGroup, spec: CompressionSpec, nbytes: float) -> None:
        """Shares the bytes among the layers as their own specs would have it."""
        predicted = [spec.bytes_per_step(x.shape, x.dtype, self.size) for x in part.layers]
        for layer, share in zip(part.layers, predicted, strict=True):
            self.traffic[layer.name, spec] = nbytes * share / sum(predicted)

    def _alone(self, given: dict[str, Any], steps: Any) -> dict[str, Any]:
        """One rank: gradients stay as they are, but for what it kept among others; norms are watched all the same."""
        kept = {layer.name: self.state.residual.get(self.numbers[layer.name]) for layer in self._dense(given)}
        held = {name: residual for name, residual in kept.items() if residual is not None}
        watched = self.controller.layers if self.controller.batch is not None else self.clock.adaptive
        names = [name for name in kept if name in watched or name in held]
        if not names:
            return given
        layers = self.controller.layers
        dense = {name: self._gradient(layers[name], given[name]) for name in names}
        ok = ops.all_finite(list(dense.values()))
        for name, residual in held.items():
            dense[name] = tf.cast(dense[name], residual.dtype) + residual
            residual.assign(tf.where(ok, tf.zeros_like(residual), residual))
        self._measure(dense, ok, steps)
        return {**given, **{name: tf.cast(dense[name], layers[name].dtype) for name in held}}

    def _plainly(self, given: dict[str, Any], prefix: str) -> tuple[dict[str, Any], tf.Tensor]:
        """As Horovod itself does it: no state, no compression but a cast."""
        s, means = self.settings, {}
        factor = s.gradient_predivide_factor
        how = {"op": s.op, "compression": self.plain, "process_set": s.process_set, "ignore_name_scope": True}
        how |= {"prescale_factor": 1 / factor, "postscale_factor": factor} if factor != 1.0 else {}
        dense = self._dense(given)
        grouped = s.groups and s.op != hvd.Adasum
        for i, run in enumerate(self._runs(dense) if grouped else [[layer] for layer in dense]):
            grads = [self._gradient(layer, given[layer.name]) for layer in run]
            if grouped:
                done = hvd.grouped_allreduce(grads, name=f"{prefix}.group.{i}", **how)
            else:
                done = [hvd.allreduce(grads[0], name=f"{prefix}.gradient.{i}", **how)]
            means |= {layer.name: mean for layer, mean in zip(run, done, strict=True)}
        joined, _, sent = self._slices(given, prefix)
        total = sum(self._plain_spec.bytes_per_step(x.shape, x.dtype, self.size) for x in dense)
        return {**means, **joined}, tf.add_n([tf.constant(total, tf.float64), *sent])

    @property
    def _plain_spec(self) -> CompressionSpec:
        return plain_spec(self.plain)

    # reports

    def gathered(self) -> set[str]:
        """Layers whose gradients are IndexedSlices."""
        return {name for name, kind in self.kinds.items() if kind == SLICES}

    def bytes_per_step(self) -> dict[str, float]:
        """Bytes of each layer a step at the levels of now; of slices those of the last step."""
        specs, found = self.controller.specs(), {}
        for name, layer in self.controller.layers.items():
            spec = specs[name] if self.plain is None else self._plain_spec
            if self.kinds.get(name) == SLICES:
                found[name] = float(self.state.slice_bytes[self.numbers[name]])
            elif (name, spec) in self.traffic:
                found[name] = self.traffic[name, spec]
            else:
                found[name] = spec.bytes_per_step(layer.shape, layer.dtype, self.size)
        return found
