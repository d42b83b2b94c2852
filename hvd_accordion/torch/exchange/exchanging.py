"""The exchange of one update's gradients: each group from `.grad` to its mean and its residual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import horovod.torch as hvd
import torch

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.compression import Context, exchange
from hvd_accordion.ops import torch as ops
from hvd_accordion.policy.assignment import Group, Layer
from hvd_accordion.torch.configuration import layer_of
from hvd_accordion.torch.exchange import gradients, sparse
from hvd_accordion.torch.exchange.accumulation import LocalSums, wide
from hvd_accordion.torch.exchange.evaluation import Evaluation
from hvd_accordion.torch.exchange.norms import NormWindow
from hvd_accordion.torch.exchange.planning import Planned
from hvd_accordion.torch.exchange.turnout import Turnouts, Update
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.membership import Membership
from hvd_accordion.training.settings import Settings


class Exchanging(Planned):
    """The part of an engine that exchanges; see `Engine`."""

    def __init__(
        self,
        params: Mapping[str, torch.nn.Parameter],
        controller: Controller,
        settings: Settings,
        prefix: Prefix,
        membership: Membership,
    ) -> None:
        super().__init__(params, controller, settings, prefix, membership)
        self.watch = NormWindow(controller.watched, settings.seed)  # of adaptive layers, for their Accordions
        self.whole = NormWindow(lambda _, count: controller.watched_of_whole(count), settings.seed)  # of all layers
        self.evaluation = Evaluation()
        self.sums = LocalSums()
        self.loans = gradients.Loans()
        self.kept: list[torch.Tensor] = []
        self.fed: dict[str, torch.Tensor] = {}  # gradients of exchanges under way, which the residuals hold by now
        uneven = self.active and (settings.uneven_inputs or settings.batch_size is not None)
        self.turnouts = Turnouts(prefix, self.process_set) if uneven else None
        self.last_update_steps = 1.0  # micro-batches of this update, in the mean over the ranks
        self.lr_scale = 1.0  # of the update that was exchanged last

    def replan(self, names: list[str] | None = None) -> None:
        super().replan(names)
        self._begin()

    def _begin(self) -> None:
        self.missing = {group.name: {layer.name for layer in group.layers} for group in self.groups}
        self.started: dict[str, Group] = {}
        self.update = Update(None, own=True)
        self.places: dict[str, torch.Tensor] = {}  # of an update, known when all of its gradients are taken
        self.measured, self.measures_whole = set(self.controller.measured), self.controller.measures_whole

    def unsent(self) -> dict[str, torch.Tensor]:
        """The residuals, without gradients whose exchanges have not come to their end."""
        back = {name: ops.undo_add(self.residual[name], grad) for name, grad in self.fed.items()}
        return {**self.residual, **back}

    def _exchange(self) -> float:
        unseen = self._start_rest()
        assert self.sparse is not None
        sparse_names = self._sparse_names()
        self.places = gradients.places(self.params, self.loans.names) if self.writes else {}
        self.kept = gradients.kept(self.places)
        flags, total = [], 0.0
        for name in sparse_names:
            flag, nbytes = self.sparse.finish(name)
            self.traffic.sent[name] = None, nbytes
            flags.append(flag)
            total += nbytes
        measured = self.measures_whole or bool(self.measured)
        asked = measured or any(group.has_residual or group.spec.lossy for group in self.groups)
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
        self.last_update_steps = turnout.mean
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
            grads.append(grad if group.has_residual else self.loans.lend(group.name, layer.name, grad))
        residual = None
        if group.has_residual:
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
        self._watch(means, step.is_finite)
        if self.settings.op == hvd.Sum:
            torch._foreach_mul_(step.mean, float(self.size))
        if self.writes:
            gradients.put(self.params, self.places, means)

    def _watch(self, means: Mapping[str, torch.Tensor], ok: torch.Tensor) -> None:
        """For the norms of the window; a mean counts for as much as it is made of, a closure's first alone."""
        if self.evaluation.further:
            return
        self.watch.add(
            {name: mean for name, mean in means.items() if name in self.measured}, ok, self.last_update_steps
        )
        if self.measures_whole:
            self.whole.add(means, ok, self.last_update_steps)

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


def _renamed(group: Group, prefix: str) -> Group:
    return Group(f"{prefix}.{group.name}", group.spec, group.layers, group.has_residual)
