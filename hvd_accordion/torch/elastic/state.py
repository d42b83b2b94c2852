"""The state of a torch training whose ranks come and go: what Horovod's carries, and what compression shares and keeps.

The one place that reads Horovod's TorchState from inside: its handlers, one for each model, optimizer and sampler.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from horovod.common.exceptions import HostsUpdatedInterrupt
from horovod.torch import elastic as horovods
from horovod.torch.elastic.state import (
    ModelStateHandler,
    OptimizerStateHandler,
    SamplerStateHandler,
    StateHandler,
    get_handler_registry,
    set_handler_registry,
)

from hvd_accordion.comm import naming
from hvd_accordion.torch import transport
from hvd_accordion.torch.broadcasting import broadcast_tree
from hvd_accordion.torch.exchange import state
from hvd_accordion.torch.exchange.agreement import require_equal
from hvd_accordion.torch.optim.error_compensated import ErrorCompensated

__all__ = [
    "ModelStateHandler",
    "OptimizerStateHandler",
    "SamplerStateHandler",
    "StateHandler",
    "TorchState",
    "get_handler_registry",
    "set_handler_registry",
]

NAME = "hvd_accordion.training.elastic"  # of the collectives that come before an optimizer's own are named anew


class TorchState(horovods.TorchState):
    """`horovod.torch.elastic.TorchState`, for optimizers of this package and any other.

    `sync` raises the same ValueError on all ranks where they are configured differently, then gives everyone what rank 0
    holds at that moment, committed or not: Horovod's part, and regimes, factors, counts. Residuals stay where they are. What
    it came to is committed, so that a rank that is new has something to restore. It follows every change of the ranks,
    removals too.

    `reset` takes an optimizer to its new place. A residual is scaled by new/old number of ranks, so that it counts for as
    much in the mean; what a lost rank held is lost; a new rank begins with none; a rank that is left alone applies its own.

    `commit` and `restore` carry all of this rank's, so that steps after a restore are the same bit for bit.

    Raises ValueError for an optimizer of ECLK's family, whose ranks hold parts of one sum.
    """

    def __init__(
        self, model: torch.nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model=model, optimizer=optimizer, **kwargs)
        for name, handler in self._handlers.items():
            if type(handler) is OptimizerStateHandler:
                self._handlers[name] = OptimizerHandler(name, handler.value)

    def sync(self) -> None:
        self.save()  # else what is no model, optimizer or sampler would go back to the last commit
        require_equal(dict(self._described()), NAME, transport.connect(transport.global_process_set))
        for handler in self._optimizers():
            handler.agree()
        super().sync()
        self.save()

    def reset(self) -> None:
        naming.gathered()
        for handler in self._optimizers():
            handler.move()

    def check_host_updates(self) -> None:
        try:
            super().check_host_updates()
        except HostsUpdatedInterrupt:
            raise HostsUpdatedInterrupt(skip_sync=False) from None

    def _optimizers(self) -> Iterator[OptimizerHandler]:
        return (handler for handler in self._handlers.values() if isinstance(handler, OptimizerHandler))

    def _described(self) -> Iterator[tuple[str, str]]:
        """All in which ranks must agree before they bring each other to one state."""
        yield "elastic state", ", ".join([*self._handlers, *self._saved_state])
        for handler in self._optimizers():
            yield from handler.described()


class OptimizerHandler(StateHandler):
    """Any torch optimizer, compressed or not. The tensors that it holds are never those that it has saved."""

    def __init__(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.name = name
        self._check(optimizer)
        self.save()

    def save(self) -> None:
        self._saved = copy.deepcopy(state.everything(self.value))

    def restore(self) -> None:
        state.take(self.value, copy.deepcopy(self._saved))

    def sync(self) -> None:
        everyone = transport.connect(transport.global_process_set)
        state.take(self.value, broadcast_tree(state.shared(self.value), 0, f"{NAME}.{self.name}", everyone))

    def set_value(self, value: torch.optim.Optimizer) -> None:
        self._check(value)
        super().set_value(value)

    def agree(self) -> None:
        """All ranks are alike: from now on the optimizer may exchange."""
        if self._engine is not None:
            self._engine.agree()

    def move(self) -> None:
        """To its place among ranks that have been gathered anew."""
        if self._engine is not None:
            self._engine.move()

    def described(self) -> Iterator[tuple[str, str]]:
        """What ranks must agree in, as text."""
        yield self.name, type(self.value).__name__
        if self._engine is not None:
            yield from ((f"{self.name}: {key}", text) for key, text in self._engine.described().items())

    @property
    def _engine(self) -> Any:
        return getattr(self.value, "_hvd", None)

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, ErrorCompensated):
            raise ValueError(
                f"{self.name} must not be {type(optimizer).__name__} in an elastic state: its ranks hold parts of one sum, "
                "which a rank that leaves takes along"
            )
