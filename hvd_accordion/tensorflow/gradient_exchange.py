"""GradientExchange: averages gradients in TensorFlow, and holds their residuals, factors and levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import tensorflow as tf

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.policy.assignment import MIN_NUMEL, Compression, assign
from hvd_accordion.policy.auto import Advice, advice_of
from hvd_accordion.policy.batch_size import AccordionBatchSize
from hvd_accordion.policy.layers import Layer
from hvd_accordion.tensorflow.exchange import batches, numpy_bridge, registry
from hvd_accordion.tensorflow.exchange.configuration import configured
from hvd_accordion.tensorflow.exchange.engine import Engine, assembled
from hvd_accordion.tensorflow.exchange.named_variables import NamedVariables
from hvd_accordion.tensorflow.exchange.shared import Shared, broadcast
from hvd_accordion.tensorflow.exchange.state import outside, rollback
from hvd_accordion.tensorflow.exchange.uneven import compresses
from hvd_accordion.tensorflow.exchange.variables import check_gradients, divided, layer_of, names_of, value_of
from hvd_accordion.tensorflow.internals import refuse_xla
from hvd_accordion.tensorflow.transport import Average, ProcessSet, connect, global_process_set
from hvd_accordion.training import elastic
from hvd_accordion.training.reports import CompressionReport, Logger, Stats

GATHERED = "slices, gathered"  # what the report says of gradients that are IndexedSlices


class GradientExchange(tf.Module):
    """Averages gradients over the ranks, compressed; lives as long as the training.

    `DistributedOptimizer` holds one; `DistributedGradientTape` takes one as its `compression`. Levels are variables that the
    traced graph reads: it holds an exchange for each, and is not traced again when one changes. All state (residuals,
    factors, levels, norms, counts) is in variables of this module, which `tf.train.Checkpoint` saves; see `State`.

    Args:
        compression, logger, seed, min_compress_numel: as `DistributedOptimizer`'s.
        steps_per_epoch: calls in an epoch; otherwise `end_epoch` ends one. An Accordion that counts epochs raises
            ValueError after 10,000 steps without an end.
        learning_rate: a variable, a number or a function without arguments: if the rate drops, an Accordion's layers become
            critical.
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
        # in a plain object: attributes that are dicts or lists would count as parts of a checkpoint
        self.configuration = configured(
            compression,
            learning_rate=learning_rate,
            logger=logger,
            optimizer=optimizer,
            scale_local_gradients=scale_local_gradients,
            op=op,
            process_set=process_set,
            backward_passes_per_step=backward_passes_per_step,
            gradient_predivide_factor=gradient_predivide_factor,
            groups=groups,
            sparse_as_dense=sparse_as_dense,
            steps_per_epoch=steps_per_epoch,
            seed=seed,
            min_compress_numel=min_compress_numel,
            batch_size=batch_size,
        )
        self.settings = self.configuration.settings
        self.transport = connect(process_set)
        self.named = NamedVariables()
        self.local_names: frozenset[str] = frozenset()  # variables that are local from the start
        self._engine: Engine | None = None
        self._prefix = Prefix(process_set)
        self._shared: Shared | None = None  # rank 0's state, also of layers that this rank may add later
        self.waiting: Callable[[], Any] | None = None  # weakly, its optimizer's sums of micro-batches

    @property
    def active(self) -> bool:
        """Whether this rank takes part."""
        return self.transport.included

    def register_local(self, variable: Any) -> None:
        """From now on the variable's gradient stays this rank's own."""
        self.named.local.add(id(value_of(variable)))

    def named_locals(self) -> frozenset[str] | None:
        """Names of the variables whose gradients stay this rank's own; None where one has no name yet."""
        found = self.named.local_names()
        return found if len(found) == len(self.named.local) else None

    def key(self, variable: Any) -> str:
        """The number of the variable's layer in the state."""
        name = self.named.name(variable)
        assert self._engine is not None and name is not None
        return self._engine.plan.numbers[name]

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the state for these variables, tf.Variable or keras.Variable, the same on every rank. Sends nothing.

        The first call of the exchange does so by itself. ValueError for a glob of `compression` that matches no name.
        """
        fresh = [v for v in variables if self.named.name(v) is None and tf.as_dtype(v.dtype).is_floating]
        if not fresh:
            return
        names = names_of(fresh, self.named.names())
        layers = [layer_of(name, v) for name, v in zip(names, fresh, strict=True)]
        policy = assign(self.configuration.policy, names, strict=self._engine is None)
        self.named.add(names, fresh)
        self.named.local |= {id(value_of(v)) for name, v in zip(names, fresh, strict=True) if name in self.local_names}
        outside(lambda: self._extend(layers, policy))

    def _extend(self, layers: Sequence[Layer], policy: dict[str, Any]) -> None:
        engine, before = self._engine, len(self.shapes)
        if engine is None:
            engine = self._engine = assembled(layers, policy, self.configuration, self.transport, self._prefix)
            self.state = engine.state
            self._refuse_join()
        else:
            engine.controller.adopt(policy)
            engine.controller.set_layers([*engine.controller.layers.values(), *layers])
        if isinstance(self.settings.groups, list):
            members = {self.named.name(v): i for i, group in enumerate(self.settings.groups) for v in group}
            engine.plan.group_of.update({name: i for name, i in members.items() if name is not None})
        engine.add(layers)
        if before == 0:
            registry.add(self)
        elif self._shared is not None:
            self._shared.give(self.state, before)

    # among ranks that come and go

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the layers."""
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
            self._engine.move(self.configuration, self.transport)
            self._refuse_join()

    def _refuse_join(self) -> None:
        """Registers an exchange that `hvd.join` can't take part in."""
        if self.configuration.compressor is None and self.transport.size > 1:
            compresses(self)

    def knows_any(self, variables: Sequence[Any]) -> bool:
        """Whether it exchanges the gradient of one of these."""
        return any(self.named.name(v) is not None for v in variables)

    def saved(self) -> Callable[[], None]:
        """A function that gives its variables the values of now, at whatever place this process is then."""
        sums = self.local_sums
        return rollback(self.state, () if sums is None else sums.variables)

    def take(self, shared: Shared) -> None:
        """Takes rank 0's state; layers that are added later take theirs then."""
        self._shared = shared
        shared.give(self.state, 0, self.local_sums)

    # a step

    @tf.autograph.experimental.do_not_convert
    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any], steps: Any = None) -> list[Any]:
        """The averages over the ranks of the gradients of `variables`, eagerly or in a graph; None where all have None.

        Args:
            gradients: tensors, IndexedSlices or None, one for each variable.
            steps: with `batch_size`, of how many micro-batches they are the means.

        Raises ValueError where there are more or fewer, TypeError for variables that are no floats.
        """
        gradients, variables = list(gradients), list(variables)
        if steps is None and self.settings.batch_size is not None:
            raise ValueError("batch_size needs a DistributedOptimizer: an exchange by itself can't wait with an update")
        check_gradients(gradients, variables)
        if not self.active or not any(tf.as_dtype(v.dtype).is_floating for v in variables):
            return gradients
        refuse_xla()
        self.build(variables)
        rate, steps = self.configuration.rate(), 1 if steps is None else steps
        if elastic.active() and not registry.synchronised() and not self.configuration.is_stateless:
            raise elastic.unsynchronised(
                "what exchanges compressed, or after several passes,", "a state of hvd.elastic"
            )
        if not elastic.active() or tf.executing_eagerly():
            return self._averages(gradients, variables, rate, steps)
        touched = [self.state.step, self.state.step_of_epoch, self.state.passes, self.state.lr_scale]

        def averages(grads: list[Any], rate: Any, steps: Any) -> list[Any]:
            return self._averages(grads, variables, rate, steps, traced=True)

        return numpy_bridge.call(averages, gradients, variables, rate, steps, touched)

    def _averages(
        self, gradients: list[Any], variables: list[Any], rate: Any, steps: Any, traced: bool = False
    ) -> list[Any]:
        assert self._engine is not None
        named, averaged = self.named, list(gradients)
        shared = {i: name for i, v in enumerate(variables) if (name := named.name(v)) and not named.is_local(v)}
        if shared:
            names, given = tuple(shared.values()), [gradients[i] for i in shared]
            self._engine.agree(names, given, lambda: self.configuration.described(named, variables), traced)
            for i, mean in zip(shared, self._engine(names, given, rate, steps), strict=True):
                averaged[i] = mean
        if not self.configuration.scale_local_gradients:
            return averaged
        # Horovod divides the others by the number of ranks: so do those that stay
        size = self.transport.size
        return [divided(g, size) if named.is_local(v) else g for v, g in zip(variables, averaged, strict=True)]

    def micro_batches(self) -> tf.Tensor:
        """int64, of which the update to come is made."""
        assert self._engine is not None
        return batches.micro_batches(self._engine.controller, self.state)

    def lr_scale(self, micro_batches: tf.Tensor) -> tf.Tensor:
        """float64, of an update of so many; to be read before its exchange, which may change the size of batches."""
        return batches.lr_scale(self.state, micro_batches)

    # epochs, reports, state

    def end_epoch(self) -> None:
        """An epoch is over: needed without `steps_per_epoch` and without a callback of this package. On every rank.

        Called a second time without an exchange in between it does nothing.
        """
        if self._engine is not None and self.active:
            self._engine.bridge.end_epoch(float(self.configuration.rate()))

    def compression_report(self) -> CompressionReport:
        """Per layer: shape, compression now, regime, bytes a step, dense bytes, share of the whole. Prints as a table."""
        if self._engine is None:
            return CompressionReport()
        self._engine.bridge.sync()
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
        """Running totals of steps and bytes; seconds are 0: a graph does not measure its exchanges."""
        if self._engine is None:
            return Stats()
        self._engine.bridge.sync()
        return self._engine.controller.stats

    def restored(self, left: Sequence[str]) -> None:
        """Its variables were restored. Warns of what was not taken up: `left`, in words, and what no longer fits."""
        if self._engine is not None:
            self._engine.bridge.sync(left)

    def broadcast(self, root_rank: int, count: tf.Variable | None = None, sums: Sequence[tf.Variable] = ()) -> None:
        """Gives every rank what `root_rank` has restored: levels, factors, norms and counts, but no residual.

        Args:
            count: of micro-batches that wait; where it is another than on `root_rank`, `sums` of those are taken, too.
        """
        if self._engine is None or not self.active or self.transport.size == 1:
            return
        self.restored([])  # sizes are those of the settings of now, on all ranks
        broadcast(self.state, self.transport, f"{self._prefix}.state", root_rank, count, sums)
