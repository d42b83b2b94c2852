"""The engine: from a gradient's hook to its mean in `.grad`, and to the decisions that follow an update."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.compression.sharing import RESIDUAL, Sharing, scale
from hvd_accordion.ops import torch as ops
from hvd_accordion.policy.assignment import memory_sharing
from hvd_accordion.policy.auto import Advice
from hvd_accordion.policy.protocol import Policy
from hvd_accordion.torch import transport
from hvd_accordion.torch.configuration import described, layer_of
from hvd_accordion.torch.exchange import rivals
from hvd_accordion.torch.exchange.agreement import any_rank, require_equal
from hvd_accordion.torch.exchange.calibration import AutoChoice
from hvd_accordion.torch.exchange.decisions import Decisions
from hvd_accordion.torch.exchange.evaluation import Evaluation
from hvd_accordion.torch.exchange.hooks import Hooks
from hvd_accordion.torch.exchange.micro_batches import MicroBatches
from hvd_accordion.torch.exchange.norms import GradientNorms
from hvd_accordion.torch.exchange.participation import Participation
from hvd_accordion.torch.exchange.turnout import Turnout
from hvd_accordion.torch.exchange.update import apply_alone, average
from hvd_accordion.torch.exchange.update_exchange import UpdateExchange
from hvd_accordion.training.channel import Channel
from hvd_accordion.training.controller import Controller, Due
from hvd_accordion.training.membership import Membership
from hvd_accordion.training.settings import Settings


class Engine:
    """Exchanges the gradients of named parameters.

    Args:
        params: name -> parameter, in the order of the optimizer's parameters.
        controller: knows levels and windows; its layers are those of `params`.
        lr: gives the learning rate of now.
        prefix: of all names of collectives; unique to an optimizer, equal on all ranks.
        membership: whether the other ranks are known to be like this one.
    """

    def __init__(
        self,
        params: Mapping[str, torch.nn.Parameter],
        controller: Controller,
        settings: Settings,
        lr: Callable[[], float],
        prefix: Prefix,
        membership: Membership,
    ) -> None:
        self.params = dict(params)
        self.controller, self.settings = controller, settings
        self.prefix, self.membership = prefix, membership
        self.batch = MicroBatches(self.params, settings.backward_passes_per_step)
        self.evaluation = Evaluation()
        self.channel = Channel(ops, settings.seed, 0, 1, residual_decay=settings.residual_decay)
        self.norms = GradientNorms(controller, settings.seed)
        self.decisions = Decisions(controller, lr, self.norms, prefix)
        self.auto = AutoChoice()
        self.hooks = Hooks(self)
        self.seconds = 0.0
        self.when_exchanged: Callable[[], None] | None = None  # to be done once, after the exchange under way
        self.join()
        rivals.claim(self)
        self.replan()

    def join(self) -> None:
        """Takes its place among the ranks."""
        self.active = self.settings.process_set.included()
        self.transport = transport.connect(self.settings.process_set)
        self.channel.rank, self.channel.size = self.transport.rank, self.transport.size
        place = self.prefix, self.transport
        self.exchange = UpdateExchange(self.batch, self.controller, self.settings, self.channel, *place)
        self.participation = Participation(self.settings, self.controller, *place, self.active)

    def move(self) -> None:
        """To its place among ranks that were gathered anew; all that was under way with the old ones is dropped.

        A residual counts for as much in the mean as it did.
        """
        self.drop()
        old = self.size
        self.join()
        scales = {sharing: scale(sharing, (self.rank, old), (self.rank, self.size)) for sharing in Sharing}
        for residual in self.residual.values():
            residual.mul_(scales[RESIDUAL])
        for name, memory in self.channel.memory.items():
            sharing = memory_sharing(name, self.controller.policy[name])
            self.channel.memory[name] = {key: x * scales[sharing.get(key, Sharing.SHARED)] for key, x in memory.items()}
        self.membership.move(self.controller, self.size)
        self.auto.probe = None
        self.replan()

    @property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def size(self) -> int:
        return self.transport.size

    def described(self) -> dict[str, str]:
        """All in which ranks that are gathered anew must agree. One of them may have unfrozen parameters meanwhile."""
        return described(self.params, self.controller.policy, self.settings, frozen=False)

    def agree(self) -> None:
        """All ranks are known to be alike: from now on they may exchange."""
        str(self.prefix)  # drawn in the order in which all ranks agree, whichever optimizer exchanges first
        self.membership.agree(self.controller, self.rank if self.active else None, self.size)

    def trainable(self) -> tuple[str, ...]:
        return tuple(name for name, p in self.params.items() if p.requires_grad)

    def add(self, params: Mapping[str, torch.nn.Parameter], policy: Mapping[str, Policy]) -> None:
        """Takes in more parameters, the same on every rank."""
        added = {name: f"{layer_of(name, p)} {policy[name]!r}" for name, p in params.items()}
        if self.active and self.membership.agreed:
            require_equal(added, f"{self.prefix}.{len(self.params)}", self.transport)
        self.params.update(params)
        rivals.claim(self)
        self.controller.adopt(policy)
        self.replan()

    def release(self) -> None:
        """Takes its hooks off the parameters; what it knows can still be read."""
        self.hooks.release()
        rivals.withdraw(self)

    def replan(self) -> None:
        """Between steps: takes in a change of the trainable parameters or of the levels."""
        names = self.trainable()
        self.exchange.replan(names)
        self.batch.expect(names)
        if self.active:
            for name in names:
                self.hooks.add(name, self.params[name])
        self.auto.begin(self.controller, self.transport, self.prefix)
        self.batch.resize(self.controller.micro_batches())
        self._begin()

    # a step: hooks, then synchronize

    @property
    def in_flight(self) -> bool:
        return bool(self.exchange.started)

    @property
    def due(self) -> bool:
        """Whether the backward pass that runs, or comes next, completes the batch."""
        return self.batch.count + 1 >= self.batch.expected

    @property
    def waiting(self) -> bool:
        """Whether micro-batches wait for others."""
        return self.batch.count > 0

    @property
    def completes_batch(self) -> bool:
        """Whether the next step of the optimizer updates the parameters."""
        return not self.waiting if self.evaluation.synchronized else self.due

    def on_gradient(self, name: str) -> None:
        """A backward pass has added to the parameter's gradient."""
        self.evaluation.fresh = True
        if self.transport.size == 1:
            return
        begin, due = time.perf_counter(), self.due
        if self.batch.arrived(name) and due:
            if self.auto.probe is not None:
                self.auto.probe.gradient(name)
            self.exchange.arrived(name)
        self.seconds += time.perf_counter() - begin

    def synchronize(self) -> bool:
        """Ends the exchange of all gradients: every rank's `.grad` holds the mean (or sum).

        Where the batch is not complete yet, keeps the gradients, leaves `.grad` as it is and sends nothing.

        Returns False where nothing is done: the user has synchronized since the last step, and no rank has new gradients.
        """
        if not self.active:
            return True
        if self.evaluation.averaged is not None and not self._any_new():
            return False
        if self.due:
            self._update()
        else:
            self.batch.add()
            self.reset()
        return True

    def _any_new(self) -> bool:
        """Whether there are gradients that are not averaged yet, on any rank that would exchange them now."""
        new = self.evaluation.has_new(self.params)
        if self.participation.turnouts is None:
            return any_rank(new, f"{self.prefix}.fresh", self.transport)
        if not self.due:
            return new
        return self.participation.happens(self.batch.count + 1, new, self.evaluation.further)

    def discard(self) -> None:
        """The gradients are zeroed: backward passes since the last exchange, of which nothing was sent, do not count."""
        self.evaluation.averaged = None
        if self.evaluation.fresh:
            self.evaluation.fresh = False
            self.batch.restart()
            self._begin()
        if self.exchange.plan.names != self.trainable():  # what is frozen before the backward pass gets no update
            self.replan()

    def take_part(self, turnout: Turnout) -> None:
        """In an update for which this rank has no gradient of now: with micro-batches that wait, or with zeros.

        Where other ranks have one, only their optimizers step: `.grad` stays as it is here.
        """
        self.participation.begin(turnout, own=False)
        self.batch.own = False
        self.batch.divisor = turnout.mean if turnout.all_wait else self.batch.expected
        self.evaluation.begin(turnout.further)
        self._update()
        self.evaluation.begin()

    @torch.no_grad()
    def _update(self) -> None:
        """The exchange of a batch, and what is to be decided after it."""
        self.membership.check()
        begin = time.perf_counter()
        probe = self.auto.probe
        if probe is not None:
            probe.end_backward()
        try:
            parts = self.exchange, self.participation, self.norms, self.evaluation.further
            sent = average(*parts) if self.transport.size > 1 else apply_alone(*parts, self.trainable())
        except BaseException:
            self.reset()
            raise
        finally:
            self.batch.clear()
        waited = time.perf_counter() - begin
        self.seconds += waited
        if probe is not None:
            probe.end_exchange(waited)
        then, self.when_exchanged = self.when_exchanged, None
        if then is not None:
            then()
        if self.evaluation.further:
            self.controller.exchanged_again(sent, self.seconds)
            self.reset()
            return
        steps, source = self.participation.steps_and_source
        due = self.controller.after_update(sent, self.seconds, steps)
        self.reset()
        self._decide(due, source)

    def _begin(self) -> None:
        """What comes now belongs to another update."""
        self.exchange.begin()
        self.batch.begin()
        self.participation.begin()
        self.norms.begin()

    def reset(self) -> None:
        """Ready for the next backward pass, whatever became of the last."""
        self.evaluation.fresh, self.evaluation.averaged = False, None
        self.exchange.reset()
        self.batch.restart()
        self.seconds = 0.0
        self._begin()

    def drop(self) -> None:
        """Forgets a step that is under way, whatever the user has done of it."""
        self.when_exchanged = None
        self.evaluation.begin()
        self.reset()

    def end_epoch(self) -> None:
        if self.active and (due := self.controller.end_epoch()):
            self._decide(due)

    def _decide(self, due: Due, source: int = 0) -> None:
        """Between steps: new levels from the norms that are due, and the plan that follows from them."""
        self.decisions.decide(due, self.transport, source)
        self.auto.choose(self.controller, self.exchange.sparse.dims)
        if self.exchange.version != self.controller.version or self.exchange.plan.names != self.trainable():
            self.replan()
        self.batch.resize(self.controller.micro_batches())

    @property
    def residual(self) -> Any:
        """Layer name -> what this rank has not sent yet."""
        return self.channel.residual

    @property
    def advice(self) -> Advice | None:
        return self.auto.advice

    def bytes_per_step(self) -> dict[str, float]:
        """Bytes of each layer a step: as counted at the last, or what the spec says where that is a new one."""
        return self.exchange.traffic.per_step(self.controller.layers, self.controller.specs(), self.size)
