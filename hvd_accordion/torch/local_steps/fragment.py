"""A fragment of the parameters: its anchor, and the exchange of its change since the last one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hvd_accordion.policy.local_steps import LocalSteps
from hvd_accordion.policy.protocol import Policy
from hvd_accordion.torch.configuration import placeholder
from hvd_accordion.torch.exchange.engine import Engine
from hvd_accordion.torch.exchange.micro_batches import wide


@dataclass
class Pending:
    """An exchange under way.

    Args:
        left: steps until it ends.
        sent: this rank's parameters when it began; empty where they do not change until it ends.
    """

    left: int
    sent: dict[str, torch.Tensor]


class Fragment:
    """Exchanges d = anchor - x of some parameters x.

    Args:
        number: its place among the fragments of its optimizer.
        params: name -> parameter, of which some may be frozen: they take part from when they first require a gradient.
        engine: exchanges the gradients of placeholders of these names: d is put there as if it were a gradient.
        settings: the user's.

    Attributes:
        anchor: name -> the common value, equal on all ranks, fp32 at least.
        behind: steps since the last exchange began.
    """

    def __init__(
        self, number: int, params: Mapping[str, torch.nn.Parameter], engine: Engine, settings: LocalSteps
    ) -> None:
        self.number = number
        self.params, self.engine, self.settings = dict(params), engine, settings
        self.anchor: dict[str, torch.nn.Parameter] = {}
        self.outer: torch.optim.Optimizer | None = None
        self.pending: Pending | None = None
        self.behind = 0

    def add(self, params: Mapping[str, torch.nn.Parameter], policy: Mapping[str, Policy]) -> None:
        """Takes in more parameters, the same on every rank."""
        self.engine.add({name: placeholder(p, wide(p), p.requires_grad) for name, p in params.items()}, policy)
        self.params.update(params)

    def new_names(self) -> list[str]:
        """Parameters that take part from now on."""
        return [name for name, p in self.params.items() if p.requires_grad and name not in self.anchor]

    @torch.no_grad()
    def take_anchor(self, names: list[str]) -> None:
        """What these parameters are now is common to all ranks."""
        for name in names:
            p = self.params[name]
            value = p.detach().to(wide(p), copy=True, memory_format=torch.contiguous_format)
            self.anchor[name] = torch.nn.Parameter(value, requires_grad=False)
            self.engine.params[name].requires_grad_(True)
        if names and self.settings.outer is not None:
            self._take_outer(names)

    def _take_outer(self, names: list[str]) -> None:
        assert self.settings.outer is not None
        added = [self.anchor[name] for name in names]
        if self.outer is None:
            self.outer = self.settings.outer(added)
        else:
            self.outer.add_param_group({"params": added})

    @torch.no_grad()
    def start(self, delay: int, at: Mapping[str, torch.Tensor] | None = None) -> None:
        """Begins the exchange of anchor - x, which ends `delay` steps later; x are the parameters of now, or `at`."""
        self.behind = 0
        if not self.anchor:
            return
        values = self.params if at is None else at
        keeps = at is None and delay > 0
        sent = {name: values[name].detach().clone() for name in self.anchor} if keeps else dict(at or {})
        self.pending = Pending(delay, sent)
        changes = torch._foreach_sub(list(self.anchor.values()), [values[name] for name in self.anchor])
        self.engine.discard()  # plans anew where parameters have come
        for name, change in zip(self.anchor, changes, strict=True):
            self.engine.params[name].grad = change
        for name in self.anchor:
            self.engine.on_gradient(name)

    def stepped(self) -> bool:
        """Another step was made. Returns whether the exchange under way is to end now."""
        self.behind += 1
        if self.pending is None:
            return False
        self.engine.exchange.driver.poll()
        self.pending.left -= 1
        return self.pending.left <= 0

    @torch.no_grad()
    def finish(self) -> None:
        """Ends the exchange under way, if there is one: the anchor moves, and the parameters with it."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        self.engine.synchronize()
        names = list(self.anchor)
        means = [mean_of(self.engine.params[name], self.anchor[name]) for name in names]
        self._move(means)
        for name in names:
            self.engine.params[name].grad = None
        self.engine.exchange.groups.kept = []  # of gradients that no backward pass will fault in again
        params: list[torch.Tensor] = [self.params[name] for name in names]
        anchors: list[torch.Tensor] = [self.anchor[name] for name in names]
        if not pending.sent or self.behind == 0:  # no step since
            torch._foreach_copy_(params, anchors)
            return
        moved = torch._foreach_sub(anchors, tuple(pending.sent[name] for name in names))
        torch._foreach_add_(params, tuple(x.to(p.dtype) for x, p in zip(moved, params, strict=True)))

    def _move(self, means: list[torch.Tensor]) -> None:
        anchors: list[torch.Tensor] = list(self.anchor.values())
        if self.outer is None:
            torch._foreach_sub_(anchors, tuple(means))
            return
        for anchor, mean in zip(anchors, means, strict=True):
            anchor.grad = mean
        with torch.enable_grad():
            self.outer.step()
        for anchor in anchors:
            anchor.grad = None

    def state_dict(self) -> dict[str, Any]:
        pending = self.pending
        return {
            "anchor": {name: x.detach() for name, x in self.anchor.items()},
            "outer": None if self.outer is None else self.outer.state_dict(),
            "pending": None if pending is None else {"left": pending.left, "sent": dict(pending.sent)},
            "behind": self.behind,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """An exchange that was under way begins again from what was sent."""
        self.forget()
        self.take_anchor([name for name in self.params if name in state["anchor"]])
        for name, anchor in self.anchor.items():
            anchor.copy_(state["anchor"][name])
        if self.outer is not None and state["outer"] is not None:
            self.outer.load_state_dict(state["outer"])
        if state["pending"] is not None:
            left, sent = state["pending"]["left"], state["pending"]["sent"]
            self.start(int(left), {name: x.to(self.anchor[name].device) for name, x in sent.items()})
        self.behind = int(state["behind"])

    def forget(self) -> None:
        """The next step begins with parameters that all ranks have in common. Ends what is under way."""
        self.finish()
        self.engine.drop()
        for holder in self.engine.params.values():
            holder.grad = None
        self.anchor, self.outer, self.pending, self.behind = {}, None, None, 0


def mean_of(holder: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """What the exchange left for the anchor."""
    return torch.zeros_like(anchor) if holder.grad is None else holder.grad
