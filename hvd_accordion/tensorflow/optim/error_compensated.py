"""ECLK and its siblings over TensorFlow's variables, eagerly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.ops import tensorflow as ops
from hvd_accordion.optim import factories, methods, smoothness
from hvd_accordion.optim.training import Reports, Training
from hvd_accordion.policy.assignment import Compression
from hvd_accordion.tensorflow.exchange.agreement import from_rank_0, require_equal
from hvd_accordion.tensorflow.exchange.eager_driver import EagerDriver
from hvd_accordion.tensorflow.exchange.variables import names_of, value_of
from hvd_accordion.tensorflow.transport import ProcessSet, connect, global_process_set
from hvd_accordion.training import elastic
from hvd_accordion.training.reports import Logger
from hvd_accordion.training.vectors import Vectors
from hvd_accordion.utils import validation

Closure = Callable[[], Any]


class ErrorCompensated(Reports):
    """A method of `optim.methods` on tf.Variable or keras.Variable.

    Args:
        make: the method, see `optim.factories`.
    """

    def __init__(
        self,
        params: Sequence[Any],
        compression: Compression,
        make: factories.Make,
        seed: int,
        *,
        process_set: ProcessSet = global_process_set,
        steps_per_epoch: int | None = None,
        logger: Logger | None = None,
    ) -> None:
        elastic.refuse(type(self).__name__, "its ranks hold parts of one sum, which a rank that leaves takes along")
        self.variables = [value_of(v) for v in params]
        if not self.variables or not all(hasattr(v, "assign") for v in self.variables):
            raise ValueError(f"params must be variables, at least one, got {params!r}")
        wide = self._x()
        names = names_of(list(params))
        layers = [factories.layer_of(n, tuple(v.shape), v.dtype.name) for n, v in zip(names, wide, strict=True)]
        self._transport, self._prefix = connect(process_set), Prefix(process_set)
        if not process_set.included():
            raise ValueError(
                f"process_set must include this rank, got {process_set}: only its members make the optimizer"
            )
        rank, size = self._transport.rank, self._transport.size
        share = self._from_rank_0 if size > 1 else list
        self._training = Training(ops, layers, compression, make, seed, rank, size, share, steps_per_epoch, logger)
        self._driver: EagerDriver | None = None  # as long as ranks have not compared what they must have in common

    def step(self, closure: Closure, full_closure: Closure | None = None) -> Any:
        """A round. Returns closure's loss at x.

        Args:
            closure: the loss of the sample of this step, in terms of the variables; may be a tf.function. It is called at
                x, and at w again: what is random in it must be the same then (`tf.random.stateless_*`), and batch
                normalisation must not be in training mode.
            full_closure: the mean loss over all of this rank's data, called where w has moved. The same function as
                `closure` where there is no sampling.
        """
        self._training.check_closures(closure, full_closure)
        x = self._x()
        driver = self._driver or self._compared(x)
        losses: list[Any] = []

        def gradient(loss_at: Closure) -> Callable[[Vectors], Vectors]:
            def at(point: Vectors) -> Vectors:
                self._place(point)
                loss, found = gradients(loss_at, self.variables)
                if point is x:
                    losses.append(loss)
                return found

            return at

        sampled = gradient(closure)
        full = sampled if full_closure in (None, closure) else gradient(full_closure)
        try:
            x = self._training.step(x, sampled, full, driver.run)
        finally:
            self._place(x)
        return losses[0]

    def _x(self) -> Vectors:
        return ops.upcast([v.read_value() for v in self.variables])

    def _place(self, point: Vectors) -> None:
        for v, value in zip(self.variables, point, strict=True):
            v.assign(tf.cast(value, v.dtype))

    def _compared(self, x: Vectors) -> EagerDriver:
        """The driver, after all ranks have compared settings and the values of all that must be equal."""
        digest = hashlib.blake2b(digest_size=8)
        for v in [*x, *self._training.worker.shared()]:
            digest.update(v.numpy().tobytes())
        require_equal(self._training.described(digest.hexdigest()), str(self._prefix), self._transport)
        self._driver = EagerDriver(str(self._prefix), self._transport)
        return self._driver

    def _from_rank_0(self, numbers: Any) -> list[float]:
        return from_rank_0(numbers, f"{self._prefix}.norms", self._transport)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, but for x, as dicts of numpy arrays and numbers: save and load one file per rank."""
        return tf.nest.map_structure(
            lambda v: v.numpy() if tf.is_tensor(v) else v, self._training.worker.state_dict(), expand_composites=False
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up saved state; with the variables as they were, the next steps are the same bit for bit."""
        self._training.worker.load_state_dict(state, tf.convert_to_tensor)
        self._driver = None  # ranks compare anew


def gradients(closure: Closure, variables: Sequence[tf.Variable]) -> tuple[Any, Vectors]:
    """The loss and its gradients, dense, zeros where there are none."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(variables)
        loss = closure()
    found = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return loss, ops.upcast([tf.convert_to_tensor(g) for g in found])


class ECLK(methods.ECLK, ErrorCompensated):
    __doc__ = methods.ECLK.__doc__


class LKatyusha(methods.LKatyusha, ErrorCompensated):
    __doc__ = methods.LKatyusha.__doc__


class ECSGD(methods.ECSGD, ErrorCompensated):
    __doc__ = methods.ECSGD.__doc__


class ECLSVRG(methods.ECLSVRG, ErrorCompensated):
    __doc__ = methods.ECLSVRG.__doc__


class LSVRG(methods.LSVRG, ErrorCompensated):
    __doc__ = methods.LSVRG.__doc__


class EF21(methods.EF21, ErrorCompensated):
    __doc__ = methods.EF21.__doc__


def estimate_smoothness(
    closure: Closure,
    params: Sequence[Any],
    iterations: int = 30,
    seed: int = 0,
    process_set: ProcessSet = global_process_set,
) -> float:
    """The smoothness constant L of the mean over the ranks of their losses: the Hessian's largest eigenvalue, at the
    variables' values of now, by power iteration on differences of gradients. Every rank must call it.

    Exact where the curvature is largest there (a logistic regression at 0), else too small.

    Args:
        closure: the mean loss over all of this rank's data.
        params: the variables.
        iterations: at most, >= 1; two gradients each.
    """
    elastic.refuse("estimate_smoothness", "it exchanges where ranks that have just come do not")
    validation.integer("iterations", iterations, 1)
    variables, prefix = [value_of(v) for v in params], f"{Prefix(process_set)}.smoothness"
    x = ops.upcast([v.read_value() for v in variables])

    def place(point: Vectors) -> None:
        for v, value in zip(variables, point, strict=True):
            v.assign(tf.cast(value, v.dtype))

    def gradient(point: Vectors) -> Vectors:
        place(point)
        _, own = gradients(closure, variables)
        return connect(process_set).mean(own, prefix)

    try:
        return smoothness.estimate(ops, x, gradient, iterations, seed)
    finally:
        place(x)
