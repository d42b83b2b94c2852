"""Which layers are exchanged, in which groups, and this rank's place among those that exchange them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hvd_accordion.comm.naming import Prefix
from hvd_accordion.compression.base import Memory
from hvd_accordion.policy import assignment
from hvd_accordion.policy.assignment import Group, Layer, Policy
from hvd_accordion.policy.auto import Advice
from hvd_accordion.torch.configuration import described, layer_of
from hvd_accordion.torch.exchange import gradients, rivals, sparse
from hvd_accordion.torch.exchange.agreement import require_equal
from hvd_accordion.torch.exchange.calibration import Probe
from hvd_accordion.torch.exchange.driver import Driver
from hvd_accordion.torch.exchange.hooks import Hooks
from hvd_accordion.torch.exchange.traffic import Traffic
from hvd_accordion.training.controller import Controller
from hvd_accordion.training.membership import Membership
from hvd_accordion.training.settings import Settings


class Planned:
    """The part of an engine that knows its layers; see `Engine`."""

    def __init__(
        self,
        params: Mapping[str, torch.nn.Parameter],
        controller: Controller,
        settings: Settings,
        prefix: Prefix,
        membership: Membership,
    ) -> None:
        self.params = dict(params)
        self.controller, self.settings, self.prefix = controller, settings, prefix
        self.membership = membership
        self.process_set = settings.process_set
        self.join()
        self.residual: dict[str, torch.Tensor] = {}
        self.memory: dict[str, Memory] = {}
        self.kinds: dict[str, tuple[torch.Size, torch.dtype, torch.device]] = {}  # of the gradients, as planned
        self.sparse: sparse.SparseLayers | None = None  # unknown until the first gradients are
        self.expected = 1  # micro-batches of the update to come
        self.backward_passes_per_step = settings.backward_passes_per_step
        self.passes: dict[str, int] = {}
        self.traffic = Traffic()
        self._hooks = Hooks(self)
        self.probe: Probe | None = None  # as long as an Auto has yet to choose
        self.advice: Advice | None = None
        rivals.claim(self)

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

    def _grouped(self, layers: list[Layer]) -> list[Group]:
        self.kinds |= {x.name: gradients.kind(self.params[x.name]) for x in layers}
        limit = None if self.settings.groups else assignment.BUCKET_BYTES
        return assignment.grouped(self._runs(layers), self.controller.specs(), self.residual, limit)

    def _runs(self, layers: list[Layer]) -> list[list[Layer]]:
        groups = self.settings.groups
        if isinstance(groups, int) and groups > 0:
            return assignment.split(layers, groups)
        if isinstance(groups, list):
            by_id = {id(self.params[x.name]): x for x in layers}
            runs = [[by_id.pop(id(p)) for p in group if id(p) in by_id] for group in groups]
            return [run for run in runs if run] + [[x] for x in by_id.values()]
        return [layers[::-1]]  # in the order of backward

    def bytes_per_step(self) -> dict[str, float]:
        """Bytes of each layer a step: as counted at the last, or what the spec says where that is a new one."""
        return self.traffic.per_step(self.controller.layers, self.controller.specs(), self.size)
