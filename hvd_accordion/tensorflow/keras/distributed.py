"""What a distributed Keras optimizer does more than its own class: it averages gradients before it applies them."""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf

from hvd_accordion.policy.auto import Advice
from hvd_accordion.tensorflow.gradient_exchange import GradientExchange
from hvd_accordion.tensorflow.internals import called_by_loss_scale_optimizer
from hvd_accordion.tensorflow.keras import copies
from hvd_accordion.tensorflow.keras.accumulation import LocalSums
from hvd_accordion.tensorflow.keras.copies import Wrapping
from hvd_accordion.tensorflow.keras.learning_rate import counters, rate_of, scaled_rate
from hvd_accordion.tensorflow.keras.saving import SavedState
from hvd_accordion.tensorflow.transport import is_initialized, world_size
from hvd_accordion.training.reports import CompressionReport, Stats

LOST = (
    "this optimizer was made from the config of a DistributedOptimizer whose settings this process does not have, so it "
    "can't exchange gradients: compile with hvd.DistributedOptimizer(model.optimizer, compression=...), or load the model "
    "by hvd.load_model(file, compression=...)"
)


class Distributed:
    """Mixed into the class of the optimizer that is wrapped, by `distributed`."""

    _hvd: GradientExchange
    _hvd_base: type  # the class of the wrapped optimizer
    _hvd_scale: Any  # of the learning rate, within `scaled_rate`
    # Keras's own
    name: str
    built: bool
    _trainable_variables: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Called by Keras alone, with what was in a config."""
        super().__init__(*args, **kwargs)
        wrapping = copies.wrapping_of(type(self), self.name)
        self._hvd_copied = not copies.loading()
        self._attach(wrapping or Wrapping(), lost=wrapping is None)

    def _attach(self, wrapping: Wrapping, lost: bool = False) -> None:
        """`lost`: the wrapping is not the one that it was saved with."""
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
        reduced: Any = super().__reduce__()
        rebuild, data = reduced
        return getattr(self._hvd_base, rebuild.__name__), data  # of a class that can be imported

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
        if self._hvd_lost and is_initialized() and world_size() > 1:
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
        """`count`: of micro-batches, under an AccordionBatchSize."""
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
        """An epoch is over: needed without `steps_per_epoch` and without a callback of this package. On every rank.

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

    def broadcast(self, root_rank: int) -> None:
        """Gives every rank what compression keeps on `root_rank`, but for residuals; `variables` are the caller's."""
        sums = self._hvd_sums
        self._hvd.broadcast(root_rank, sums.count if sums.passes > 1 else None, list(sums.sums.values()))

    def advice(self) -> Advice:
        """What an `Auto` measured, what each choice would cost, what it chose. Prints as a table."""
        return self._hvd.advice()

    def compression_report(self) -> CompressionReport:
        """Per layer: shape, compression now, regime, bytes a step, dense bytes, share of the whole. Prints as a table."""
        return self._hvd.compression_report().under(self._hvd_base.__name__)

    @property
    def stats(self) -> Stats:
        """Running totals of steps and bytes."""
        return self._hvd.stats

    def __setattr__(self, name: str, value: Any) -> None:
        # LossScaleOptimizer sets this on the optimizer that it wraps: the only sign of it
        if name == "loss_scale_factor" and "_hvd" in self.__dict__ and called_by_loss_scale_optimizer():
            super().__setattr__("_hvd_loss_scaled", True)
        if name == "learning_rate" and self.__dict__.get("_hvd_scale") is not None and not callable(value):
            value = value / tf.cast(self._hvd_scale, getattr(value, "dtype", tf.float32))
        super().__setattr__(name, value)


class LossScaled(Distributed):
    """Exchanges gradients without their scale, so that residuals don't depend on it; what overflows does so on all ranks."""

    dynamic_scale: Any

    def _averaged(self, grads: list[Any], variables: list[Any], count: tf.Tensor | None) -> list[Any]:
        scale = tf.convert_to_tensor(self.dynamic_scale)  # a power of two: nothing is rounded
        means = super()._averaged([scaled(g, 1 / scale) for g in grads], variables, count)
        return [scaled(mean, scale) for mean in means]


def scaled(gradient: Any, factor: tf.Tensor) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        values = gradient.values * tf.cast(factor, gradient.values.dtype)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return None if gradient is None else gradient * tf.cast(factor, gradient.dtype)


@functools.cache
def distributed(base: type) -> type:
    """The subclass of an optimizer's class that exchanges gradients."""
    scaling = issubclass(base, keras.optimizers.LossScaleOptimizer)
    kind = type(base.__name__, (LossScaled if scaling else Distributed, base), {"_hvd_base": base})
    kind.__module__ = base.__module__  # saved under the name of the wrapped class
    if base.__module__.startswith("keras."):
        copies.register(kind, base.__name__)
    return kind


for _class in [c for c in vars(keras.optimizers).values() if isinstance(c, type)]:
    if issubclass(_class, keras.optimizers.Optimizer):
        distributed(_class)  # a config that another process wrote is found to be a distributed optimizer's
