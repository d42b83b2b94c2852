"""DistributedOptimizer for Keras 3: an optimizer of the wrapped one's own class, which averages gradients first."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from hvd_accordion.policy.assignment import MIN_NUMEL, Compression
from hvd_accordion.policy.auto import Advice
from hvd_accordion.policy.batch_size import AccordionBatchSize
from hvd_accordion.tensorflow.exchange.variables import trainable_of
from hvd_accordion.tensorflow.gradient_exchange import GradientExchange
from hvd_accordion.tensorflow.keras import copies
from hvd_accordion.tensorflow.keras.accumulation import LocalSums
from hvd_accordion.tensorflow.keras.copies import Wrapping
from hvd_accordion.tensorflow.keras.learning_rate import counters, members, rate_of, scaled_rate
from hvd_accordion.tensorflow.keras.saving import SavedState
from hvd_accordion.training.reports import CompressionReport, Logger, Stats
from hvd_accordion.training.settings import groups_of
from hvd_accordion.utils import validation

LOST = (
    "this optimizer was made from the config of a DistributedOptimizer whose settings this process does not know, so it "
    "can't exchange gradients: compile with hvd.DistributedOptimizer(model.optimizer, compression=...), or load the model "
    "by hvd.load_model(file, compression=...)"
)


def DistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Compression | type = None,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = hvd.Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: int | list[list[Any]] | None = None,
    process_set: hvd.ProcessSet = hvd.global_process_set,
    scale_local_gradients: bool = True,
    *,
    steps_per_epoch: int | None = None,
    logger: Logger | None = None,
    seed: int = 0,
    min_compress_numel: int = MIN_NUMEL,
    batch_size: AccordionBatchSize | None = None,
) -> keras.optimizers.Optimizer:
    """An optimizer that averages gradients over the ranks, compressed, before it applies them.

    All arguments of `horovod.tensorflow.keras.DistributedOptimizer` keep their meaning. The result is of a subclass of
    the optimizer's class with its name, its state and its settings: weight decay, clipping and moving averages act on
    averaged gradients. `get_config` is the wrapped optimizer's, so that a saved model loads without Horovod, by
    `keras.models.load_model`, or with it, by `load_model`; saved with the model are this rank's residuals too, and
    `tf.train.Checkpoint` holds them.

    Args:
        optimizer: any Keras 3 optimizer. Under mixed_float16 pass a `keras.optimizers.LossScaleOptimizer`: where Keras
            puts its own around the result, a rank whose gradients overflow would skip an exchange that others wait in.
        name: of the optimizer.
        compression: None, `hvd.Compression.none` or `.fp16`: plain Horovod; a spec (`PowerSGD(4)`, `TopK(0.01)`, ...);
            an `Accordion`; or a dict from variable-path glob ("conv2d*/kernel") to any of these, first match counts, no
            match is dense. 1-D and small tensors, and those that would not get smaller, travel dense; so do
            IndexedSlices, unless `sparse_as_dense`.
        device_dense, device_sparse: where exchanges run, such as "/cpu:0".
        backward_passes_per_step: steps whose gradients add up locally before they are exchanged and applied; with
            `average_aggregated_gradients` their mean counts, else their sum.
        groups: as Horovod's; by default runs of layers of up to 16 MiB, from the last to the first.
        steps_per_epoch: not needed under `fit` with any callback of this package, nor where `end_epoch` is called. An
            Accordion that counts epochs raises ValueError when it has heard of none in 10,000 steps.
        logger: told on rank 0 of what happened, such as `MLflowLogger()`.
        seed: of everything random in compression; the global generators are left alone.
        min_compress_numel: tensors of fewer elements travel dense.
        batch_size: an `AccordionBatchSize`. A micro-batch a call, exchanged and applied with the last of a batch; the others
            only add up and count as iterations. The rate is scaled for that update alone, in the graph, whether it is a
            number or a schedule; the velocity of Keras's SGD, which contains the rate, stays as it is. Micro-batches left
            over at the end of an epoch make a smaller batch: known beforehand with `steps_per_epoch`, else applied by
            `end_epoch` (a callback's, after the validation). `compression=None` is `Dense()` then. Not with
            `backward_passes_per_step`, nor with Keras's `gradient_accumulation_steps`. The sums take as much memory as the
            gradients.

    The result also has `end_epoch`, `compression_report`, `advice`, `stats` and `register_local_var`.

    Raises ValueError or TypeError for arguments out of range; at the first step, on every rank the same, where ranks are
    configured differently.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(f"optimizer must be a keras.optimizers.Optimizer, got {optimizer!r}")
    if isinstance(optimizer, _Distributed) and not optimizer._hvd_copied:
        raise ValueError(
            "optimizer is a DistributedOptimizer of hvd_accordion already; pass the one that it was made from"
        )
    if op not in (hvd.Average, hvd.Sum):
        raise ValueError("op currently only supports Average and Sum")
    validation.boolean("average_aggregated_gradients", average_aggregated_gradients)
    groups = groups_of(num_groups, groups)
    arguments = {
        "compression": compression,
        "sparse_as_dense": sparse_as_dense,
        "gradient_predivide_factor": gradient_predivide_factor,
        "op": op,
        "backward_passes_per_step": backward_passes_per_step,
        "groups": groups,
        "process_set": process_set,
        "scale_local_gradients": scale_local_gradients,
        "steps_per_epoch": steps_per_epoch,
        "logger": logger,
        "seed": seed,
        "min_compress_numel": min_compress_numel,
        "batch_size": batch_size,
    }
    if batch_size is not None and any(one.gradient_accumulation_steps for one in members(optimizer)):
        raise ValueError("the optimizer's gradient_accumulation_steps must be None with batch_size")
    base = type(optimizer)
    if isinstance(optimizer, _Distributed):
        base = base.__mro__[2]
    if base.__module__ == "horovod._keras":
        base, arguments = base.__mro__[1], {**arguments, **taken_over(optimizer, compression)}
        if optimizer._agg_helper is not None:
            average_aggregated_gradients = optimizer._agg_helper.average_aggregated_gradients
    kind = distributed(base)
    result = kind.__new__(kind)
    result.__dict__.update(optimizer.__dict__)
    result._hvd_copied = False
    result._attach(Wrapping(arguments, average_aggregated_gradients, device_dense or device_sparse))
    if name is not None:
        result.name = name
    if optimizer.built:
        result._extend(optimizer._trainable_variables)
    return result


def PartialDistributedOptimizer(
    optimizer: keras.optimizers.Optimizer, *args: Any, local_layers: Any = None, **kwargs: Any
) -> keras.optimizers.Optimizer:
    """As `DistributedOptimizer`, but the gradients of `local_layers` stay the rank's own."""
    result = DistributedOptimizer(optimizer, *args, **kwargs)
    for v in trainable_of(local_layers):
        result.register_local_var(v)
    return result


def taken_over(optimizer: Any, compression: Any) -> dict[str, Any]:
    """The settings of Horovod's own DistributedOptimizer, as far as it can still tell them."""
    reduce = optimizer._allreduce_grads
    theirs = inspect.getclosurevars(getattr(reduce, "python_function", reduce)).nonlocals
    found = {name: theirs[name] for name in ("op", "sparse_as_dense", "groups", "process_set")}
    found["gradient_predivide_factor"] = theirs["postscale_factor"] if theirs["op"] == hvd.Average else 1.0
    found["compression"] = theirs["compression"] if compression is None else compression
    found["scale_local_gradients"] = optimizer.scale_local_gradients
    helper = optimizer._agg_helper
    found["backward_passes_per_step"] = 1 if helper is None else helper.backward_passes_per_step
    return found


@functools.cache
def distributed(base: type) -> type:
    """The subclass of an optimizer's class that exchanges gradients."""
    scaling = issubclass(base, keras.optimizers.LossScaleOptimizer)
    kind = type(base.__name__, (_LossScaled if scaling else _Distributed, base), {})
    kind.__module__ = base.__module__  # saved under the name of the wrapped class
    if base.__module__.startswith("keras."):
        copies.register(kind, base.__name__)
    return kind


class _Distributed:
    """What a distributed optimizer does more than its own class."""

    _hvd: GradientExchange

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Called by Keras alone, with what was in a config."""
        super().__init__(*args, **kwargs)
        wrapping = copies.wrapping_of(type(self), self.name)
        self._hvd_copied = not copies.loading()
        self._attach(wrapping or Wrapping(), lost=wrapping is None)

    def _attach(self, wrapping: Wrapping, lost: bool = False) -> None:
        """`lost`: nobody knows what the wrapping was."""
        itself = weakref.ref(self)
        self._hvd = GradientExchange(
            learning_rate=lambda: rate_of(itself()), optimizer=type(self).__name__, **wrapping.arguments
        )
        self._hvd.local_names = wrapping.local
        settings, batch = self._hvd.settings, self._hvd.settings.batch_size
        passes = settings.backward_passes_per_step if batch is None else batch.factor
        self._hvd_sums = LocalSums(passes, wrapping.average or batch is not None, settings.sparse_as_dense)
        self._hvd.waiting = weakref.ref(self._hvd_sums)
        self.compression_state = SavedState(self._hvd, self._hvd_sums)  # Keras saves what it finds in attributes
        self._hvd_wrapping, self._hvd_lost = wrapping, lost
        self._hvd_given: set[str] = set()  # keys of the variables that have had a gradient to add up
        self._hvd_loss_scaled = False

    def get_config(self) -> dict[str, Any]:
        """The wrapped optimizer's; what is made from it in this process has the wrapping, too."""
        if not self._hvd_lost:
            local, groups = self._hvd.named_locals(), self._hvd_wrapping.arguments.get("groups")
            arguments = {**self._hvd_wrapping.arguments, "groups": None if isinstance(groups, list) else groups}
            again = None if local is None else replace(self._hvd_wrapping, arguments=arguments, local=local)
            copies.remember(type(self), self.name, again)
        return super().get_config()  # type: ignore[misc]

    def __reduce__(self) -> Any:
        rebuild, data = super().__reduce__()  # by a class that can be imported
        return getattr(type(self).__mro__[2], rebuild.__name__), data

    def build(self, variables: Any) -> None:
        """Makes the optimizer's variables and those of compression. Sends nothing."""
        if self._hvd_loss_scaled:
            raise ValueError(
                "mixed_float16: a LossScaleOptimizer around a DistributedOptimizer would let a rank whose gradients overflow "
                "skip the exchange that the others wait in; pass hvd.DistributedOptimizer(keras.optimizers."
                "LossScaleOptimizer(optimizer)) to compile"
            )
        super().build(variables)  # type: ignore[misc]
        self._extend(variables)

    def _extend(self, variables: Any) -> None:
        self._hvd.build(variables)
        self._hvd_sums.build(variables, [self._hvd.key(v) for v in variables])

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Averages the gradients over the ranks, then does what the optimizer does."""
        grads = list(grads)
        if not grads:
            return
        if self._hvd_lost and hvd.is_initialized() and hvd.size() > 1:
            raise ValueError(LOST)
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        if not self.built:
            with tf.name_scope(self.name):
                self.build(variables)
            self.built = True
        sums, batch = self._hvd_sums, self._hvd.settings.batch_size
        if sums.passes == 1:
            self._averaged_and_applied(grads, variables)
            return
        keys = [self._hvd.key(v) for v in variables]
        self._hvd_given.update(key for g, key in zip(grads, keys, strict=True) if g is not None)
        count = sums.add(grads, keys)
        last = count >= (sums.passes if batch is None else self._hvd.micro_batches())

        def step() -> tf.Tensor:
            self._apply_sums(variables, count)
            return last

        def wait() -> tf.Tensor:
            for count in counters(self):
                count.assign_add(1)
            return last

        tf.cond(last, step, wait)

    def _apply_sums(self, variables: list[Any], count: tf.Tensor) -> None:
        """An update from the sums of `count` passes."""
        sums, given = self._hvd_sums, self._hvd_given
        keys = [self._hvd.key(v) for v in variables]
        totals = [sums.total(v, key, count) if key in given else None for v, key in zip(variables, keys, strict=True)]
        self._averaged_and_applied(totals, variables, None if self._hvd.settings.batch_size is None else count)
        sums.clear()

    def _averaged_and_applied(self, grads: list[Any], variables: list[Any], count: tf.Tensor | None = None) -> None:
        """`count`: of micro-batches, where an AccordionBatchSize wants to know."""
        scale = None if count is None else self._hvd.lr_scale(count)
        means = self._averaged(grads, variables, count)
        with scaled_rate(self, scale):
            super().apply(means, variables)  # type: ignore[misc]

    def _averaged(self, grads: list[Any], variables: list[Any], count: tf.Tensor | None) -> list[Any]:
        with tf.device(self._hvd_wrapping.device or None):
            return self._hvd(grads, variables, count)

    def register_local_var(self, var: Any) -> None:
        """The gradient of this variable stays the rank's own."""
        self._hvd.register_local(var)

    def end_epoch(self) -> None:
        """An epoch is over: needed where no callback of this package, no `steps_per_epoch` tells. On every rank.

        Micro-batches that wait for others are exchanged and applied.
        """
        if self._hvd.settings.batch_size is not None and int(self._hvd_sums.count) > 0:
            self._apply_leftovers()
        self._hvd.end_epoch()

    def _apply_leftovers(self) -> None:
        counted = [(count, int(count)) for count in counters(self)]
        for count, number in counted:
            count.assign(number - 1)  # the last micro-batch has been counted, and is again by its update
        self._hvd_given = self._hvd_given or set(self._hvd_sums.sums)  # restored, with no step since
        self._apply_sums(self._trainable_variables, self._hvd_sums.count.read_value())
        for count, number in counted:
            count.assign(number)

    def advice(self) -> Advice:
        """What an `Auto` measured, what each choice would cost, what it chose. Prints as a table."""
        return self._hvd.advice()

    def compression_report(self) -> CompressionReport:
        """Per layer: shape, compression now, regime, bytes a step, dense bytes, share of the whole. Prints as a table."""
        return self._hvd.compression_report()

    @property
    def stats(self) -> Stats:
        """Running totals of steps and bytes."""
        return self._hvd.stats

    def __setattr__(self, name: str, value: Any) -> None:
        # what LossScaleOptimizer does to the optimizer that it is put around: the only thing that it lets one know
        if name == "loss_scale_factor" and "_hvd" in self.__dict__ and called_by_loss_scale_optimizer():
            super().__setattr__("_hvd_loss_scaled", True)
        if name == "learning_rate" and self.__dict__.get("_hvd_scale") is not None and not callable(value):
            value = value / tf.cast(self._hvd_scale, getattr(value, "dtype", tf.float32))
        super().__setattr__(name, value)


def called_by_loss_scale_optimizer() -> bool:
    frame = inspect.currentframe()
    caller = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
    return caller is not None and isinstance(caller.f_locals.get("self"), keras.optimizers.LossScaleOptimizer)


class _LossScaled(_Distributed):
    """Exchanges gradients without their scale, so that residuals don't depend on it; what overflows does so on all ranks."""

    def _averaged(self, grads: list[Any], variables: list[Any], count: tf.Tensor | None) -> list[Any]:
        scale = tf.convert_to_tensor(self.dynamic_scale)  # a power of two: nothing is rounded
        means = super()._averaged([scaled(g, 1 / scale) for g in grads], variables, count)
        return [scaled(mean, scale) for mean in means]


def scaled(gradient: Any, factor: tf.Tensor) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        values = gradient.values * tf.cast(factor, gradient.values.dtype)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return None if gradient is None else gradient * tf.cast(factor, gradient.dtype)


def load_model(
    filepath: Any,
    custom_optimizers: Any = None,
    custom_objects: Mapping[str, Any] | None = None,
    compression: Compression | type = None,
    legacy_opts: bool = False,
    **options: Any,
) -> keras.Model:
    """A saved Keras model whose optimizer averages gradients over the ranks, with all of its state.

    A residual is its rank's own: save and load one file per rank to resume exactly.

    Args:
        filepath: as `keras.models.load_model`'s.
        custom_optimizers: classes of optimizers beside those of Keras.
        custom_objects: as Keras's.
        compression, options: as `DistributedOptimizer`'s.
    """
    del legacy_opts
    classes = [c for c in vars(keras.optimizers).values() if isinstance(c, type)]
    classes = [c for c in classes if issubclass(c, keras.optimizers.Optimizer)] + list(custom_optimizers or ())
    wrapping = DistributedOptimizer(keras.optimizers.SGD(), compression=compression, **options)._hvd_wrapping
    objects = {c.__name__: distributed(c) for c in classes}
    with copies.wrapped(wrapping):
        model = keras.models.load_model(filepath, custom_objects={**objects, **(custom_objects or {})})
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or isinstance(optimizer, _Distributed):
        return model
    # saved by Keras's own optimizer: compiled again with the same settings, and its state
    config = keras.saving.deserialize_keras_object(model.get_compile_config())
    model.compile(**{**config, "optimizer": DistributedOptimizer(optimizer, compression=compression, **options)})
    return model


for _class in [c for c in vars(keras.optimizers).values() if isinstance(c, type)]:
    if issubclass(_class, keras.optimizers.Optimizer):
        distributed(_class)  # a config that another process wrote is known as a distributed optimizer's
