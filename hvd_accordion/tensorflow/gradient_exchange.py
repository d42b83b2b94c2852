"""GradientExchange: the averaging of gradients in TensorFlow, with all that it remembers from step to step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.policy.assignment import MIN_NUMEL, Compression, Layer, assign
from hvd_accordion.policy.auto import Advice, advice_of
from hvd_accordion.policy.batch_size import AccordionBatchSize
from hvd_accordion.tensorflow.broadcasting import send
from hvd_accordion.tensorflow.exchange import numpy_bridge, registry
from hvd_accordion.tensorflow.exchange.engine import Engine
from hvd_accordion.tensorflow.exchange.known import Known
from hvd_accordion.tensorflow.exchange.shared import Shared
from hvd_accordion.tensorflow.exchange.state import State, outside
from hvd_accordion.tensorflow.exchange.uneven import compresses
from hvd_accordion.tensorflow.exchange.variables import check_groups, check_process_set, layer_of, names_of, value_of
from hvd_accordion.tensorflow.exchange.xla import refuse_xla
from hvd_accordion.tensorflow.transport import Average, ProcessSet, Sum, global_process_set
from hvd_accordion.tensorflow.transport import Compression as HorovodCompression
from hvd_accordion.training import elastic
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.reports import CompressionReport, Logger, Stats
from hvd_accordion.training.settings import Settings, check_logger, check_op, is_horovods, plain_spec, translated

GATHERED = "slices, gathered"  # what the report says of gradients that are IndexedSlices


class GradientExchange(tf.Module):
    """Averages gradients over the ranks, compressed; lives as long as the training.

    `DistributedOptimizer` holds one. `DistributedGradientTape` takes one as its `compression` where that shall be told
    of epochs, report, or be saved. Levels are variables that the traced graph reads: it holds an exchange for each
    level and is not traced again when one changes. All state (residuals, factors, levels, norms, counts) is in
    variables of this module, which `tf.train.Checkpoint` saves; see `State` for whose a restored residual is.

    Args:
        compression: as `DistributedOptimizer`'s.
        steps_per_epoch: calls in an epoch; otherwise `end_epoch` tells. An Accordion that counts epochs raises
            ValueError when it has heard of none in 10,000 steps.
        learning_rate: a variable, a number or a function without arguments that gives the rate of now: its drop makes an
            Accordion's layers critical.
        logger: told on rank 0 of what happened, such as `MLflowLogger()`.
        seed: of everything random in compression; the global generators are left alone.
        min_compress_numel: tensors of fewer elements travel dense.
        batch_size: a `DistributedOptimizer`'s, which can wait with an update; an exchange by itself, or on a tape, can't.
        op, gradient_predivide_factor, groups, sparse_as_dense, process_set, scale_local_gradients: as Horovod's.

    Raises ValueError or TypeError for arguments out of range; at the first exchange, on every rank the same, where ranks
    are configured differently.
    """

    def __init__(
        self,
        compression: Compression | type = None,
        *,
        steps_per_epoch: int | None = None,
        learning_rate: Any = None,
        logger: Logger | None = None,
        seed: int = 0,
        min_compress_numel: int = MIN_NUMEL,
        batch_size: AccordionBatchSize | None = None,
        op: Any = Average,
        gradient_predivide_factor: float = 1.0,
        groups: int | list[list[Any]] | None = None,
        sparse_as_dense: bool = False,
        process_set: ProcessSet = global_process_set,
        scale_local_gradients: bool = True,
        backward_passes_per_step: int = 1,
        optimizer: str = "",
    ) -> None:
        super().__init__(name="gradient_exchange")
        check_groups(groups)
        check_logger(logger)
        elastic.check_process_set(process_set, global_process_set)
        check_process_set(process_set)
        settings = Settings(
            op,
            Average,
            process_set,
            backward_passes_per_step,
            gradient_predivide_factor,
            groups,
            sparse_as_dense,
            steps_per_epoch,
            seed,
            min_compress_numel,
            batch_size,
        )
        plain = compression is None or is_horovods(compression)
        if plain and batch_size is not None:
            plain, compression = False, plain_spec(compression)
        if not plain:
            check_op(op, (Average, Sum), compression, batch_size)
        policy = plain_spec(compression) if plain else translated(compression)
        assign(policy, [], strict=False)  # a value of a wrong type shows at once
        # in plain objects: attributes that are dicts or lists would count as parts of a checkpoint
        self.settings = settings
        self._asked = _Asked(compression, plain, policy, logger, optimizer, scale_local_gradients, learning_rate)
        self._known = Known()
        self.local_names: frozenset[str] = frozenset()  # variables that are local before anybody can register them
        self._engine: Engine | None = None
        self._prefix = Prefix(process_set)
        self._told: Shared | None = None
        self.waiting: Callable[[], Any] | None = None  # weakly, its optimizer's sums of micro-batches

    @property
    def active(self) -> bool:
        """Whether this rank takes part."""
        return self.settings.process_set.included()

    @property
    def _stateless(self) -> bool:
        """Whether a step is the same whatever was before: what a rank that has just come may do beside the others."""
        return self._asked.plain and self.settings.backward_passes_per_step == 1

    def register_local(self, variable: Any) -> None:
        """From now on the variable's gradient stays this rank's own."""
        self._known.local.add(id(value_of(variable)))

    def named_locals(self) -> frozenset[str] | None:
        """Names of the variables whose gradients stay this rank's own; None where one has no name yet."""
        found = self._known.local_names()
        return found if len(found) == len(self._known.local) else None

    def key(self, variable: Any) -> str:
        """Of a variable that it knows, in the names of its state."""
        assert self._engine is not None
        return self._engine.plan.numbers[self._known.name(variable)]

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the state for these variables, tf.Variable or keras.Variable, the same on every rank. Sends nothing.

        The first call of the exchange does so by itself. ValueError for a glob of `compression` that matches no name.
        """
        fresh = [v for v in variables if self._known.name(v) is None and tf.as_dtype(v.dtype).is_floating]
        if not fresh:
            return
        names = names_of(fresh, self._known.names())
        layers = [layer_of(name, v) for name, v in zip(names, fresh, strict=True)]
        policy = assign(self._asked.policy, names, strict=self._engine is None)
        self._known.add(names, fresh)
        self._known.local |= {id(value_of(v)) for name, v in zip(names, fresh, strict=True) if name in self.local_names}
        outside(lambda: self._extend(layers, policy))

    def _extend(self, layers: Sequence[Layer], policy: dict[str, Any]) -> None:
        engine, known = self._engine, len(self.shapes)
        if engine is None:
            engine = self._engine = self._made(layers, policy)
        else:
            engine.controller.adopt(policy)
            engine.controller.set_layers([*engine.controller.layers.values(), *layers])
        if isinstance(self.settings.groups, list):
            members = {self._known.name(v): i for i, group in enumerate(self.settings.groups) for v in group}
            engine.plan.group_of.update(members)
        engine.add(layers)
        if known == 0:
            registry.add(self)
        elif self._told is not None:
            self._told.give(self.state, known)

    def _made(self, layers: Sequence[Layer], policy: dict[str, Any]) -> Engine:
        settings, asked = self.settings, self._asked
        rank, size = self._place()
        steps, small = settings.steps_per_epoch, settings.min_compress_numel
        logger = self._logger(policy)
        controller = Controller(layers, policy, size, steps, logger, small, settings.batch_size)
        self.state = State(rank, size)
        plain = (asked.compression or HorovodCompression.none) if asked.plain else None
        self._counts(plain, size)
        return Engine(controller, self.state, settings, plain, self._prefix)

    def _place(self) -> tuple[int, int]:
        """This rank's number among how many."""
        its = self.settings.process_set
        return (its.rank(), its.size()) if self.active else (0, 1)

    def _logger(self, policy: dict[str, Any]) -> Logger | None:
        """The logger on rank 0, told of the run."""
        asked, (rank, size) = self._asked, self._place()
        if asked.logger is None or rank != 0 or not self.active:
            return None
        told = self.settings.logged(asked.optimizer, asked.compression, policy, size, "tensorflow", tf.__version__)
        asked.logger.start(told)
        return asked.logger

    # among ranks that come and go

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the layers that it knows."""
        return () if self._engine is None else tuple(x.shape for x in self._engine.controller.layers.values())

    @property
    def local_sums(self) -> Any:
        """Of micro-batches that wait for an update; None where there are none."""
        return None if self.waiting is None else self.waiting()

    def move(self) -> None:
        """Among other ranks, from now on. Sends nothing: the next exchange compares settings anew.

        Residuals are scaled to count for as much in the mean as before. ValueError where the ranks can't share a batch.
        """
        if self._engine is not None:
            was = self.state.me[0]
            self.state.move(*self._place())
            moved = (was == 0) != (self.state.me[0] == 0)
            controller = self._engine.controller
            self._engine.move(self._logger(controller.policy) if moved else controller.logger)
            self._counts(self._engine.compressor, self.state.me[1])

    def _counts(self, plain: Any, size: int) -> None:
        """It sends what Horovod's `join` knows nothing of."""
        if plain is None and size > 1:
            compresses(self)

    def knows_any(self, variables: Sequence[Any]) -> bool:
        """Whether it exchanges the gradient of one of these."""
        return any(self._known.name(v) is not None for v in variables)

    def saved(self) -> Callable[[], None]:
        """A function that gives its variables the values of now, at whatever place this process is then."""
        state, sums = self.state, self.local_sums
        variables = [*state.variables, *(() if sums is None else sums.variables)]
        values = {id(v): (v, tf.identity(v.read_value())) for v in variables}

        def back() -> None:
            for v in self.state.residual.values():
                if id(v) not in values:  # made since then
                    v.assign(tf.zeros_like(v))
            for v, value in values.values():
                v.assign(value)
            self.state.scale()

        return back

    def take(self, told: Shared) -> None:
        """Takes up what rank 0 has told of it; layers that it gets to know later do so then."""
        self._told = told
        told.give(self.state, 0, self.local_sums)

    @tf.autograph.experimental.do_not_convert
    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any], steps: Any = None) -> list[Any]:
        """The averages over the ranks of the gradients of `variables`, eagerly or in a graph; None where all have None.

        Args:
            gradients: tensors, IndexedSlices or None, one for each variable.
            steps: with `batch_size`, of how many micro-batches they are the means.

        Raises ValueError where there are more or fewer, TypeError for variables that are no floats.
        """
        if steps is None and self.settings.batch_size is not None:
            raise ValueError("batch_size needs a DistributedOptimizer: an exchange by itself can't wait with an update")
        averaged, variables = list(gradients), list(variables)
        if len(averaged) != len(variables):
            raise ValueError(f"gradients must be as many as variables, got {len(averaged)} for {len(variables)}")
        for g, v in zip(averaged, variables, strict=True):
            if g is not None and not tf.as_dtype(v.dtype).is_floating:
                raise TypeError(
                    f"variables must be of a floating dtype to be exchanged, got {tf.as_dtype(v.dtype).name}"
                )
        if not self.active or not any(tf.as_dtype(v.dtype).is_floating for v in variables):
            return averaged
        refuse_xla()
        self.build(variables)
        rate, steps = self._learning_rate(), 1 if steps is None else steps
        if elastic.active() and not registry.synchronised() and not self._stateless:
            raise elastic.unsynchronised(
                "what exchanges compressed, or after several passes,", "a state of hvd.elastic"
            )
        if not elastic.active() or tf.executing_eagerly():
            return self._averages(averaged, variables, rate, steps)
        touched = [self.state.step, self.state.step_of_epoch, self.state.passes, self.state.lr_scale]
        return numpy_bridge.call(
            lambda grads, *told: self._averages(grads, variables, *told, traced=True),
            averaged,
            variables,
            rate,
            steps,
            touched,
        )

    def _averages(
        self, averaged: list[Any], variables: list[Any], rate: Any, steps: Any, traced: bool = False
    ) -> list[Any]:
        assert self._engine is not None
        known = self._known
        mine = [i for i, v in enumerate(variables) if known.name(v) is not None and not known.is_local(v)]
        names = tuple(known.name(variables[i]) for i in mine)
        given = [averaged[i] for i in mine]
        if names:
            self._engine.agree(names, given, lambda: self._described(variables), traced)
            means = self._engine(names, given, rate, steps)
            for i, mean in zip(mine, means, strict=True):
                averaged[i] = mean
        if not self._asked.scale_local_gradients:
            return averaged
        # Horovod divides the others by the number of ranks: so do those that stay
        size = self.settings.process_set.size()
        return [divided(g, size) if known.is_local(v) else g for v, g in zip(variables, averaged, strict=True)]

    def micro_batches(self) -> tf.Tensor:
        """int64, of which the update to come is made."""
        assert self._engine is not None
        step, of_epoch, passes = (
            getattr(self.state, name).read_value() for name in ("step", "step_of_epoch", "passes")
        )
        limits = self._engine.controller.limits(step, of_epoch, passes)
        return tf.maximum(tf.reduce_min(tf.stack([tf.cast(x, tf.int64) for x in limits])), 1)

    def lr_scale(self, micro_batches: tf.Tensor) -> tf.Tensor:
        """float64, of an update of so many; to be asked before its exchange, which may change the size of batches."""
        full = tf.cast(self.state.passes.read_value(), tf.float64)
        return self.state.lr_scale.read_value() * (tf.cast(micro_batches, tf.float64) / full)

    def _learning_rate(self) -> tf.Tensor:
        rate = self._asked.learning_rate
        rate = rate() if callable(rate) else rate
        return tf.convert_to_tensor(1.0 if rate is None else rate)

    def _described(self, variables: Sequence[Any]) -> dict[str, str]:
        """Everything in which ranks must agree, as text."""
        known, asked, groups = self._known, self._asked, self.settings.groups
        described = self.settings.described("tensorflow", tf.__version__)
        if isinstance(groups, list):
            groups = [[known.name(v) or "?" for v in group] for group in groups]
        described["groups"] = str(groups)
        described["compression"] = str(asked.compression) if asked.plain else repr(asked.policy)
        described["number of variables"] = str(len(variables))
        for i, v in enumerate(variables):
            local = ", local" if known.is_local(v) else ""
            described[f"variable {i}"] = f"{known.name(v)} {tuple(v.shape)} {tf.as_dtype(v.dtype).name}{local}"
        return described

    def end_epoch(self) -> None:
        """An epoch is over: needed where `steps_per_epoch` was not given and no callback tells. The same on every rank.

        Called a second time without an exchange in between it does nothing.
        """
        if self._engine is not None and self.active:
            self._engine.bridge.end_epoch(float(self._learning_rate()))

    def compression_report(self) -> CompressionReport:
        """Per layer: shape, compression now, regime, bytes a step, dense bytes, share of the whole. Prints as a table."""
        if self._engine is None:
            return CompressionReport()
        self._engine.bridge.look()
        report, plan = self._engine.controller.report(self._engine.traffic.bytes_per_step()), self._engine.plan
        rows = (replace(row, spec=GATHERED, regime=None) if plan.is_sparse(row.name) else row for row in report)
        return replace(report, layers=tuple(rows))

    def advice(self) -> Advice:
        """What an `Auto` measured, what each choice would cost, what it chose. Prints as a table.

        Raises ValueError where there is no Auto, or before the first exchange.
        """
        return advice_of(self._engine)

    @property
    def stats(self) -> Stats:
        """Running totals of steps and bytes; a graph can't tell the seconds that its exchange takes: they are 0."""
        if self._engine is None:
            return Stats()
        self._engine.bridge.look()
        return self._engine.controller.stats

    def restored(self, left: Sequence[str]) -> None:
        """Its variables were restored. Warns of what was not taken up: `left`, in words, and more of the kind."""
        if self._engine is not None:
            self._engine.bridge.look(left)

    def broadcast(self, root_rank: int, count: tf.Variable | None = None, sums: Sequence[tf.Variable] = ()) -> None:
        """Gives every rank what `root_rank` has restored: levels, factors, norms and counts, but no residual.

        Args:
            count: of micro-batches that wait; where it is another than on `root_rank`, `sums` of those are taken, too.
        """
        if self._engine is None or not self.active or self.settings.process_set.size() == 1:
            return
        self.restored([])  # sizes are those of the settings of now, on all ranks
        transport, name = self._engine.transport, f"{self._prefix}.state"
        for i, v in enumerate(self.state.shared()):
            v.assign(send(v.read_value(), root_rank, f"{name}.{i}", transport))
        theirs = [send(v.read_value(), root_rank, f"{name}.sums.{i}", transport) for i, v in enumerate(sums)]
        if count is not None:
            waiting = send(count.read_value(), root_rank, f"{name}.count", transport)
            if int(waiting) != int(count):
                for v, value in zip([count, *sums], [waiting, *theirs], strict=True):
                    v.assign(value)
        journal = self.state.journal.numpy()
        self.state.journal.assign(transport.broadcast_object(journal, name, root_rank))


@dataclass(frozen=True)
class _Asked:
    compression: Any
    plain: bool
    policy: Any
    logger: Logger | None
    optimizer: str
    scale_local_gradients: bool
    learning_rate: Any


def divided(gradient: Any, by: int) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values / by, gradient.indices, gradient.dense_shape)
    return None if gradient is None else gradient / by
