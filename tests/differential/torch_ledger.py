"""What went into the exchanges of each torch layer, what came out, and what waits in its residual."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from hvd_accordion.training import channel


class Ledger:
    """Keeps the sums of a rank. A step that was not finite leaves no trace, here as in the residuals."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.applied: dict[str, Any] = {}
        self.waiting: dict[str, Any] = {}

    def recorded(self, exchange: Any, spec: Any, ops: Any, grads: Any, residual: Any, *rest: Any) -> Any:
        copies, ctx = [grad.detach().double().clone() for grad in grads], rest[1]
        done = yield from exchange(spec, ops, grads, residual, *rest)
        for i, name in enumerate(ctx.names):
            self.waiting[name] = done.residual[i] if done.residual is not None else torch.zeros(())
            if done.is_finite and all(torch.isfinite(mean).all() for mean in done.mean):
                self.given[name] = self.given.get(name, 0) + copies[i]
                self.applied[name] = self.applied.get(name, 0) + done.mean[i].detach().double()
        return done

    def snapshot(self) -> Any:
        return copy.deepcopy((self.given, self.applied, self.waiting))

    def restore(self, snapshot: Any) -> None:
        self.given, self.applied, self.waiting = copy.deepcopy(snapshot)

    def lost(self, mean: Callable[[torch.Tensor, str], torch.Tensor]) -> dict[str, float]:
        """Layer -> the largest entry of mean(given) - applied - mean(waiting), relative to what was given."""
        found = {}
        for name in sorted(self.given):
            waiting = self.waiting[name].double().expand_as(self.given[name])
            given, waiting = mean(torch.stack([self.given[name], waiting]), f"ledger.{name}")
            error = (given - self.applied[name] - waiting).abs().max()
            found[name] = float(error / given.abs().max().clamp(min=1.0))
        return found


def install(monkeypatch: Any, ledger_of_rank: Callable[[], Ledger]) -> None:
    """Makes every exchange of torch write into the ledger of the rank that runs it."""
    exchange = channel.exchange

    def recorded(*arguments: Any) -> Any:
        return ledger_of_rank().recorded(exchange, *arguments)

    monkeypatch.setattr(channel, "exchange", recorded)
