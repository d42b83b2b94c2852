"""The way of a torch gradient, from its backward hook to the decisions that follow an update; the exchange: exchanging.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.policy.auto import advise
from hvd_accordion.torch.exchange.agreement import any_rank, from_rank_0
from hvd_accordion.torch.exchange.calibration import Probe
from hvd_accordion.torch.exchange.exchanging import Exchanging
from hvd_accordion.torch.exchange.turnout import Turnout, Turnouts, Update
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.membership import Membership
from hvd_accordion.training.settings import Settings

TOO_MANY_PASSES = (
    "Gradients were computed more than backward_passes_per_step times before call to step(). Increase "
    "backward_passes_per_step to accumulate gradients locally."
)


class Engine(Exchanging):
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
        super().__init__(params, controller, settings, prefix, membership)
        self.lr = lr
        self.seconds = 0.0
        self.when_exchanged: Callable[[], None] | None = None  # to be done once, after the exchange under way
        self.replan()

    def move(self) -> None:
        """To its place among ranks that were gathered anew; all that was under way with the old ones is dropped.

        A residual counts for as much in the mean as it did.
        """
        self.drop()
        old = self.size
        self.join()
        if self.residual:
            torch._foreach_mul_(list(self.residual.values()), self.size / old)
        self.membership.move(self.controller, self.size)
        if self.turnouts is not None:
            self.turnouts = Turnouts(self.prefix, self.process_set)
        self.sparse = self.probe = None
        if self.turnouts is not None:
            self.turnouts = Turnouts(self.prefix, self.process_set)
        self.replan()

    # a step: hooks, then synchronize

    @property
    def in_flight(self) -> bool:
        return bool(self.started)

    @property
    def due(self) -> bool:
        """Whether the backward pass that runs, or comes next, completes the batch."""
        return self.sums.count + 1 >= self.expected

    @property
    def waiting(self) -> bool:
        """Whether micro-batches wait for others."""
        return self.sums.count > 0

    @property
    def completes_batch(self) -> bool:
        """Whether the next step of the optimizer updates the parameters."""
        return not self.waiting if self.evaluation.synchronized else self.due

    def on_gradient(self, name: str) -> None:
        """A backward pass has added to the parameter's gradient."""
        self.evaluation.fresh = True
        if self.size == 1:
            return
        begin = time.perf_counter()
        if self.passes[name] <= 0:
            raise AssertionError(TOO_MANY_PASSES)
        self.passes[name] -= 1
        complete = self.passes[name] == 0 and self.due
        if self.probe is not None and complete:
            self.probe.gradient(name)
        if complete and self.sparse is not None:
            group = self.group_of.get(name)
            if self.sparse.known.get(name):
                self._start_sparse(name)
            elif group is not None:
                self.missing[group.name].discard(name)
                if not self.missing[group.name]:
                    self._start(group)
            self.driver.poll()
        self.seconds += time.perf_counter() - begin

    def synchronize(self) -> bool:
        """Ends the exchange of all gradients: every rank's `.grad` holds the mean (or sum).

        Where the batch is not complete yet, keeps the gradients, leaves `.grad` as it is and sends nothing.

        Returns False where nothing is done: the user has synchronized since the last step, and no rank has new gradients.
        """
        if not self.active:
            return True
        if self.evaluation.averaged is not None:  # ranks may differ in what is new to them
            if not self._any_new():
                return False
        if self.due:
            self._update()
        else:
            self.sums.add(self.params)
            self.reset()
        return True

    def _any_new(self) -> bool:
        """Whether there are gradients that are not averaged yet, on any rank that would exchange them now."""
        new = self.evaluation.has_new(self.params)
        if self.turnouts is None:
            return any_rank(new, f"{self.prefix}.fresh", self.process_set)
        if not self.due:
            return new
        self.turnouts.start(self.sums.count + 1, new=new, further=self.evaluation.further)
        self.update = Update(self.turnouts.finish(), own=True)
        return self.update.turnout.happens

    def discard(self) -> None:
        """The gradients are zeroed: backward passes since the last exchange, of which nothing was sent, do not count."""
        self.evaluation.averaged = None
        if self.evaluation.fresh:
            self.evaluation.fresh = False
            self.passes = dict.fromkeys(self.passes, self.backward_passes_per_step)
            self._begin()
        if self.planned != self.trainable():  # what is frozen before the backward pass gets no update
            self.replan()

    def take_part(self, turnout: Turnout) -> None:
        """In an update for which this rank has no gradient of now: with micro-batches that wait, or with zeros.

        Where other ranks have one, only their optimizers step: `.grad` stays as it is here.
        """
        self.update = Update(turnout)
        self.evaluation.begin(turnout.further)
        self._update()
        self.evaluation.begin()

    @torch.no_grad()
    def _update(self) -> None:
        """The exchange of a batch, and what is to be decided after it."""
        self.membership.check()
        begin = time.perf_counter()
        if self.turnouts is not None and self.update.turnout is None:
            self.turnouts.start(self.sums.count + 1, new=True, further=self.evaluation.further)
        if self.probe is not None:
            self.probe.end_backward()
        try:
            sent = self._exchange() if self.size > 1 else self._alone()
        except BaseException:
            self.reset()
            raise
        finally:
            self.sums.clear()
        self.seconds += time.perf_counter() - begin
        if self.probe is not None:
            self.probe.end_exchange(time.perf_counter() - begin)
        if self.when_exchanged is not None:
            then, self.when_exchanged = self.when_exchanged, None
            then()
        if self.evaluation.further:
            self.controller.exchanged_again(sent, self.seconds)
            self.reset()
            return
        turnout = self.update.turnout
        steps, source = (1, 0) if turnout is None else (max(turnout.counts), turnout.leader)
        ended = self.controller.advance(sent, self.seconds, steps)
        self.reset()
        if self.controller.wants_lr:
            (lr,) = from_rank_0([self.lr()], f"{self.prefix}.lr", self.process_set, source)
            self.controller.observe_lr(lr)
        if ended:
            self.controller.end_epoch()
        self._check(source)

    def end_epoch(self) -> None:
        if self.active and self.controller.end_epoch():
            self._check()

    def reset(self) -> None:
        """Ready for the next backward pass, whatever became of the last."""
        self.evaluation.fresh, self.evaluation.averaged = False, None
        self.driver.reset()
        self.seconds = 0.0
        self.passes = dict.fromkeys(self.passes, self.backward_passes_per_step)
        for name, x in self.unsent().items():
            if name in self.fed:
                self.residual[name].copy_(x)
        self.fed = {}
        self.loans.clear()
        self._begin()

    def drop(self) -> None:
        """Forgets a step that is under way, whatever the user has done of it."""
        self.when_exchanged = None
        self.evaluation.begin()
        self.reset()

    def _check(self, source: int = 0) -> None:
        """Between steps: the regimes from the norms that are due, and the plan that follows from them."""
        names = self.controller.due()
        all_names = list(self.controller.layers) if self.controller.model_norm_due else []
        if names or all_names:
            mine = [*self.watch.norms(names), *self.whole.norms(all_names), self.lr()]
            *shared, lr = from_rank_0(mine, f"{self.prefix}.norms", self.process_set, source)
            norms = dict(zip(names, shared, strict=False))
            self.controller.observe(norms, lr, dict(zip(all_names, shared[len(names) :], strict=True)))
        if self.probe is not None and self.probe.complete:
            self._choose(self.probe)
        if self.controller.changed or self.planned != self.trainable():
            self.replan()
        self.expected = self.controller.micro_batches()

    def _choose(self, probe: Probe) -> None:
        """An Auto decides, on all ranks alike."""
        assert self.sparse is not None
        layers = [layer for name, layer in self.controller.layers.items() if name not in self.sparse.dims]
        choices = self.controller.choices()
        self.advice = advise(layers, choices, probe.measure(layers, choices))
        self.controller.choose({layer.name: layer.chosen for layer in self.advice})
