"""Epochs, windows and levels: the graph counts steps, and calls the controller in Python when a decision is due."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.policy.protocol import Policy
from hvd_accordion.tensorflow.exchange import journal
from hvd_accordion.tensorflow.exchange.state import NEVER, State
from hvd_accordion.tensorflow.transport import HorovodTransport
from hvd_accordion.training import counters, resume
from hvd_accordion.training.controller import Controller, Due


class Decision(NamedTuple):
    """What the variables are to hold, by the controller: arrays outside of the graph, tensors in it."""

    step_of_epoch: Any
    levels: Any  # of each adaptive layer, as an index into its specs
    measured: Any  # for each observing policy: whether its layers are summed now
    measures_whole: Any
    emptied: Any  # for each observing policy, then the batch: whether its sums start anew
    passes: Any
    lr_scale: Any
    next_change: Any
    journal: Any


KINDS = Decision(  # dtype and rank of each
    step_of_epoch=(tf.int64, 0),
    levels=(tf.int32, 1),
    measured=(tf.bool, 1),
    measures_whole=(tf.bool, 0),
    emptied=(tf.bool, 1),
    passes=(tf.int64, 0),
    lr_scale=(tf.float64, 0),
    next_change=(tf.int64, 0),
    journal=(tf.string, 0),
)


class ControllerBridge:
    """Keeps a controller and the variables of a state in step.

    The graph counts steps and bytes in variables. At the end of a window and after the first step of one it calls
    `_decided` in Python, and writes the decision back into variables; no other step leaves the graph. The variable
    `journal` holds the controller's state, so that a checkpoint of the variables restores it too.

    Args:
        refit: gives variables that were restored from other settings the sizes of now, outside of the graph. Returns in
            words what it did not take up.
    """

    def __init__(
        self,
        controller: Controller,
        state: State,
        numbers: dict[str, str],
        name: Prefix,
        transport: HorovodTransport,
        refit: Callable[[], list[str]],
    ) -> None:
        self.controller, self.state, self.numbers = controller, state, numbers
        self.name, self.transport, self.refit = name, transport, refit
        self._journal = b""

    @property
    def adaptive(self) -> list[str]:
        return [layer.name for layer in self.controller.levels.adaptive]

    @property
    def _all(self) -> list[str]:
        """Layers that make up the whole model's norm, if that counts."""
        return list(self.controller.layers) if self.controller.batch.adapts else []

    def summed(self, policy: Policy) -> dict[str, tf.Variable]:
        """Layer name -> sum of its averaged gradients, of the layers that this policy decides."""
        mine = [name for name in self.adaptive if self.controller.policy[name] is policy]
        return {name: self.state.summed[self.numbers[name]] for name in mine if self.numbers[name] in self.state.summed}

    # in the graph

    def tick(self, sent: tf.Tensor, learning_rate: Any, steps: Any) -> None:
        """An update of so many steps has ended."""
        state, steps = self.state, tf.cast(steps, tf.int64)
        state.sent_bytes.assign_add(sent)
        state.updates.assign_add(1)
        step, of_epoch = state.step.assign_add(steps), state.step_of_epoch.assign_add(steps)
        wake = self._wakes(step, of_epoch, steps)
        if not wake:
            return

        def awake() -> tf.Tensor:
            numbers = [*self._norms(), tf.cast(learning_rate, tf.float64)]
            shared = self._from_rank_0(tf.stack(numbers))
            counts = [v.read_value() for v in (state.step, state.updates, state.sent_bytes, state.journal)]
            decision = tf.numpy_function(self._decided, [*counts, steps, shared], [dtype for dtype, _ in KINDS])
            for tensor, (_, rank) in zip(decision, KINDS, strict=True):
                tensor.set_shape([None] * rank)
            self.write(Decision(*decision))
            return tf.constant(True)

        tf.cond(tf.reduce_any(tf.stack(wake)), awake, lambda: tf.constant(False))

    def _wakes(self, step: tf.Tensor, of_epoch: tf.Tensor, steps: tf.Tensor) -> list[tf.Tensor]:
        """When there may be something to decide: at a window's end, and after its first update, for the learning rate."""
        controller, wakes, most = self.controller, [], counters.MAX_STEPS_OF_EPOCH
        for window in controller.windows:
            if window.unit == "epochs":
                wakes.append(tf.equal(of_epoch, steps))
            else:
                wakes += [tf.equal(step % window.interval, 0), tf.equal((step - steps) % window.interval, 0)]
        if controller.needs_epochs:  # to raise if nobody signals an end
            wakes.append((of_epoch > most) & (of_epoch - steps <= most))
        if controller.levels.scheduled:
            wakes.append(step >= self.state.next_change)
        if controller.counters.steps_per_epoch is not None:
            wakes.append(of_epoch >= controller.counters.steps_per_epoch)
        return wakes

    def _norms(self) -> list[tf.Tensor]:
        state, numbers = self.state, self.numbers
        summed = [state.summed.get(numbers[name]) for name in self.adaptive]
        summed += [state.summed_whole.get(numbers[name]) for name in self._all]
        return [tf.constant(0.0, tf.float64) if x is None else tf.norm(tf.cast(x, tf.float64)) for x in summed]

    def _from_rank_0(self, numbers: tf.Tensor) -> tf.Tensor:
        return numbers if self.transport.size == 1 else self.transport.broadcast(numbers, 0, f"{self.name}.norms")

    def write(self, decision: Decision) -> None:
        """Writes a decision into the variables."""
        state = self.state
        state.step_of_epoch.assign(decision.step_of_epoch)
        state.levels.assign(decision.levels)
        state.measured.assign(decision.measured)
        state.measures_whole.assign(decision.measures_whole)
        state.passes.assign(decision.passes)
        state.lr_scale.assign(decision.lr_scale)
        if state.next_change is not None:
            state.next_change.assign(decision.next_change)
        state.journal.assign(decision.journal)
        for i, sums in enumerate([*map(self.summed, self.controller.levels.observers), state.summed_whole]):

            def empty(sums: dict[str, tf.Variable] = sums) -> tf.Tensor:
                for x in sums.values():
                    x.assign(tf.zeros_like(x))
                return tf.constant(True)

            tf.cond(decision.emptied[i], empty, lambda: tf.constant(False))

    # outside

    def begin(self) -> None:
        """After the state has got its variables, which a checkpoint may have filled at once."""
        if self.controller.levels.scheduled:
            self.state.schedule()
        self.sync()
        self.write(self.decision(Due()))

    def _decided(
        self, step: int, updates: int, sent: float, saved: bytes, last_update_steps: int, numbers: np.ndarray
    ) -> Decision:
        """Called from the graph: norms and the learning rate, as rank 0 has them."""
        *norms, learning_rate = map(float, numbers)
        if self._is_another(saved, int(step)):
            resume.warn_of(self._take_up(saved))
        due = self._count(int(step), int(updates), float(sent), int(last_update_steps))
        self._decide(due, norms, learning_rate)
        return self.decision(due)

    def sync(self, left: Sequence[str] = ()) -> None:
        """Brings the controller to the counts and state in the variables. `left`: what a checkpoint left out, in words."""
        state = self.state
        saved, step, updates, sent = state.journal.numpy(), int(state.step), int(state.updates), float(state.sent_bytes)
        restored = self._is_another(saved, step)
        left = [*left, *self.refit(), *(self._take_up(saved) if restored else ())]
        resume.warn_of(left, stacklevel=3)
        self._count(step, updates, sent)
        if restored:  # under other settings variables hold something else
            self.write(self.decision(Due()))

    def end_epoch(self, learning_rate: float) -> None:
        """Ends an epoch from outside of the graph, unless it has ended by itself; on all ranks."""
        self.sync()
        if due := self.controller.end_epoch():
            numbers = [*self._norms(), tf.constant(learning_rate, tf.float64)]
            *norms, learning_rate = self._from_rank_0(tf.stack(numbers)).numpy().tolist()
            self._decide(due, norms, learning_rate)
            self.write(self.decision(due))

    def _is_another(self, saved: bytes, step: int) -> bool:
        """Whether a journal is not its own: variables were restored."""
        return bool(saved) and (saved != self._journal or step < self.controller.step)

    def _take_up(self, saved: bytes) -> list[str]:
        """Returns what it leaves of a journal, in words."""
        self._journal = saved
        return self.controller.load_state_dict(journal.read(saved, list(self.controller.layers.values())))

    def _count(self, step: int, updates: int, sent: float, last_update_steps: int = 1) -> Due:
        """Catches up with the counts; returns what is due."""
        stats, steps = self.controller.stats, step - self.controller.step
        if steps <= 0:
            return Due()
        return self.controller.after_update(
            sent - stats.sent_bytes, 0.0, steps, updates - stats.updates, last_update_steps
        )

    def _decide(self, due: Due, norms: Sequence[float], learning_rate: float) -> None:
        """`norms`: of all layers that any policy decides, then of all that make up the whole model's."""
        found = dict(zip(self.adaptive, norms, strict=False))
        of_model = dict(zip(self._all, norms[len(self.adaptive) :], strict=True))
        self.controller.decide(due, learning_rate, {name: found[name] for name in due.layers}, of_model)

    def decision(self, due: Due) -> Decision:
        """What the variables are to hold now; the sums of windows that were due start anew."""
        controller, levels, epoch = self.controller, self.controller.levels, self.controller.counters.epoch
        chosen = [levels.index(name, controller.step, epoch) for name in self.adaptive]
        measured = [levels.measures(policy, epoch) for policy in levels.observers]
        used = [any(levels.policy[name] is policy for name in due.layers) for policy in levels.observers]
        self._journal = journal.written(controller.state_dict(), list(controller.layers.values()))
        return Decision(
            step_of_epoch=np.array(controller.counters.step_of_epoch, np.int64),
            levels=np.array(chosen, np.int32),
            measured=np.array(measured, bool),
            measures_whole=np.array(controller.measures_model, bool),
            emptied=np.array([*used, due.model], bool),
            passes=np.array(controller.batch.passes, np.int64),
            lr_scale=np.array(controller.lr_scale, np.float64),
            next_change=np.array(NEVER if levels.next_change is None else levels.next_change, np.int64),
            journal=np.array(self._journal, object),
        )
