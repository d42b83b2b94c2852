"""Mirrors horovod.tensorflow.elastic, on Keras 3, with what compression keeps in the state that ranks share and restore.

When ranks were gathered anew, whatever compresses plans for their new number, scales its residuals, and compares settings
at its next exchange. `State.sync` gives newcomers what all have in common. A residual is its rank's own: newcomers begin
without, and that of a rank that is gone is lost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow.elastic as _horovod
import tensorflow as tf
from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError
from horovod.tensorflow.functions import broadcast_object
from horovod.tensorflow.mpi_ops import init, rank, shutdown

from hvd_accordion.comm import naming
from hvd_accordion.tensorflow.broadcasting import broadcast_variables
from hvd_accordion.tensorflow.exchange import registry
from hvd_accordion.tensorflow.exchange.shared import shared
from hvd_accordion.tensorflow.exchange.variables import value_of
from hvd_accordion.tensorflow.transport import has_failed

__all__ = [*_horovod.__all__]


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function of a state that trains: it is called again whenever ranks were gathered anew.

    As `horovod.tensorflow.elastic.run`. Before each call the state is synchronised, but where ranks were only removed.
    """
    return run_fn(_translated(func), _gather)


def _gather() -> None:
    shutdown()
    init()
    naming.gathered()
    registry.move()


def _translated(func: Callable[..., Any]) -> Callable[..., Any]:
    """The function; where a collective failed in TensorFlow it raises what Horovod's loop takes for a rank that is gone."""

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return func(*args, **kwargs)
        except tf.errors.OpError as error:
            if has_failed(error):
                raise HorovodInternalError(str(error)) from error
            raise

    return wrapper


class _State(ObjectState):
    """Variables, what compression keeps for their gradients, and attributes of any kind."""

    def __init__(self, **kwargs: Any) -> None:
        self._saved: list[Callable[[], None]] = []
        self._save()
        super().__init__(bcast_object=broadcast_object, get_rank=rank, **kwargs)

    def _variables(self) -> Sequence[Any]:
        raise NotImplementedError

    def _own(self, variable: Any) -> bool:
        """Whether each rank has its own value."""
        del variable
        return False

    def _exchanges(self) -> list[Any]:
        """Those that exchange the gradient of any of the variables."""
        variables = self._variables()
        return [exchange for exchange in registry.alive() if exchange.knows_any(variables)]

    def save(self) -> None:
        """Keeps a copy of it all in memory."""
        self._save()
        super().save()

    def _save(self) -> None:
        exchanges = self._exchanges()
        self._saved = [saved(self._variables()), *(exchange.saved() for exchange in exchanges)]

    def restore(self) -> None:
        """Everything as it was when it was last saved."""
        for back in self._saved:
            back()
        super().restore()

    @_translated
    def sync(self) -> None:
        """Gives every rank what rank 0 has, but for residuals, and saves that."""
        broadcast_variables([v for v in self._variables() if not self._own(v)], 0)
        exchanges = self._exchanges()
        theirs = broadcast_object(
            [shared(x) for x in exchanges] if rank() == 0 else None, 0, name="hvd_accordion.state"
        )
        if rank() != 0:
            for exchange, its in zip(exchanges, theirs, strict=False):
                exchange.take(its)
        registry.wait(theirs[len(exchanges) :])
        self._save()
        super().sync()


def saved(variables: Sequence[Any]) -> Callable[[], None]:
    """A function that gives the variables the values of now."""
    values = {id(v): (v, tf.identity(v.read_value())) for v in map(value_of, variables)}

    def back() -> None:
        for v, value in values.values():
            v.assign(value)

    return back


class TensorFlowKerasState(_State):
    """A Keras model and its optimizers, with what compression keeps for them, and attributes of any kind.

    Args:
        model: built; its states of random seeds stay each rank's own.
        optimizer: where it is not compiled into the model. One that has no variables yet makes them now.
        backend: not needed with Keras 3.
        kwargs: the attributes.

    Raises ValueError where the model is not built or there is no optimizer.
    """

    def __init__(self, model: Any, optimizer: Any = None, backend: Any = None, **kwargs: Any) -> None:
        if not getattr(model, "built", True):
            raise ValueError("Model must be built first. Run `model.build(input_shape)`.")
        self.model, self.backend = model, backend
        self.optimizer = optimizer or getattr(model, "optimizer", None)
        if self.optimizer is None:
            raise ValueError("optimizer must be given or compiled into the model, got None for both")
        if not self.optimizer.built:
            self.optimizer.build(model.trainable_variables)
        super().__init__(**kwargs)

    def _variables(self) -> Sequence[Any]:
        from hvd_accordion.tensorflow.keras.epochs import optimizers_of

        found = [*self.model.variables]
        for optimizer in (self.optimizer, *optimizers_of(self.model)):
            found += optimizer.variables
        return list({id(value_of(v)): v for v in found}.values())

    def _own(self, variable: Any) -> bool:
        return variable.name == "seed_generator_state"


class TensorFlowState(_State):
    """A list of variables, with what compression keeps for their gradients, and attributes of any kind.

    Args:
        variables: tf.Variable or keras.Variable.
        session: must be None: TensorFlow 1's.
        kwargs: the attributes.

    Raises ValueError for a session or graph of TensorFlow 1, or without variables.
    """

    def __init__(self, variables: Sequence[Any] | None = None, session: Any = None, **kwargs: Any) -> None:
        if session is not None or not tf.executing_eagerly():
            raise ValueError(
                "session must be None: elastic training needs eager execution, not a graph of TensorFlow 1"
            )
        if not variables:
            raise ValueError(f"variables must be a list of at least one tf.Variable, got {variables!r}")
        self.variables, self.session = list(variables), session
        super().__init__(**kwargs)

    def _variables(self) -> Sequence[Any]:
        return self.variables


for _name in (name for name in dir(_horovod) if not name.startswith("_")):
    globals().setdefault(_name, getattr(_horovod, _name))
