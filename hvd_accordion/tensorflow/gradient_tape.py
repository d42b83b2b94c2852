"""DistributedGradientTape: a tape whose gradients are averages over the ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from hvd_accordion.policy.assignment import Compression
from hvd_accordion.tensorflow.exchange.variables import trainable_of, value_of
from hvd_accordion.tensorflow.gradient_exchange import GradientExchange
from hvd_accordion.tensorflow.transport import Average, ProcessSet, global_process_set
from hvd_accordion.training.settings import groups_of


# over 60 lines: Horovod's arguments, and what they mean
def DistributedGradientTape(
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Compression | GradientExchange | type = None,
    sparse_as_dense: bool = False,
    op: Any = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | list[list[Any]] | None = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
    *,
    steps_per_epoch: int | None = None,
    learning_rate: Any = None,
    seed: int = 0,
    batch_size: None = None,
) -> tf.GradientTape:
    """A tape like `gradtape` whose `gradient()` gives averages over the ranks, compressed on the way.

    All arguments of `horovod.tensorflow.DistributedGradientTape` keep their meaning; sources may be tf.Variable and
    keras.Variable.

    Args:
        compression: None, `hvd.Compression.none` or `.fp16`: plain Horovod; a spec (`PowerSGD(4)`, `TopK(0.01)`, ...);
            an `Accordion`; a dict from variable-name glob to any of these, first match counts, no match is dense; or a
            `GradientExchange`, which holds the settings and the state.
        device_dense, device_sparse: where exchanges run, such as "/cpu:0".
        steps_per_epoch, learning_rate, seed: as `GradientExchange`'s.
        batch_size: ValueError unless None: a tape can't skip an update, a `DistributedOptimizer` can.

    What compression keeps from step to step belongs to the sources: every tape on the same sources with the same
    arguments continues where the last one ended, as long as the first source lives. To save it, to read its report, or
    to call `end_epoch`, pass a `GradientExchange` instead, and no other arguments.

    Raises ValueError or TypeError as `GradientExchange` does.
    """
    if not isinstance(gradtape, tf.GradientTape):
        raise TypeError(f"gradtape must be a tf.GradientTape, got {gradtape!r}")
    settings = compression.settings if isinstance(compression, GradientExchange) else None
    if batch_size is not None or (settings is not None and settings.batch_size is not None):
        raise ValueError(
            "batch_size must be None for a tape, which can't skip an update: pass it to DistributedOptimizer"
        )
    groups = groups_of(num_groups, groups)
    base = type(gradtape)
    kind: Any = type(base.__name__, (Distributed, base), {})
    tape = kind.__new__(kind)
    tape.__dict__.update(gradtape.__dict__)
    tape._hvd_device = device_dense or device_sparse
    tape._hvd_local = []
    if isinstance(compression, GradientExchange):
        tape._hvd_exchange = lambda sources: compression
    else:
        arguments = {
            "steps_per_epoch": steps_per_epoch,
            "learning_rate": learning_rate,
            "seed": seed,
            "op": op,
            "gradient_predivide_factor": gradient_predivide_factor,
            "groups": groups,
            "sparse_as_dense": sparse_as_dense,
            "process_set": process_set,
            "scale_local_gradients": scale_local_gradients,
            "optimizer": base.__name__,
        }
        GradientExchange(compression, **arguments)  # errors in the arguments are raised here
        tape._hvd_exchange = lambda sources: exchange_of(sources, compression, arguments)
    return tape


def PartialDistributedGradientTape(
    gradtape: tf.GradientTape, *args: Any, local_layers: Any = None, **kwargs: Any
) -> tf.GradientTape:
    """As `DistributedGradientTape`, but the gradients of `local_layers` stay the rank's own."""
    tape = DistributedGradientTape(gradtape, *args, **kwargs)
    for variable in trainable_of(local_layers):
        tape.register_local_source(variable)
    return tape


class Distributed:
    """Mixed into the class of the tape that is wrapped, by `DistributedGradientTape`."""

    _hvd_device: str
    _hvd_local: list[Any]  # sources whose gradients stay the rank's own
    _hvd_exchange: Callable[[Sequence[Any]], GradientExchange]  # of the sources

    @tf.autograph.experimental.do_not_convert
    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        use_generic_names: bool = False,
        **options: Any,
    ) -> Any:
        """As the tape's own, averaged over the ranks. Names of collectives are always the same on all ranks."""
        del use_generic_names
        gradients = tf.nest.flatten(super().gradient(target, sources, output_gradients, **options))  # type: ignore[misc]
        flat = tf.nest.flatten(sources)
        if not flat:
            return gradients
        exchange = self._hvd_exchange(flat)
        for variable in self._hvd_local:
            exchange.register_local(variable)
        with tf.device(self._hvd_device or None):
            averaged = exchange(gradients, flat)
        return tf.nest.pack_sequence_as(sources, averaged)

    def register_local_source(self, source: Any) -> None:
        """The gradient of this variable stays the rank's own."""
        self._hvd_local.append(source)

    def get_local_and_global_gradients(
        self, target: Any, sources: Sequence[Any], output_gradients: Any = None, use_generic_names: bool = False
    ) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
        """(source, gradient) of the local sources, and of the others."""
        pairs = list(zip(sources, self.gradient(target, sources, output_gradients), strict=True))
        local = {id(value_of(v)) for v in self._hvd_local}
        return (
            [(v, g) for v, g in pairs if id(value_of(v)) in local],
            [(v, g) for v, g in pairs if id(value_of(v)) not in local],
        )


# by the first source, then by all of them and the arguments
_exchanges: dict[int, dict[tuple[Any, ...], GradientExchange]] = {}


def exchange_of(sources: Sequence[Any], compression: Any, arguments: dict[str, Any]) -> GradientExchange:
    """The exchange of these sources under these arguments: one, however many tapes there are."""
    values = [value_of(v) for v in sources]
    first = id(values[0])
    if first not in _exchanges:
        _exchanges[first] = {}
        weakref.finalize(values[0], _exchanges.pop, first, None)
    described = {**arguments, "op": str(arguments["op"]), "process_set": arguments["process_set"].process_set_id}
    described["learning_rate"] = None  # a function made anew in every step
    groups = arguments["groups"]
    if isinstance(groups, list):
        described["groups"] = [[id(value_of(v)) for v in group] for group in groups]
    key = (tuple(map(id, values)), repr(compression), repr(described))
    if key not in _exchanges[first]:
        _exchanges[first][key] = GradientExchange(compression, **arguments)
    return _exchanges[first][key]
