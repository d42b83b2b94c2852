"""The way of a torch gradient: from its backward hook through its group's exchange back into `.grad`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import horovod.torch as hvd
import torch

from hvd_accordion import plan
from hvd_accordion.auto import Advice, advise
from hvd_accordion.compression import Context, exchange
from hvd_accordion.compression.base import Memory
from hvd_accordion.controller import Controller
from hvd_accordion.membership import Membership
from hvd_accordion.naming import Prefix
from hvd_accordion.ops import torch as ops
from hvd_accordion.plan import Group, Layer, Policy
from hvd_accordion.settings import Settings
from hvd_accordion.torch import gradients, rivals, sparse
from hvd_accordion.torch.accumulation import LocalSums, wide
from hvd_accordion.torch.agreement import any_rank, from_rank_0, require_equal
from hvd_accordion.torch.configuration import described, layer_of
from hvd_accordion.torch.driver import Driver
from hvd_accordion.torch.evaluation import Evaluation
from hvd_accordion.torch.hooks import Hooks
from hvd_accordion.torch.probe import Probe
from hvd_accordion.torch.traffic import Traffic
from hvd_accordion.torch.turnout import Turnout, Turnouts, Update
from hvd_accordion.torch.watching import Watching

TOO_MANY_PASSES = (
    "Gradients were computed more than backward_passes_per_step times before call to step(). Increase "
    "backward_passes_per_step to accumulate gradients locally."
)


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
        self.controller, self.settings, self.lr, self.prefix = controller, settings, lr, prefix
        self.membership = membership
        self.process_set = settings.process_set
        self.join()
        self.residual: dict[str, torch.Tensor] = {}
        self.memory: dict[str, Memory] = {}
        self.kinds: dict[str, tuple[torch.Size, torch.dtype, torch.device]] = {}  # of the gradients, as planned
        self.watch = Watching(controller.watched, settings.seed)  # of adaptive layers, for their Accordions
        self.whole = Watching(lambda _, count: controller.watched_of_whole(count), settings.seed)  # of all layers
        self.sums = LocalSums()
        self.loans = gradients.Loans()
        self.fed: dict[str, torch.Tensor] = {}  # gradients of exchanges under way, which the residuals hold by now
        uneven = self.active and (settings.uneven_inputs or settings.batch_size is not None)
        self.turnouts = Turnouts(prefix, self.process_set) if uneven else None
        self.expected = 1  # micro-batches of the update to come
        self.of_update = 1.0  # of this one, in the mean over the ranks
        self.lr_scale = 1.0  # of the update that was exchanged last
        self.traffic = Traffic()
        self.sparse: sparse.SparseLayers | None = None  # unknown until the first gradients are
        self.backward_passes_per_step = settings.backward_passes_per_step
        self.passes: dict[str, int] = {}
        self.seconds = 0.0
        self.evaluation = Evaluation()
        self.when_exchanged: Callable[[], None] | None = None  # to be done once, after the exchange under way
        self._hooks = Hooks(self)
        self.probe: Probe | None = None  # as long as an Auto has yet to choose
        self.advice: Advice | None = None
        rivals.claim(self)
        self.replan()

    def join(self) -> None:
        """Takes its place among the ranks."""
        self.active = self.process_set.included()
        self.size = self.process_set.size() if self.active else 1
        self.rank = self.process_set.rank() if self.active else 0
        self.driver = Driver(self.prefix, self.process_set, self.settings.scales(self.size))

    def described(self) -> dict[str, str]:
        """All in which ranks that are gathered anew must agree. One of them may have unfrozen parameters meanwhile."""
        return described(self.params, self.controller.policy, self.settings, frozen=False)

    def agree(self) -> None:
        """All ranks are known to be alike: from now on they may exchange."""
        str(self.prefix)  # drawn in the order in which all ranks agree, whichever optimizer exchanges first
        self.membership.agree(self.controller, self.rank if self.active else None, self.size)

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
        self.replan()

    # plan: which layers, in which groups

    def trainable(self) -> list[str]:
        return [name for name, p in self.params.items() if p.requires_grad]

    def add(self, params: Mapping[str, torch.nn.Parameter], policy: Mapping[str, Policy]) -> None:
        """Takes in more parameters, the same on every rank."""
        added = {name: f"{layer_of(name, p)} {policy[name]!r}" for name, p in params.items()}
        if self.active and self.membership.agreed:
            require_equal(added, f"{self.prefix}.{len(self.params)}", self.process_set)
        self.params.update(params)
        rivals.claim(self)
        self.controller.adopt(policy)
        self.replan()

    def release(self) -> None:
        """Takes its hooks off the parameters; what it knows can still be asked."""
        self._hooks.release()
        rivals.withdraw(self)

    def set_backward_passes_per_step(self, passes: int) -> None:
        self.backward_passes_per_step = passes
        self.passes = dict.fromkeys(self.passes, passes)

    def replan(self, names: list[str] | None = None) -> None:
        """Between steps: takes in a change of the trainable parameters (or the given ones) or of the levels."""
        names = self.planned = self.trainable() if names is None else names
        layers = [layer_of(name, self.params[name]) for name in names]
        self.controller.set_layers(layers)
        dense = [x for x in layers if x.numel and (self.sparse is None or self.sparse.is_dense(x.name))]
        self.groups = self._grouped(dense)
        self.group_of = {layer.name: group for group in self.groups for layer in group.layers}
        for name in names:
            self.passes.setdefault(name, self.backward_passes_per_step)
            if self.active:
                self._hooks.add(name, self.params[name])
        undecided = self.size > 1 and self.controller.undecided
        self.probe = self.probe or Probe(self.process_set, self.prefix) if undecided else None
        self.controller.changed = False
        self.traffic.replan()
        self.expected = self.controller.micro_batches()
        self._begin()

    def _grouped(self, layers: list[Layer]) -> list[Group]:
        self.kinds |= {x.name: gradients.kind(self.params[x.name]) for x in layers}
        limit = None if self.settings.groups else plan.BUCKET_BYTES
        return plan.grouped(self._runs(layers), self.controller.specs(), self.residual, limit)

    def _runs(self, layers: list[Layer]) -> list[list[Layer]]:
        groups = self.settings.groups
        if isinstance(groups, int) and groups > 0:
            return plan.split(layers, groups)
        if isinstance(groups, list):
            by_id = {id(self.params[x.name]): x for x in layers}
            runs = [[by_id.pop(id(p)) for p in group if id(p) in by_id] for group in groups]
            return [run for run in runs if run] + [[x] for x in by_id.values()]
        return [layers[::-1]]  # in the order of backward

    def _begin(self) -> None:
        self.missing = {group.name: {layer.name for layer in group.layers} for group in self.groups}
        self.started: dict[str, Group] = {}
        self.update = Update(None, own=True)
        self.measured, self.measures_whole = set(self.controller.measured), self.controller.measures_whole

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

    def unsent(self) -> dict[str, torch.Tensor]:
        """The residuals, without gradients whose exchanges have not come to their end."""
        back = {name: ops.taken_back(self.residual[name], grad) for name, grad in self.fed.items()}
        return {**self.residual, **back}

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

    def _exchange(self) -> float:
        unseen = self._start_rest()
        assert self.sparse is not None
        sparse_names = self._sparse_names()
        self.places = gradients.places(self.params, self.loans.names) if self.writes else {}
        flags, total = [], 0.0
        for name in sparse_names:
            flag, nbytes = self.sparse.finish(name)
            self.traffic.sent[name] = None, nbytes
            flags.append(flag)
            total += nbytes
        measured = self.measures_whole or bool(self.measured)
        asked = measured or any(group.feeds_back or group.spec.lossy for group in self.groups)
        results = self.driver.finish(asked, flags)
        self.fed = {}
        factor = self._turned_out()
        for name in sparse_names:
            self.sparse.put(name, self.params[name], factor, self.writes)
        for group in self.groups:
            step, nbytes = results[group.name]
            self._accept(group, step, factor)
            self.traffic.count(group, nbytes, self.size)
            total += nbytes
        for p in (self.params[name] for name in unseen if self.writes):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # as Horovod leaves it
        return total

    def _start_rest(self) -> list[str]:
        """Starts what backward has not, and names the layers that no rank has had a gradient of yet.

        As long as there are such layers, ranks ask each other about them while the rest is under way.
        """
        first = self.sparse is None
        if self.sparse is None:
            self.sparse = sparse.SparseLayers(self.settings, f"{self.prefix}.sparse")
        names = [name for name in self.params if self._takes_part(name)]
        unseen = [name for name in names if name not in self.sparse.known]
        if unseen:
            held = self.sums.sums
            self.sparse.ask({n: held[n] if n in held else self._own(self.params[n]) for n in unseen})
        if not first:
            self._start_known()
        if unseen:
            self.driver.until(lambda: self.sparse.answered)  # type: ignore[union-attr]
            self.sparse.learn()
            if first:
                update = self.update
                self.replan(names)
                self.update = update
        late = [name for name in names if self.sparse.is_dense(name) and name not in self.group_of]
        layers = [layer for layer in (layer_of(name, self.params[name]) for name in late) if layer.numel]
        if layers:  # every rank sees so, and they go in groups of their own; the next plan has them with the others
            self.controller.set_layers([*({x.name: x for x in [*self.controller.layers.values(), *layers]}.values())])
            groups = [_renamed(group, f"late.{len(self.groups)}") for group in self._grouped(layers)]
            self.groups = [*self.groups, *groups]
            self.group_of |= {layer.name: group for group in groups for layer in group.layers}
            self.controller.changed = True
        self._start_known()
        return [name for name in unseen if name not in self.sparse.known]

    def _start_known(self) -> None:
        for group in self.groups:
            if group.name not in self.started:
                self._start(group)
        for name in self._sparse_names():
            if name not in self.started:
                self._start_sparse(name)

    def _sparse_names(self) -> list[str]:
        assert self.sparse is not None
        return [name for name in self.sparse.dims if self._takes_part(name)]

    def _takes_part(self, name: str) -> bool:
        """Whether the update has this layer, be it frozen since the backward pass."""
        return self.params[name].requires_grad or name in self.planned

    @property
    def writes(self) -> bool:
        """Whether this rank's optimizer steps after the update."""
        return self.update.own or (self.update.turnout is not None and self.update.turnout.all_wait)

    def _turned_out(self) -> float:
        """Learns what the other ranks had for the update, and gives what that makes of a mean over the ranks."""
        if self.turnouts is None:
            return 1.0
        divisor, n = self.divisor, self.size
        if self.update.turnout is None:
            self.update = Update(self.turnouts.finish(), own=True)
        turnout = self.update.turnout
        assert turnout is not None
        if self.settings.batch_size is None:
            return 1.0
        self.of_update = turnout.mean
        self.lr_scale = self.controller.lr_scale * (turnout.mean / self.controller.passes)
        return n * divisor / turnout.total

    @torch.no_grad()
    def _start(self, group: Group) -> None:
        self.started[group.name] = group
        names = tuple(layer.name for layer in group.layers)
        grads = []
        for layer in group.layers:
            grad = self._gradient(layer)
            holder = self.loans.holder(grad)
            if holder not in (None, group.name):  # which may average in that memory: then it holds the mean
                self.driver.wait(holder)
            grads.append(grad if group.feeds_back else self.loans.lend(group.name, layer.name, grad))
        residual = None
        if group.feeds_back:
            for name, grad in zip(names, grads, strict=True):
                if name not in self.residual:
                    layout = torch.contiguous_format
                    self.residual[name] = torch.zeros_like(grad, dtype=wide(grad), memory_format=layout)
            residual = [self.residual[name] for name in names]
            if group.spec.lossy:
                self.fed.update(zip(names, grads, strict=True))
        memory = [self.memory.get(name, {}) for name in names]
        ctx = Context(names, group.layers[0].dtype, self.controller.step, self.settings.seed, self.rank, self.size)
        places = partial(self._places, names)
        self.driver.start(group.name, exchange(group.spec, ops, grads, residual, memory, ctx, places))

    def _places(self, names: Sequence[str]) -> list[torch.Tensor | None]:
        return [gradients.room(self.places.get(name)) for name in names]

    def _start_sparse(self, name: str) -> None:
        assert self.sparse is not None
        self.started[name] = None  # type: ignore[assignment]
        p = self.params[name]
        self.sparse.start(name, p, self._batch(name, p))

    def _gradient(self, layer: Layer) -> torch.Tensor:
        """Of the update, dense."""
        p = self.params[layer.name]
        kind = self.kinds[layer.name]
        return gradients.dense(self._batch(layer.name, p), p, layer, kind)

    @property
    def divisor(self) -> float:
        """Of the sum of a rank's micro-batches, so that the mean over the ranks is near to that of all micro-batches."""
        turnout = self.update.turnout
        return turnout.mean if turnout is not None and turnout.all_wait else self.expected

    def _batch(self, name: str, p: torch.Tensor) -> torch.Tensor | None:
        return self.sums.batch(name, self._own(p), self.divisor, p.dtype)

    def _own(self, p: torch.Tensor) -> torch.Tensor | None:
        """What a backward pass for this update has left; of a layer that was frozen since, too."""
        return p.grad if self.update.own else None

    def _accept(self, group: Group, step: Any, factor: float) -> None:
        """Writes the means, times a factor, into the gradients; keeps residuals and memory; adds to the window's sums."""
        names = [layer.name for layer in group.layers]
        if step.residual is not None:
            self.residual.update(zip(names, step.residual, strict=True))
        self.memory.update(zip(names, step.memory, strict=True))
        if factor != 1.0:
            torch._foreach_mul_(step.mean, factor)
        means = dict(zip(names, step.mean, strict=True))
        self._watch(means, step.ok)
        if self.settings.op == hvd.Sum:
            torch._foreach_mul_(step.mean, float(self.size))
        if self.writes:
            gradients.put(self.params, self.places, means)

    def _watch(self, means: Mapping[str, torch.Tensor], ok: torch.Tensor) -> None:
        """For the norms of the window; a mean counts for as much as it is made of, a closure's first alone."""
        if self.evaluation.further:
            return
        self.watch.add({name: mean for name, mean in means.items() if name in self.measured}, ok, self.of_update)
        if self.measures_whole:
            self.whole.add(means, ok, self.of_update)

    def _alone(self) -> float:
        """One rank: gradients stay, but for those of a batch, and what waits since there were more; norms are watched."""
        factor, sums = self._turned_out(), {}
        for name in self.trainable():
            grad, waits = self._batch(name, self.params[name]), self.residual.pop(name, None)
            if waits is not None:
                sums[name] = waits if grad is None else waits + grad
            elif grad is not None and self.turnouts is not None:
                sums[name] = grad * factor
        gradients.put(self.params, gradients.places(self.params, set()), sums)
        for name in self.trainable() if self.measures_whole else self.measured:
            grad = self.params[name].grad
            if grad is not None and not grad.is_sparse:
                self._watch({name: grad.detach()}, ops.all_finite([grad]))
        return 0.0

    def _check(self, source: int = 0) -> None:
        """Between steps: the regimes from the norms that are due, and the plan that follows from them."""
        names = self.controller.due()
        all_names = list(self.controller.layers) if self.controller.whole_due else []
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

    # reports

    def bytes_per_step(self) -> dict[str, float]:
        """Bytes of each layer a step: as counted at the last, or what the spec says where that is a new one."""
        return self.traffic.per_step(self.controller.layers, self.controller.specs(), self.size)


def _renamed(group: Group, prefix: str) -> Group:
    return Group(f"{prefix}.{group.name}", group.spec, group.layers, group.feeds_back)
