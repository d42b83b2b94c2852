"""An optimizer of the user's own class whose `step()` exchanges compressed gradients first."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.policy.assignment import Compression
from hvd_accordion.torch.exchange import state, uneven
from hvd_accordion.torch.exchange.engine import Engine
from hvd_accordion.torch.grad_scaler import refuse_scaler
from hvd_accordion.torch.learning_rate import batch_rate, largest_rate
from hvd_accordion.torch.reports import STATE
from hvd_accordion.torch.wrapped import Wrapped, wrapped
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.membership import Membership
from hvd_accordion.training.settings import Settings
from hvd_accordion.utils import validation


class Compressed(Wrapped):
    """What a DistributedOptimizer adds to the class of the user's optimizer, which comes after it among the bases.

    Attributes:
        _hvd: exchanges the gradients.
    """

    _hvd: Engine
    _should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The optimizer's step on the averaged gradients; a closure's gradients are averaged each time it is called.

        Where a batch is made of several micro-batches, nothing but their sums changes before the last.
        """
        if closure is not None:
            return self._step_with(closure)
        if self._should_synchronize and not self._hvd.synchronize():
            warnings.warn(
                "optimizer.step() called without optimizer.skip_synchronize() context after "
                "optimizer.synchronize(): the gradients are averaged already and not exchanged again.",
                stacklevel=2,
            )
        self._hvd.evaluation.begin()
        if self._hvd.waiting:
            refuse_scaler()
            return None
        with batch_rate(self) as scale:
            scale()
            return super().step()

    step.hooked = True  # type: ignore[attr-defined]  # by torch's step hooks: the base's step calls them

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        engine, calls = self._hvd, 0
        with batch_rate(self) as scale:

            def synchronized() -> Any:
                nonlocal calls
                calls += 1
                if calls > 1 and engine.settings.batch_size is not None:
                    raise ValueError(
                        f"batch_size: {type(self).__name__} calls its closure several times in a step, but a batch's "
                        "micro-batches are there only once; use another optimizer"
                    )
                engine.evaluation.begin(further=calls > 1)
                with torch.enable_grad():
                    loss = closure()
                if self._should_synchronize:
                    engine.synchronize()  # nothing, if the closure has done so
                scale()
                return loss

            try:
                return super().step(synchronized) if engine.due else synchronized()
            finally:
                engine.evaluation.begin()

    def end_epoch(self) -> None:
        """An epoch is over: needed where `steps_per_epoch` was not given. The same on every rank.

        Micro-batches that wait for others are exchanged and applied. AssertionError between a backward pass that has
        started an exchange and the `step()` that ends it.
        """
        if self._hvd.in_flight:
            raise AssertionError(
                "optimizer.end_epoch() was called after loss.backward() but before optimizer.step() or "
                "optimizer.synchronize(): call it between two steps"
            )
        uneven.wait([self])
        super().end_epoch()

    def release(self) -> None:
        super().release()
        uneven.live.discard(self)

    def _apply_what_waited(self) -> None:
        """A step with micro-batches that no backward pass of now completes, when all ranks wait."""
        with batch_rate(self) as scale:
            scale()
            super().step()
        super().zero_grad()

    def _follow(self, leader: int) -> None:
        """Takes parameters and state of a rank (of the process set) that stepped where this one only took part."""
        groups = self.param_groups
        theirs = uneven.from_leader(self._hvd, leader, super().state_dict())
        if leader != self._hvd.rank:
            super().load_state_dict(theirs)
            for old, new in zip(groups, self.param_groups, strict=True):
                old.update(new)
            self.param_groups = groups

    def synchronize(self) -> None:
        """Waits until `.grad` of every parameter is the average over the ranks; if it is by now, nothing is sent.

        Before a batch is complete it only keeps the gradients: what is done to them then, such as clipping, is lost.
        """
        self._hvd.synchronize()
        self._hvd.evaluation.keep(self._hvd.params)

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """`step()` in this context leaves the gradients as they are (after a `synchronize()` of your own)."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Backward passes whose gradients add up locally before they are exchanged."""
        passes = validation.integer("passes", passes, 1)
        if passes > 1 and self._hvd.settings.batch_size is not None:
            raise ValueError(f"passes must be 1 with batch_size, got {passes}")
        self._hvd.batch.set_passes_per_step(passes)
        self.backward_passes_per_step = passes

    def zero_grad(self, *args: Any, **options: Any) -> None:
        """As the optimizer's. AssertionError between a backward pass and the step that ends its exchange."""
        if self._hvd.in_flight:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or "
                "optimizer.synchronize(). This is prohibited as it can cause a race condition."
            )
        self._hvd.discard()
        super().zero_grad(*args, **options)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, and this rank's residuals, factors, regimes and counts under "hvd_accordion"."""
        return {**super().state_dict(), STATE: state.saved(self._hvd)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Residuals are a rank's own: save and load one file per rank to resume exactly.

        What compression kept under other settings is taken up as far as it fits; a warning names what is not. Between
        backward() and step() the gradients stay, and their exchange ends under the settings with which it began.
        """
        state_dict = dict(state_dict)
        ours = state_dict.pop(STATE, None)
        super().load_state_dict(state_dict)
        state.take_up(self._hvd, ours)
        self._should_synchronize = True


def compressed(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, torch.nn.Parameter],
    compression: Compression,
    settings: Settings,
    controller: Controller,
    prefix: Prefix,
    membership: Membership,
    name_of: Mapping[int, str],
) -> torch.optim.Optimizer:
    """An object of a subclass of the optimizer's own class, with its parameters, state and hooks.

    `name_of`: names by the parameters' identity, for those that come later.
    """
    result = wrapped(optimizer, Compressed, settings, compression, name_of)
    itself = weakref.ref(result)  # no cycle: its hooks go as soon as the user lets go of it
    result._hvd = Engine(params, controller, settings, lambda: largest_rate(itself()), prefix, membership)
    uneven.live.add(result)
    return result
