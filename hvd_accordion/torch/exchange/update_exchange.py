"""The exchange of one update: groups of dense gradients, sparse layers, and layers of which no rank had a gradient yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.comm.transport import Transport
from hvd_accordion.compression.feedback import ExchangeResult
from hvd_accordion.policy.layers import Group, Layer
from hvd_accordion.torch.configuration import layer_of
from hvd_accordion.torch.exchange.driver import Driver
from hvd_accordion.torch.exchange.group_exchange import GroupExchange
from hvd_accordion.torch.exchange.micro_batches import MicroBatches
from hvd_accordion.torch.exchange.planning import Plan, plan
from hvd_accordion.torch.exchange.sparse import SparseLayers
from hvd_accordion.torch.exchange.traffic import Traffic
from hvd_accordion.training.channel import Channel
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.settings import Settings

NO_PLAN = Plan((), (), {})
Measure = Callable[[Mapping[str, torch.Tensor], torch.Tensor], None]


class UpdateExchange:
    """Starts what is complete, then the rest, then waits for all.

    Attributes:
        plan: which layers, in which groups.
        started: names of the groups and sparse layers that are under way.
        traffic: bytes that each layer sent.
    """

    def __init__(
        self,
        batch: MicroBatches,
        controller: Controller,
        settings: Settings,
        channel: Channel,
        prefix: Prefix,
        transport: Transport,
    ) -> None:
        self.batch, self.controller, self.settings, self.size = batch, controller, settings, transport.size
        self.params, self.channel = batch.params, channel
        self.driver = Driver(prefix, transport, settings.scales(transport.size))
        self.groups = GroupExchange(batch.params, channel, self.driver)
        self.sparse = SparseLayers(settings, prefix, transport)
        self.traffic = Traffic()
        self.plan, self.version = NO_PLAN, -1  # the controller's, as of the plan
        self.begin()

    def replan(self, names: Sequence[str]) -> None:
        """Plans for these layers at the levels of now."""
        layers = [layer_of(name, self.params[name]) for name in names]
        self.controller.set_layers(layers)
        self.plan = self._plan(names, [x for x in layers if not self.sparse.compared or self.sparse.is_dense(x.name)])
        self.version = self.controller.version
        self.traffic.replan()
        self.begin()

    def _plan(self, names: Sequence[str], layers: Sequence[Layer]) -> Plan:
        dense = [layer for layer in layers if layer.numel]
        specs, groups = self.controller.specs(), self.settings.groups
        return plan(names, dense, self.params, specs, self.channel.residual, groups)

    def begin(self) -> None:
        """What comes now belongs to another update."""
        self.started: set[str] = set()
        self._sparse: list[str] = []  # layers with sparse gradients in this update
        self._missing = {group.name: {layer.name for layer in group.layers} for group in self.plan.groups}

    def reset(self) -> None:
        """Whatever is under way will not end."""
        self.groups.reset()
        self.begin()

    def arrived(self, name: str) -> None:
        """A gradient is complete: starts the exchange that waited for it alone."""
        if not self.sparse.compared:
            return
        group = self.plan.group_of.get(name)
        if self.sparse.known.get(name):
            self._start_sparse(name)
        elif group is not None:
            self._missing[group.name].discard(name)
            if not self._missing[group.name]:
                self._start(group)
        self.driver.poll()

    def start_rest(self) -> list[str]:
        """Starts what backward has not; returns the layers of which no rank has had a gradient yet.

        As long as there are such layers, ranks compare them while the rest is under way.
        """
        first = not self.sparse.compared
        names = [name for name in self.params if self._is_exchanged(name)]
        unseen = [name for name in names if name not in self.sparse.known]
        if unseen:
            self.sparse.compare({name: self.batch.held(name) for name in unseen})
        if not first:
            self._start_known()
        if unseen:
            self.driver.until(lambda: self.sparse.answered)
            self.sparse.learn()
        if first:
            self.sparse.compared = True
            self.replan(names)
        late = [name for name in names if self.sparse.known.get(name) == 0 and name not in self.plan.group_of]
        layers = [layer for layer in (layer_of(name, self.params[name]) for name in late) if layer.numel]
        if layers:  # every rank sees so, and they go in groups of their own; the next plan has them with the others
            self.controller.set_layers([*({x.name: x for x in [*self.controller.layers.values(), *layers]}.values())])
            self.plan = self.plan.extended(self._plan(late, layers))
        self._start_known()
        return [name for name in unseen if name not in self.sparse.known]

    def _start_known(self) -> None:
        for group in self.plan.groups:
            if group.name not in self.started:
                self._start(group)
        self._sparse = [name for name, dims in self.sparse.known.items() if dims and self._is_exchanged(name)]
        for name in self._sparse:
            if name not in self.started:
                self._start_sparse(name)

    def _start(self, group: Group) -> None:
        self.started.add(group.name)
        grads = self.batch.take_dense(group.layers, self.plan.kinds)
        self.groups.start(group, grads, self.controller.step)

    def _start_sparse(self, name: str) -> None:
        self.started.add(name)
        self.sparse.start(name, self.params[name], self.batch.take(name))

    def _is_exchanged(self, name: str) -> bool:
        """Whether the update has this layer, be it frozen since the backward pass."""
        return self.params[name].requires_grad or name in self.plan.names

    def finish(self, measuring: bool, writes: bool) -> tuple[list[tuple[Group, ExchangeResult]], float]:
        """Waits for all exchanges. Returns the results of the groups, and the bytes that this rank sent.

        Args:
            measuring: whether norms depend on whether the step was finite.
            writes: whether means will be written.
        """
        flags, total = [], 0.0
        for name in self._sparse:
            flag, nbytes = self.sparse.finish(name)
            self.traffic.sent[name] = None, nbytes
            flags.append(flag)
            total += nbytes
        groups = self.plan.groups
        check_finite = measuring or any(group.has_residual or group.spec.lossy for group in groups)
        results = self.groups.finish(check_finite, flags, writes)
        for group in groups:
            nbytes = results[group.name][1]
            self.traffic.count(group, nbytes, self.size)
            total += nbytes
        return [(group, results[group.name][0]) for group in groups], total

    def write(
        self, results: Sequence[tuple[Group, ExchangeResult]], factor: float, measure: Measure | None, writes: bool
    ) -> None:
        """Writes the means, times a factor, into `.grad`.

        Args:
            measure: is given the means of a group, by name, and whether the step was finite.
            writes: whether they are wanted there.
        """
        for name in self._sparse:
            self.sparse.put(name, self.params[name], factor, writes)
        for group, result in results:
            if factor != 1.0:
                torch._foreach_mul_(result.mean, factor)
            means = dict(zip((layer.name for layer in group.layers), result.mean, strict=True))
            if measure is not None:
                measure(means, result.is_finite)
            if self.settings.op != self.settings.average:
                torch._foreach_mul_(result.mean, float(self.size))
            if writes:
                self.groups.write(means)
