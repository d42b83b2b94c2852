"""A training with local steps: one optimizer, or several over disjoint parameters, that count the same steps."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from hvd_accordion.policy.batch_size import MODEL
from hvd_accordion.policy.local_steps import AutoSteps, LocalSteps
from hvd_accordion.torch.common_parameters import showing
from hvd_accordion.torch.exchange.agreement import from_rank_0
from hvd_accordion.torch.local_steps.clock import Clock
from hvd_accordion.torch.local_steps.displacement import Displacement
from hvd_accordion.torch.local_steps.engine import LocalEngine
from hvd_accordion.torch.local_steps.fragment import Fragment
from hvd_accordion.training.reports import LayerRecord
from hvd_accordion.training.rounds import AfterStep, Rounds

Trainings = weakref.WeakValueDictionary[Any, "LocalTraining"]  # by process set; each lives as long as its optimizers

# of LocalSteps objects: what further optimizers may join
_open: weakref.WeakKeyDictionary[LocalSteps, Trainings] = weakref.WeakKeyDictionary()


def training_of(settings: LocalSteps, process_set: Any, steps_per_epoch: int | None, seed: int) -> LocalTraining:
    """The training of this very object and process set that has not begun; a new one where there is none."""
    trainings = _open.setdefault(settings, Trainings())
    found = trainings.get(process_set.process_set_id)
    if found is None or found.begun:
        found = trainings[process_set.process_set_id] = LocalTraining(settings, steps_per_epoch, seed)
    return found


class LocalTraining:
    """Exchanges after the last optimizer's step. One that was not stepped with the others is not waited for.

    Attributes:
        begun: steps that an optimizer has begun.
    """

    def __init__(self, settings: LocalSteps, steps_per_epoch: int | None, seed: int) -> None:
        self.settings = settings
        self.rounds = Rounds(settings, steps_per_epoch)
        self.begun = 0
        self.clock = Clock(settings.fragments)
        self._members: list[weakref.ref[LocalEngine]] = []
        rule = self.rounds.rule
        self.displacement = None if rule is None or rule.window is None else Displacement(rule.window, seed)

    def join(self, engine: LocalEngine) -> None:
        engine.training, engine.steps = self, self.begun
        self._members.append(weakref.ref(engine))

    @property
    def engines(self) -> list[LocalEngine]:
        return [engine for member in self._members if (engine := member()) is not None]

    @property
    def fragments(self) -> list[Fragment]:
        return [part for engine in self.engines for part in engine.fragments]

    # a step

    def begin(self, engine: LocalEngine) -> None:
        """The optimizer is about to step."""
        if engine.steps == self.begun:  # it is the first to begin another step
            self.follow()
            self.begun += 1
            for member in self.engines:
                member.take_anchors()
            if self.begun == 1 and self.displacement is not None and self.rounds.measures:
                self.displacement.begin(self.fragments)
        engine.steps = self.begun

    def end(self, engine: LocalEngine) -> None:
        """The optimizer has stepped."""
        if all(member.steps == self.begun for member in self.engines):
            self.follow()

    def follow(self) -> None:
        """What follows the step that was begun last, once."""
        if self.rounds.step == self.begun:
            return
        timed = self.rounds.times
        if timed is not None:
            self.clock.step_ends()
        for part in self.fragments:
            if part.stepped():
                part.finish()
        after = self.rounds.stepped(self.lr)
        if after.window_ends or after.epoch_ends:
            self._end_round(after)
        elif after.fragments:
            self._exchange(after.fragments, waits=self.settings.delay == 0)
        if timed is not None:
            self._choose(timed, len(after.fragments))

    def _choose(self, auto: AutoSteps, exchanged: int) -> None:
        """The interval, once enough exchanges were timed; all ranks take rank 0's."""
        self.clock.step_begins(exchanged)
        if self.clock.is_done:
            first = self.engines[0]
            step, exchange = from_rank_0(self.clock.seconds(), f"{first.prefix}.seconds", first.transport)
            self.rounds.chosen = auto.choose(step, exchange)

    @property
    def lr(self) -> float:
        return max((engine.lr() for engine in self.engines), default=1.0)

    def _exchange(self, numbers: Sequence[int], waits: bool) -> None:
        """Begins the exchange of these fragments; ends it if it `waits`."""
        parts = [part for part in self.fragments if part.number in numbers and part.behind]
        for part in parts:
            part.finish()
            part.start(0 if waits else self.settings.delay)
        if 0 in numbers:
            for engine in self.engines:
                engine.average_buffers()
        if waits:
            for part in parts:
                part.finish()

    # ends of rounds, windows and epochs

    def end_round(self) -> None:
        """All parameters become common. The same on every rank."""
        self.follow()
        self._end_round(AfterStep(self.rounds.all()))

    def end_epoch(self) -> None:
        """An epoch is over, if it had a step."""
        self.follow()
        after = self.rounds.end_epoch()
        if after.epoch_ends:
            self._end_round(after)

    def _end_round(self, after: AfterStep) -> None:
        for part in self.fragments:
            part.finish()
        self._exchange(after.fragments, waits=True)
        self.rounds.restart()
        if after.window_ends:
            self._observe()
        if after.epoch_ends:
            for engine in self.engines:
                engine.log_epoch(self.rounds.epoch, self.rounds.step, self.rounds.metrics())
                for part in engine.fragments:
                    part.engine.end_epoch()
            self.rounds.next_epoch()
        if self.displacement is not None and self.rounds.window_begins(after):
            self.displacement.begin(self.fragments)

    def _observe(self) -> None:
        assert self.displacement is not None and self.rounds.rule is not None
        first, lr = self.engines[0], self.lr
        mine = [self.displacement.norm(self.fragments), lr]
        moved, lr = from_rank_0(mine, f"{first.prefix}.displacement", first.transport)
        norm, number = self.rounds.observe(moved, lr), self.rounds.window - 1
        rule, words = self.rounds.rule, f"an exchange every {self.rounds.every} steps"
        for engine in self.engines:
            sent = engine.report(self.rounds.every, "").sent_bytes
            if engine.logger is not None:
                record = LayerRecord(norm, rule.change(MODEL), str(rule.regime(MODEL)), words, round(sent))
                engine.logger.log_window(number, {MODEL: record})

    # state: of all optimizers of the training, saved with each

    def state_dict(self) -> dict[str, Any]:
        before = {} if self.displacement is None else dict(self.displacement.before)
        return {"rounds": self.rounds.state_dict(), "window_start": before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds.load_state_dict(state["rounds"])
        self.begun = self.rounds.step
        if self.displacement is not None:
            self.displacement.before = dict(state["window_start"])

    def common_parameters(self) -> AbstractContextManager[None]:
        """The parameters are the common ones, as of the last exchange; afterwards each rank's own again. Sends nothing."""
        pairs = [(part.params[name], x) for part in self.fragments for name, x in part.anchor.items()]
        return showing([p for p, _ in pairs], [x for _, x in pairs])
