"""An Adam over two exchanges, one of gradients and one of first moments: what 1-bit Adam and 0/1 Adam share in Keras."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.compression import Dense
from hvd_accordion.ops import tensorflow as ops
from hvd_accordion.optim import adam
from hvd_accordion.optim.adam import Adam, Interval
from hvd_accordion.optim.momentum_reports import MomentumReports
from hvd_accordion.optim.momentum_schedule import Counts, Schedule, mark_interval
from hvd_accordion.policy.assignment import MIN_NUMEL, Compression, assign
from hvd_accordion.tensorflow.exchange.agreement import require_equal
from hvd_accordion.tensorflow.exchange.state import wide_dtype
from hvd_accordion.tensorflow.gradient_exchange import GradientExchange
from hvd_accordion.tensorflow.internals import called_by_loss_scale_optimizer
from hvd_accordion.tensorflow.keras.learning_rate import rate_of
from hvd_accordion.tensorflow.keras.momentum_counts import CountVariables
from hvd_accordion.tensorflow.keras.saving import SavedState
from hvd_accordion.tensorflow.transport import ProcessSet, connect, global_process_set
from hvd_accordion.training import elastic
from hvd_accordion.training.reports import Logger, Stats
from hvd_accordion.training.settings import check_logger


class CompressedMomentum(MomentumReports, keras.optimizers.Optimizer):
    """An Adam that averages over the ranks by itself, as its schedule says, in a graph that is not traced again."""

    _dense: GradientExchange
    _momentum: GradientExchange

    def __init__(
        self,
        learning_rate: Any,
        beta_1: float,
        beta_2: float,
        epsilon: float,
        weight_decay: float | None,
        schedule: Schedule,
        compression: Compression,
        *,
        process_set: ProcessSet = global_process_set,
        seed: int = 0,
        min_compress_numel: int = MIN_NUMEL,
        logger: Logger | None = None,
        **options: Any,
    ) -> None:
        elastic.refuse(type(self).__name__, "its ranks hold parts of one sum, which a rank that leaves takes along")
        check_logger(logger)
        numbers = adam.checked(learning_rate, (beta_1, beta_2), epsilon, weight_decay or 0.0)
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay, **options)
        (self.beta_1, self.beta_2), self.epsilon = numbers["betas"], numbers["eps"]
        self._schedule, self._process_set, self._given_logger = schedule, process_set, logger
        self._logger, self._logged = None, Stats()
        self._prefix, self._compared = Prefix(process_set), False
        given: Any = {"process_set": process_set, "seed": seed, "min_compress_numel": min_compress_numel}
        itself = weakref.ref(self)
        self._dense = GradientExchange(Dense(), **given)
        self._momentum = GradientExchange(compression, learning_rate=lambda: rate_of(itself()), **given)
        self.dense_state, self.momentum_state = SavedState(self._dense), SavedState(self._momentum)

    def build(self, variables: Any) -> None:
        """Makes moments and counts, and the variables of the exchanges. Sends nothing.

        ValueError on a rank outside of the process set.
        """
        if not self._process_set.included():
            raise ValueError(
                f"process_set must include this rank, got {self._process_set}: only its members make the optimizer"
            )
        super().build(variables)
        local = self._schedule.max_interval > 1
        self._first, self._second = (self._like(variables, name) for name in ("momentum", "velocity"))
        self._means = self._like(variables, "mean_momentum") if local else []
        self._anchors = self.add_optimizer_variables(variables, "anchor") if local else []
        self._counts = CountVariables(self._schedule, self.add_variable)
        self._epochs = self.add_variable((), dtype="int64", name="epochs")
        self._rate_sum = self.add_variable((), dtype="float64", name="rate_sum")  # since the last exchange
        self._decay = self.add_variable((), initializer="ones", dtype="float64", name="decay")
        self._dense.build(variables)
        self._momentum.build(variables)
        self._start_logger(variables)

    def _like(self, variables: Sequence[Any], name: str) -> list[Any]:
        """Variables of their shapes, in fp32 at least."""
        return [self.add_variable(v.shape, dtype=wide(v).name, name=f"{v.name}_{name}") for v in variables]

    def _start_logger(self, variables: Sequence[Any]) -> None:
        transport = connect(self._process_set)
        if self._given_logger is None or self._logger is not None or transport.rank != 0:
            return
        configuration = self._momentum.configuration
        policy = assign(configuration.policy, [self._momentum.named.name(v) or "" for v in variables])
        run = type(self).__name__, configuration.compression, policy, transport.size
        self._given_logger.start(configuration.settings.logged(*run, "tensorflow", tf.__version__))
        self._logger = self._given_logger

    # a step, in the graph

    def _apply_weight_decay(self, variables: Any) -> None:
        """Nothing: it is part of the step."""

    @tf.autograph.experimental.do_not_convert
    def _backend_update_step(self, grads: Any, trainable_variables: Any, learning_rate: Any) -> None:
        """Exchanges what this step is to exchange, then moves the variables."""
        self._compare()
        variables = list(trainable_variables)
        grads = [tf.cast(tf.convert_to_tensor(g), wide(v)) for g, v in zip(grads, variables, strict=True)]
        numbers = Adam(
            tf.cast(learning_rate, tf.float64), self.beta_1, self.beta_2, self.epsilon, self.weight_decay or 0.0
        )
        branches: list[Callable[[], tf.Tensor]] = [
            functools.partial(step, grads, variables, numbers)
            for step in (self._step_dense, self._step_by_momentum, self._step_locally)
        ]
        kind = self._counts.kind()
        tf.switch_case(kind, branches if self._schedule.max_interval > 1 else branches[:2])
        self._counts.advance(kind)
        self._counts.measure(mark_interval(self.beta_2), self._norm)

    def _compare(self) -> None:
        """Once, eagerly: the ranks' schedules and numbers."""
        if self._compared:
            return
        described = {"optimizer": type(self).__name__, **vars(self._schedule)}
        described |= {name: getattr(self, name) for name in ("beta_1", "beta_2", "epsilon", "weight_decay")}
        with tf.init_scope():
            require_equal(described, str(self._prefix), connect(self._process_set))
        self._compared = True

    def _rate(self, numbers: Adam) -> tf.Tensor:
        return numbers.rate(tf.cast(self._counts["step"] + 1, tf.float64))

    def _parts(self, variables: Sequence[Any], numbers: Adam) -> list[tuple[Any, int, Adam]]:
        """Each variable, its place among the moments, and its numbers: some are excluded from weight decay."""
        plain = Adam(numbers.lr, numbers.beta1, numbers.beta2, numbers.eps, 0.0)
        decays = [self.weight_decay is not None and self._use_weight_decay(v) for v in variables]
        return [
            (v, self._get_variable_index(v), numbers if d else plain) for v, d in zip(variables, decays, strict=True)
        ]

    def _step_dense(self, grads: Sequence[Any], variables: Sequence[Any], numbers: Adam) -> tf.Tensor:
        means, rate = self._dense(grads_as(grads, variables), variables), self._rate(numbers)
        correction = numbers.correction(tf.cast(self._counts["updates"] + 1, tf.float64))
        for (v, i, its), mean in zip(self._parts(variables, numbers), means, strict=True):
            mean, first, second = tf.cast(mean, wide(v)), self._first[i], self._second[i]
            first.assign(its.first_moment(tf.convert_to_tensor(first), mean))
            second.assign(its.second_moment(tf.convert_to_tensor(second), mean))
            self._move(v, i, its, tf.convert_to_tensor(v), correction, Interval(rate, its.decay))
        return tf.constant(True)

    def _own_moments(self, grads: Sequence[Any], variables: Sequence[Any], numbers: Adam) -> list[tf.Tensor]:
        """This rank's first moments after its gradients of now."""
        found = []
        for (_, i, its), grad in zip(self._parts(variables, numbers), grads, strict=True):
            m = its.first_moment(tf.convert_to_tensor(self._first[i]), grad)
            found.append(adam.masked(ops, m, tf.convert_to_tensor(self._second[i])))
        return found

    def _means_with(self, moments: Sequence[tf.Tensor], variables: Sequence[Any], share: tf.Tensor) -> list[tf.Tensor]:
        """The mean moments of the interval up to now, of which the last have this share."""
        if not self._means:
            return list(moments)
        means = [tf.convert_to_tensor(self._means[self._get_variable_index(v)]) for v in variables]
        return [adam.blended(u, m, tf.cast(share, m.dtype)) for u, m in zip(means, moments, strict=True)]

    def _step_locally(self, grads: Sequence[Any], variables: Sequence[Any], numbers: Adam) -> tf.Tensor:
        rate, begins = self._rate(numbers), tf.equal(self._counts["since_exchange"], 0)
        interval = self._interval().extended(rate, numbers.decay)
        correction = numbers.correction(tf.cast(self._counts["updates"], tf.float64))
        moments = self._own_moments(grads, variables, numbers)
        means = self._means_with(moments, variables, interval.share(rate))
        for (v, i, its), m, u in zip(self._parts(variables, numbers), moments, means, strict=True):
            x, anchor = tf.convert_to_tensor(v), self._anchors[i]
            anchor.assign(tf.where(begins, x, tf.convert_to_tensor(anchor)))
            self._means[i].assign(u)
            self._first[i].assign(m)
            self._move(v, i, its, x, correction, Interval(rate, its.decay))
        self._keep(interval)
        return tf.constant(True)

    def _step_by_momentum(self, grads: Sequence[Any], variables: Sequence[Any], numbers: Adam) -> tf.Tensor:
        """All ranks go from where the interval began by the mean of their mean moments."""
        rate, begins = self._rate(numbers), tf.equal(self._counts["since_exchange"], 0)
        interval = self._interval().extended(rate, numbers.decay)
        correction = numbers.correction(tf.cast(self._counts["updates"], tf.float64))
        moments = self._own_moments(grads, variables, numbers)
        own = self._means_with(moments, variables, interval.share(rate))
        means = self._momentum(grads_as(own, variables), variables)
        for (v, i, its), mean in zip(self._parts(variables, numbers), means, strict=True):
            second, x = tf.convert_to_tensor(self._second[i]), tf.convert_to_tensor(v)
            self._first[i].assign(adam.masked(ops, tf.cast(mean, second.dtype), second))
            if self._anchors:
                x = tf.where(begins, x, tf.convert_to_tensor(self._anchors[i]))
            decays = its.weight_decay != 0
            self._move(v, i, its, x, correction, interval if decays else Interval(interval.rate))
        self._keep(Interval(tf.zeros_like(rate), tf.ones_like(rate)))
        return tf.constant(True)

    def _move(self, v: Any, i: int, numbers: Adam, x: tf.Tensor, correction: Any, interval: Interval) -> None:
        """The variable to where the interval that began at x ends."""
        m, second = tf.convert_to_tensor(self._first[i]), tf.convert_to_tensor(self._second[i])
        as_its = Interval(tf.cast(interval.rate, m.dtype), tf.cast(interval.decay, m.dtype))
        moved = numbers.moved(tf.cast(x, m.dtype), m, second, tf.cast(correction, m.dtype), as_its)
        v.assign(tf.cast(moved, v.dtype))

    def _interval(self) -> Interval:
        return Interval(tf.convert_to_tensor(self._rate_sum), tf.convert_to_tensor(self._decay))

    def _keep(self, interval: Interval) -> None:
        self._rate_sum.assign(interval.rate)
        self._decay.assign(interval.decay)

    def _norm(self) -> tf.Tensor:
        """||v||_1, corrected; the mean over the ranks of what should be equal is so for certain."""
        total = tf.add_n([tf.cast(tf.reduce_sum(tf.convert_to_tensor(v)), tf.float64) for v in self._second])
        norm = total / (1 - self.beta_2 ** tf.cast(self._counts["updates"], tf.float64))
        transport = connect(self._process_set)
        return norm if transport.size == 1 else transport.mean([norm], f"{self._prefix}.norm")[0]

    # what it can tell, and what is kept

    @property
    def _epoch(self) -> int:
        return int(tf.convert_to_tensor(self._epochs)) if self.built else 0

    @_epoch.setter
    def _epoch(self, value: int) -> None:
        if self.built:
            self._epochs.assign(value)

    def _now(self) -> Counts:
        return self._counts.now() if self.built else Counts()

    def broadcast(self, root_rank: int) -> None:
        """Gives every rank what compression keeps on `root_rank`, but for residuals; `variables` are the caller's."""
        self._dense.broadcast(root_rank)
        self._momentum.broadcast(root_rank)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss_scale_factor" and "_momentum" in self.__dict__ and called_by_loss_scale_optimizer():
            raise ValueError(
                f"mixed_float16: a LossScaleOptimizer around {type(self).__name__} would let a rank whose gradients overflow "
                "skip the exchange that the others wait in; use mixed_bfloat16"
            )
        super().__setattr__(name, value)


def wide(v: Any) -> tf.DType:
    """What the moments of a variable are kept in."""
    return wide_dtype(tf.as_dtype(v.dtype).name)


def grads_as(tensors: Sequence[tf.Tensor], variables: Sequence[Any]) -> list[tf.Tensor]:
    """In the dtypes of the variables, as an exchange takes them."""
    return [tf.cast(x, v.dtype) for x, v in zip(tensors, variables, strict=True)]
